/* The entry points for XLA, called as XLA calls them: through a call frame that is built here by hand.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

#include "xla.h"

static void require_refused(handler *call_it, xla_call *call, int code, const char *message) {
    REQUIRE(call_it(call) == &raised, "the call was not refused");
    REQUIRE(raised.code == code, "the code is %d and not %d", raised.code, code);
    REQUIRE(strstr(raised.message, message) != NULL, "the message is '%s'", raised.message);
}

/* --- Tests -------------------------------------------------------------------------------------------------------- */

static void test_handlers_say_for_which_version_they_were_made(void) {
    handler *const handlers[] = {autoclip_xla_window, autoclip_xla_tree};
    for (size_t i = 0; i < 2; ++i) {
        xla_metadata metadata = {.struct_size = sizeof metadata, .version = {.major = 77, .minor = 77}};
        xla_metadata_extension extension = {
            .extension = {.struct_size = sizeof extension, .type = XLA_EXTENSION_METADATA}, .metadata = &metadata};
        xla_call call = {.struct_size = sizeof call, .extensions = &extension.extension};
        REQUIRE(handlers[i](&call) == NULL, "the question was refused");
        REQUIRE(metadata.version.major == XLA_MAJOR && metadata.version.minor == XLA_MINOR, "the version is %d.%d",
                metadata.version.major, metadata.version.minor);
        /* Another extension asks nothing: the call is one, and here a bad one. */
        frame own;
        frame_create(&own);
        own.call.operands.count = 0;
        extension.extension.type = XLA_EXTENSION_METADATA + 1;
        own.call.extensions = &extension.extension;
        require_refused(handlers[i], &own.call, XLA_INVALID_ARGUMENT, "bad call");
    }
}

static void test_window_of_a_program_is_that_of_the_model(void) {
    enum { LARGEST = 7 };
    source from = {.state = 1};
    for (int way = 0; way < 8; ++way) { /* in place or not; the percentile whole or in parts; a window of one */
        const int64_t window = way < 4 ? LARGEST : 1;
        const size_t bytes = 2 * (size_t)window * sizeof(float);
        window_program twin;
        float norms[2 * LARGEST];
        float after[2 * LARGEST];
        window_create(&twin, (size_t)window, VALUES_RANDOM, from);
        for (int i = 0; i < 2 * window; ++i) norms[i] = INFINITY;
        int32_t recorded = 0;
        for (int i = 0; i < 100; ++i) {
            float norm = norm_draw(VALUES_RANDOM, 0, &from);
            double percentile = 100 * source_uniform(&from);
            float threshold;
            frame own;
            const bool in_place = way % 2 == 0;
            window_frame(&own, norms, window, &recorded, &norm, &percentile, in_place ? norms : after, &threshold);
            float parts[3];
            double rest = percentile;
            for (int part = 0; part < 3; ++part) {
                parts[part] = (float)rest;
                rest -= (double)parts[part];
            }
            if (way / 2 % 2 == 1) frame_set(&own, 3, XLA_F32, parts, 1, 3, 0);
            REQUIRE(autoclip_xla_window(&own.call) == NULL, "%s", raised.message);
            if (!in_place) memcpy(norms, after, bytes);
            if (isfinite(norm)) {
                model_push(&twin.truth, (double)norm);
                recorded += 1;
            }
            REQUIRE_SAME((double)model_threshold(&twin.truth, percentile), (double)threshold);
            memcpy(twin.norms, norms, bytes);
            twin.recorded = (size_t)recorded;
            window_judge(&twin);
        }
        window_destroy(&twin);
    }
}

static void test_tree_of_a_program_is_that_of_the_model(void) {
    source from = {.state = 2};
    tree_program twin;
    int32_t recorded = 0;
    float previous = INFINITY;
    tree_create(&twin, VALUES_RANDOM, from);
    for (int i = 0; i < 300; ++i) {
        float norm = norm_draw(VALUES_RANDOM, 0, &from);
        double percentile = 100 * source_uniform(&from);
        float previous_after;
        float threshold;
        frame own;
        tree_frame(&own, twin.id, &previous, &recorded, &norm, &percentile, &previous_after, &threshold);
        if (isfinite(norm)) model_push(&twin.truth, (double)norm);
        for (int again = 0; again < 2; ++again) { /* a program may be computed twice */
            REQUIRE(autoclip_xla_tree(&own.call) == NULL, "%s", raised.message);
            REQUIRE_SAME((double)model_threshold(&twin.truth, percentile), (double)threshold);
            REQUIRE_SAME((double)(isfinite(norm) ? norm : previous), (double)previous_after);
        }
        recorded += isfinite(norm) ? 1 : 0;
        previous = previous_after;
    }
    tree_destroy(&twin);
}

static void test_errors_of_a_history_are_told(void) {
    tree_program twin;
    int32_t recorded = 5; /* of a history that holds none */
    float previous = 1;
    float norm = 2;
    float previous_after = -1;
    float threshold = -1;
    double percentile = 50;
    frame own;
    tree_create(&twin, VALUES_RANDOM, (source){.state = 3});
    tree_frame(&own, twin.id, &previous, &recorded, &norm, &percentile, &previous_after, &threshold);
    require_refused(autoclip_xla_tree, &own.call, XLA_FAILED_PRECONDITION,
                    autoclip_status_message(AUTOCLIP_WRONG_STEP));
    recorded = 0;
    percentile = -1;
    require_refused(autoclip_xla_tree, &own.call, XLA_INVALID_ARGUMENT,
                    autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
    percentile = 50;
    own.history += 1;
    require_refused(autoclip_xla_tree, &own.call, XLA_FAILED_PRECONDITION,
                    autoclip_status_message(AUTOCLIP_NO_HISTORY));
    REQUIRE_SAME(-1, (double)previous_after);
    REQUIRE_SAME(-1, (double)threshold);
    tree_destroy(&twin);
}

/* One thing at a time is not as the entry point takes it. */
static void test_bad_calls_of_the_window_are_refused(void) {
    float norms[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
    float after[4] = {-1, -1, -1, -1};
    int32_t recorded = 0;
    float norm = 2;
    float threshold = -1;
    double percentile = 50;
    frame own;
    for (int fault = 0; fault <= 22; ++fault) {
        window_frame(&own, norms, 2, &recorded, &norm, &percentile, after, &threshold);
        switch (fault) {
        case 0: own.call.operands = (xla_buffers){0}; break; /* and no array of them */
        case 1: own.call.operands.count = 3; break;
        case 2: own.call.operands.count = 5; break;
        case 3: own.call.results.count = 1; break;
        case 4: own.call.results.count = 3; break;
        case 5: own.buffers[0].type = XLA_F64; break;
        case 6: own.buffers[1].type = XLA_S64; break;
        case 7: own.buffers[2].type = XLA_F64; break;
        case 8: own.buffers[3].type = XLA_S64; break;
        case 9: own.buffers[4].type = XLA_F64; break;
        case 10: own.buffers[5].type = XLA_F64; break;
        case 11: own.buffers[0].rank = 1; break;
        case 12: own.sizes[0][0] = 3; break;
        case 13: own.sizes[0][1] = own.sizes[4][1] = 0; break;
        case 14: own.buffers[3].rank = 0; break;
        case 15: own.buffers[3].rank = 2; break;
        case 16: frame_set(&own, 1, XLA_S32, NULL, 1, 0, 0); break;
        case 17: frame_set(&own, 2, XLA_F32, NULL, 1, 0, 0); break;
        case 18: own.sizes[4][1] = 1; break;
        case 19: own.sizes[4][0] = 4; break;
        case 20: frame_set(&own, 5, XLA_F32, NULL, 1, 0, 0); break;
        case 21: own.call.results = (xla_buffers){0}; break; /* and no array of them */
        case 22: own.buffers[0].rank = 3; break;
        default: break;
        }
        test_now.step = (uint64_t)fault;
        require_refused(autoclip_xla_window, &own.call, XLA_INVALID_ARGUMENT, "autoclip_xla_window");
    }
    window_frame(&own, norms, 2, &recorded, &norm, &percentile, after, &threshold);
    for (int i = 0; i < 3; ++i) {
        percentile = i == 0 ? -1 : i == 1 ? 101 : (double)NAN;
        require_refused(autoclip_xla_window, &own.call, XLA_INVALID_ARGUMENT,
                        autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
    }
    REQUIRE_SAME(-1, (double)after[0]);
    REQUIRE_SAME(-1, (double)threshold);
}

static void test_bad_calls_of_the_tree_are_refused(void) {
    tree_program twin;
    int32_t recorded = 0;
    float previous = 1;
    float norm = 2;
    float previous_after = -1;
    float threshold = -1;
    double percentile = 50;
    frame own;
    tree_create(&twin, VALUES_RANDOM, (source){.state = 4});
    for (int fault = 0; fault <= 21; ++fault) {
        tree_frame(&own, twin.id, &previous, &recorded, &norm, &percentile, &previous_after, &threshold);
        switch (fault) {
        case 0: own.call.operands = (xla_buffers){0}; break;
        case 1: own.call.operands.count = 3; break;
        case 2: own.call.operands.count = 5; break;
        case 3: own.call.results.count = 1; break;
        case 4: own.call.results.count = 3; break;
        case 5: own.buffers[0].type = XLA_F64; break;
        case 6: own.buffers[1].type = XLA_S64; break;
        case 7: own.buffers[2].type = XLA_F64; break;
        case 8: own.buffers[3].type = XLA_S32; break;
        case 9: own.buffers[4].type = XLA_F64; break;
        case 10: own.buffers[5].type = XLA_F64; break;
        case 11: own.call.attributes.count = 0; break;
        case 12: own.call.attributes.count = 2; break;
        case 13: own.kind = XLA_SCALAR_ATTRIBUTE + 1; break;
        case 14: own.attribute.type = XLA_S32; break;
        case 15: own.buffers[3].rank = 0; break;
        case 16: own.sizes[0][0] = 0; break;
        case 17: own.sizes[0][0] = 2; break;
        case 18: frame_set(&own, 1, XLA_S32, NULL, 1, 0, 0); break;
        case 19: frame_set(&own, 2, XLA_F32, NULL, 1, 0, 0); break;
        case 20: own.sizes[4][0] = 2; break;
        case 21: frame_set(&own, 5, XLA_F32, NULL, 1, 0, 0); break;
        default: break;
        }
        test_now.step = (uint64_t)fault;
        require_refused(autoclip_xla_tree, &own.call, XLA_INVALID_ARGUMENT, "autoclip_xla_tree");
    }
    REQUIRE_SAME(-1, (double)previous_after);
    tree_destroy(&twin);
}

TEST_MAIN(TEST(test_handlers_say_for_which_version_they_were_made), TEST(test_window_of_a_program_is_that_of_the_model),
          TEST(test_tree_of_a_program_is_that_of_the_model), TEST(test_errors_of_a_history_are_told),
          TEST(test_bad_calls_of_the_window_are_refused), TEST(test_bad_calls_of_the_tree_are_refused));
