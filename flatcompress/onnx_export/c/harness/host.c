/* Reads samples (floats, in this machine's byte order) from standard input, writes the model's outputs to standard
 * output. HOST_... come from the command line of the compiler. */
#include <stdint.h>
#include <stdio.h>

#include HOST_HEADER

static uint64_t arena[(HOST_ARENA_BYTES + 7u) / 8u];
static float in[HOST_INPUT_COUNT];
static float out[HOST_OUTPUT_COUNT];

#ifdef FC_TRACE
void host_trace(const void *from, size_t count)
{
    (void)fwrite(from, 1u, count, stdout);
}
#endif

int main(void)
{
    while (fread(in, sizeof in[0], HOST_INPUT_COUNT, stdin) == HOST_INPUT_COUNT) {
        if (HOST_RUN(in, out, arena) != 0) {
            return 2;
        }
        if (fwrite(out, sizeof out[0], HOST_OUTPUT_COUNT, stdout) != HOST_OUTPUT_COUNT) {
            return 3;
        }
    }
    return 0;
}
