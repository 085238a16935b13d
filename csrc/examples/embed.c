/* The smallest program that embeds the kernel. With the library installed:
 *
 *     cc embed.c $(pkg-config --cflags --libs autoclip) -o embed
 */
#include <autoclip.h>
#include <stdio.h>
#include <stdlib.h>

static void must(autoclip_status status) {
    if (status != AUTOCLIP_OK) {
        fprintf(stderr, "%s\n", autoclip_status_message(status));
        exit(EXIT_FAILURE);
    }
}

int main(void) {
    const double norms[] = {4.0, 1.0, 3.0, 2.0};
    autoclip_history *history;
    must(autoclip_history_create(0, NULL, &history));
    for (size_t i = 0; i < sizeof norms / sizeof norms[0]; i++) {
        double threshold;
        must(autoclip_history_observe(history, norms[i], 10.0, &threshold));
        printf("norm %g threshold %g\n", norms[i], threshold);
    }
    autoclip_history_destroy(history);
}
