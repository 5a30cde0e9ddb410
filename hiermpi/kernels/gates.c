/* This file lets the processes of a node wait on words of shared memory: gates whose waiters sleep in the kernel
 * (futex(2)) until the last member has arrived, a queue for compute slots, mailboxes, and records sorted by their rank.
 * On other systems than Linux, and where there is no compiler, gates.py polls. */

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__linux__)

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int usable(void) { return sizeof(_Atomic uint32_t) == 4; }

/* The state of a gate on one rank, GateState in gates.py. Times are in nanoseconds. */
struct gate {
    _Atomic uint32_t *word; /* the number of arrivals in all rounds, which wraps around */
    uint32_t members, round;
    int64_t joins;    /* whether this rank is a member */
    int64_t spin;     /* how long to poll before sleeping, where the last wait was shorter */
    int64_t sleep;    /* the longest sleep, after which Python looks for stalls */
    int64_t expected; /* the time that the last wait took */
};

/* The wall time and CPU time that waits took, in nanoseconds. */
struct account {
    int64_t wall, cpu;
};

static int there(const struct gate *gate) {
    return (int32_t)(atomic_load(gate->word) - gate->round * gate->members) >= 0;
}

static int64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

/* The last rank to arrive wakes a few of those that sleep for the round, and each of these wakes a few more: else the
 * last rank would spend the time of waking all. Ranks that already sleep for the next round are not woken, as each
 * round has its own bit. */
enum { WOKEN = 4 };

static uint32_t bit(const struct gate *gate) { return (uint32_t)1 << gate->round % 32; }

static void wake_some(struct gate *gate) {
    syscall(SYS_futex, gate->word, FUTEX_WAKE_BITSET, WOKEN, NULL, NULL, bit(gate));
}

/* Begin the next round; a member also counts one more arrival. */
void arrive(struct gate *gate) {
    const uint32_t target = ++gate->round * gate->members;
    if (gate->joins && atomic_fetch_add(gate->word, 1) + 1 == target) wake_some(gate);
}

/* Poll for a while, and yield the core after each poll. */
static int spun(struct gate *gate, int64_t start) {
    if (gate->expected >= gate->spin) return 0;
    do {
        sched_yield();
        if (there(gate)) return 1;
    } while (nanoseconds(CLOCK_MONOTONIC) - start < gate->spin);
    return 0;
}

static void sleep_until_there(struct gate *gate) {
    const int64_t end = nanoseconds(CLOCK_MONOTONIC) + gate->sleep;
    const struct timespec limit = {end / 1000000000L, end % 1000000000L};
    for (;;) {
        const uint32_t seen = atomic_load(gate->word);
        if (there(gate)) return;
        /* Arrivals before the last one change the word but wake no rank; they only keep one from falling asleep. */
        const int failed =
            syscall(SYS_futex, gate->word, FUTEX_WAIT_BITSET, seen, &limit, NULL, bit(gate)) != 0 ? errno : 0;
        if (there(gate)) {
            wake_some(gate);
            return;
        }
        if (failed == EINTR || failed == ETIMEDOUT) return;
    }
}

/* Tell whether all members have arrived for this rank's round: at once, after polling, or after sleeping until they
 * have arrived, a signal has come or the time is over. */
int passed(struct gate *gate, struct account *account) {
    if (there(gate)) return 1;
    const int64_t start = nanoseconds(CLOCK_MONOTONIC), cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    if (!spun(gate, start)) sleep_until_there(gate);
    const int64_t wall = nanoseconds(CLOCK_MONOTONIC) - start;
    gate->expected = wall;
    account->wall += wall;
    account->cpu += nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
    return there(gate);
}

/* The queue gives compute slots in the order of asking. Its memory has, each in its own cache line, the number of
 * requests, the number of slots given back, `size` words, and `at_once` flags, one for each slot. Request number n may
 * be served when word n % size is n + 1 or more; no rank has two requests, so a word serves one request at a time. */
enum { LINE = 64 };

static _Atomic uint32_t *line(char *queue, uint32_t number) { return (_Atomic uint32_t *)(queue + LINE * number); }

/* Ask for a slot, and set up the gate at which it is waited for. */
void ask_slot(struct gate *gate, char *queue, uint32_t size) {
    const uint32_t request = atomic_fetch_add(line(queue, 0), 1);
    gate->word = line(queue, 2 + request % size);
    gate->members = 1;
    gate->round = request + 1;
}

/* Return a slot that no other rank has when the request may be served, else -1. */
long take_slot(struct gate *gate, struct account *account, char *queue, uint32_t size, uint32_t at_once) {
    if (!passed(gate, account)) return -1;
    for (uint32_t slot = 0;; slot = (slot + 1) % at_once) { /* a slot is free, or will be at once */
        uint32_t taken = 0;
        if (atomic_compare_exchange_strong(line(queue, 2 + size + slot), &taken, 1)) return slot;
    }
}

/* Give the slot back, and let the first rank in the queue begin. */
void give_slot_back(char *queue, uint32_t size, uint32_t at_once, uint32_t slot) {
    atomic_store(line(queue, 2 + size + slot), 0);
    const uint32_t request = atomic_fetch_add(line(queue, 1), 1) + at_once;
    atomic_store(line(queue, 2 + request % size), request + 1);
    syscall(SYS_futex, line(queue, 2 + request % size), FUTEX_WAKE, 1, NULL, NULL, 0);
}

#else

struct gate;
struct account;
int usable(void) { return 0; }
void arrive(struct gate *gate) {}
int passed(struct gate *gate, struct account *account) { return 1; }
void ask_slot(struct gate *gate, char *queue, uint32_t size) {}
long take_slot(struct gate *gate, struct account *account, char *queue, uint32_t size, uint32_t at_once) { return 0; }
void give_slot_back(char *queue, uint32_t size, uint32_t at_once, uint32_t slot) {}

#endif

/* Copy rows (n, width bytes) to room in the order of the ranks that they are for, and write the (size + 1,) bounds, at
 * which each rank's rows begin. */
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

/* Put numbers into a mailbox and arrive, once all have arrived for the round before this one. */
int offer(struct gate *gate, struct account *account, double *box, const double *values, long count) {
    if (!passed(gate, account)) return 0;
    memcpy(box, values, sizeof *values * count);
    arrive(gate);
    return 1;
}

/* When all have arrived, write the (count,) sums over the mailboxes of all ranks, in their order; a mailbox has
 * `stride` doubles. */
int collect(struct gate *gate, struct account *account, double *sums, const double *boxes, long size, long count,
            long stride) {
    if (!passed(gate, account)) return 0;
    for (long k = 0; k < count; k++) sums[k] = boxes[k];
    for (long rank = 1; rank < size; rank++)
        for (long k = 0; k < count; k++) sums[k] += boxes[rank * stride + k];
    return 1;
}

/* When all have arrived, copy the numbers of one mailbox. */
int take(struct gate *gate, struct account *account, double *values, const double *box, long count) {
    if (!passed(gate, account)) return 0;
    memcpy(values, box, sizeof *values * count);
    return 1;
}

/* Arrive, and copy the numbers of one mailbox; with `mine`, this rank puts them there first. */
int tell(struct gate *gate, struct account *account, double *values, double *box, long count, long mine) {
    if (mine) memcpy(box, values, sizeof *values * count);
    arrive(gate);
    return take(gate, account, values, box, count);
}
