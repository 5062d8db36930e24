/* Included before a model that is traced: every step's result goes to standard output, before the model's. */
#include <stddef.h>

void host_trace(const void *from, size_t count);
#define FC_TRACE(from, count) host_trace((from), (count))
