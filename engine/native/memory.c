/* The allocator's habits. */
#include "common.h"

#ifdef __GLIBC__ /* features.h, which tells, came with the other headers */
#include <malloc.h>
#endif

/* Freed memory stays with the process: a step's tensors are as large as the last one's, and pages that go back to the
   system are zeroed by it before they come again. Up to 32 MiB a piece, the most that glibc allows, and 512 MiB in all.
   Meant for processes that do nothing else; without glibc it does nothing. */
EXPORT void treadle_keep_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
}
