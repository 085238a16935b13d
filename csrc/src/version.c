/* What the library is, and what a status means, in words.
 *
 * SPDX-License-Identifier: MIT */
#include "autoclip.h"

#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)

const char *autoclip_version(void) {
    return TEXT(AUTOCLIP_VERSION_MAJOR) "." TEXT(AUTOCLIP_VERSION_MINOR) "." TEXT(AUTOCLIP_VERSION_PATCH);
}

uint32_t autoclip_abi_version(void) { return AUTOCLIP_ABI_VERSION; }

#if defined(__clang__)
#define COMPILER "clang " TEXT(__clang_major__) "." TEXT(__clang_minor__) "." TEXT(__clang_patchlevel__)
#elif defined(__GNUC__)
#define COMPILER "gcc " TEXT(__GNUC__) "." TEXT(__GNUC_MINOR__) "." TEXT(__GNUC_PATCHLEVEL__)
#elif defined(_MSC_VER)
#define COMPILER "msvc " TEXT(_MSC_FULL_VER)
#else
#define COMPILER "unknown compiler"
#endif

#if defined(__OPTIMIZE__) || (defined(_MSC_VER) && defined(NDEBUG))
#define OPTIMISED ", optimised"
#else
#define OPTIMISED ", not optimised"
#endif

const char *autoclip_build(void) {
    return sizeof(void *) == 8 ? COMPILER OPTIMISED ", 64-bit" : COMPILER OPTIMISED ", 32-bit";
}

const char *autoclip_status_message(autoclip_status status) {
    switch (status) {
    case AUTOCLIP_OK: return "The call succeeded.";
    case AUTOCLIP_NO_MEMORY: return "There is not enough memory; nothing was changed.";
    case AUTOCLIP_NOT_FINITE: return "A norm is NaN or infinite; a history holds finite norms only.";
    case AUTOCLIP_BAD_PERCENTILE: return "A percentile must be a number from 0 to 100.";
    case AUTOCLIP_EMPTY: return "An empty history has no percentile; remember a norm first.";
    case AUTOCLIP_BAD_RANK: return "A rank must be below the number of norms in the history.";
    case AUTOCLIP_HAS_WINDOW: return "A history with a window cannot take in another; merge into one without.";
    case AUTOCLIP_TOO_SMALL: return "The array given for the result is too small.";
    case AUTOCLIP_BAD_SNAPSHOT: return "These bytes are not a snapshot of a history, or were damaged.";
    case AUTOCLIP_NEW_SNAPSHOT: return "The snapshot was made by a later release; install that release to read it.";
    case AUTOCLIP_NO_HISTORY:
        return "There is no history with this id: it was destroyed, or belongs to the process that made the id.";
    case AUTOCLIP_BROKEN:
        return "An invariant of the history does not hold: memory was overwritten, or there is a bug.";
    case AUTOCLIP_NO_WINDOW: return "A history without a window does not know the age of its norms.";
    case AUTOCLIP_WRONG_STEP:
        return "The step does not follow the last one of this history: restore both from one checkpoint, and use a "
               "history in one run only. Replicas that do not wait for each other may be 4,096 steps apart.";
    }
    return "This is not a status of autoclip.";
}
