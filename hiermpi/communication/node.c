/* Waiting on words of memory that the processes of a node share: a barrier whose waiters sleep in the kernel (futex(2))
 * until the last one arrives. Elsewhere than on Linux, and without a compiler, communication/shared_memory.py polls. */

#include <stdatomic.h>
#include <stdint.h>

#if defined(__linux__)

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int usable(void) { return sizeof(_Atomic uint32_t) == 4; }

/* words[0] counts who has arrived, words[16], a cache line on, how often all had. Returns the latter as it was. */
uint32_t arrive(_Atomic uint32_t *words, uint32_t size) {
    const uint32_t before = atomic_load(&words[16]);
    if (atomic_fetch_add(&words[0], 1) + 1 == size) {
        atomic_store(&words[0], 0);
        atomic_fetch_add(&words[16], 1);
        syscall(SYS_futex, &words[16], FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    return before;
}

/* Sleep until all have arrived after `before`, a signal comes or the time is over; whether they have. */
int passed(_Atomic uint32_t *words, uint32_t before, long nanoseconds) {
    if (atomic_load(&words[16]) != before) return 1;
    if (nanoseconds > 0) {
        const struct timespec limit = {nanoseconds / 1000000000L, nanoseconds % 1000000000L};
        syscall(SYS_futex, &words[16], FUTEX_WAIT, before, &limit, NULL, 0);
    }
    return atomic_load(&words[16]) != before;
}

#else

int usable(void) { return 0; }
uint32_t arrive(_Atomic uint32_t *words, uint32_t size) { return 0; }
int passed(_Atomic uint32_t *words, uint32_t before, long nanoseconds) { return 1; }

#endif
