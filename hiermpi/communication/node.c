/* Waiting on words of memory that the processes of a node share: gates whose waiters sleep in the kernel (futex(2)) until
 * the last one has arrived, and rows dealt out there. Elsewhere than on Linux, and without a compiler,
 * communication/shared_memory.py polls. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__linux__)

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int usable(void) { return sizeof(_Atomic uint32_t) == 4; }

/* Count one more arrival at a gate; who makes it `target` wakes all who sleep there. Counts wrap around. */
void arrive(_Atomic uint32_t *gate, uint32_t target) {
    if (atomic_fetch_add(gate, 1) + 1 == target) syscall(SYS_futex, gate, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int there(_Atomic uint32_t *gate, uint32_t target) { return (int32_t)(atomic_load(gate) - target) >= 0; }

static long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* Whether the count has reached `target`: looks for `spin` nanoseconds, giving the core away after each look, then
 * sleeps until it has, a signal comes or another `sleep` nanoseconds are over. */
int reached(_Atomic uint32_t *gate, uint32_t target, long spin, long sleep) {
    if (there(gate, target)) return 1;
    if (spin > 0) {
        const long end = nanoseconds() + spin;
        do {
            sched_yield();
            if (there(gate, target)) return 1;
        } while (nanoseconds() < end);
    }
    const long end = nanoseconds() + sleep;
    for (long left = sleep; left > 0; left = end - nanoseconds()) {
        const struct timespec limit = {left / 1000000000L, left % 1000000000L};
        const uint32_t seen = atomic_load(gate);
        if ((int32_t)(seen - target) >= 0) return 1;
        /* Arrivals before the last one change the word but wake nobody: only a fresh sleeper is sent back by them. */
        if (syscall(SYS_futex, gate, FUTEX_WAIT, seen, &limit, NULL, 0) != 0 && errno == EINTR) break;
    }
    return there(gate, target);
}

#else

int usable(void) { return 0; }
void arrive(_Atomic uint32_t *gate, uint32_t target) {}
int reached(_Atomic uint32_t *gate, uint32_t target, long spin, long sleep) { return 1; }

#endif

/* Rows (n, width bytes) in the order of the ranks that they are for, and where each rank's begin: bounds (size + 1,). */
void deal_rows(char *room, int64_t *bounds, const char *rows, const int64_t *leaf, int64_t *next, long n, long width,
               long size) {
    memset(bounds, 0, 8 * (size + 1));
    for (long i = 0; i < n; i++) bounds[leaf[i] + 1]++;
    for (long rank = 0; rank < size; rank++) {
        next[rank] = bounds[rank];
        bounds[rank + 1] += bounds[rank];
    }
    for (long i = 0; i < n; i++) memcpy(room + width * next[leaf[i]]++, rows + width * i, width);
}

/* sums (count,) over the mailboxes of all ranks, in their order; a box is `stride` doubles. */
void sum_boxes(double *sums, const double *boxes, long size, long count, long stride) {
    for (long k = 0; k < count; k++) sums[k] = boxes[k];
    for (long rank = 1; rank < size; rank++)
        for (long k = 0; k < count; k++) sums[k] += boxes[rank * stride + k];
}
