/* The loops of routing. balance is the inner loop of transport.py, step for step: it chooses the same moves, ties
 * included. */

#include <stdint.h>

#define NEVER ((int64_t)1 << 60)

typedef struct {
    const int64_t *affinity; /* (n, bins) */
    const int64_t *capacity; /* (bins,) */
    int64_t *place;          /* (n,) */
    int64_t *load, *idle;    /* (bins,) */
    int64_t *loss;           /* (bins, bins) */
    long n, bins;
} State;

static void update_loss(const State *s, long bin) {
    int64_t *loss = s->loss + bin * s->bins;
    for (long j = 0; j < s->bins; j++) loss[j] = s->idle[bin] ? 0 : NEVER;
    for (long i = 0; i < s->n; i++) {
        if (s->place[i] != bin) continue;
        const int64_t *worth = s->affinity + i * s->bins;
        for (long j = 0; j < s->bins; j++) {
            const int64_t lost = worth[bin] - worth[j];
            if (lost < loss[j]) loss[j] = lost;
        }
    }
}

/* Bellman-Ford, all bins at once per round, as numpy does it. */
static void shortest_paths(const State *s, int64_t *distance, int64_t *previous, int64_t *shorter, int64_t *through) {
    for (int better = 1; better;) {
        better = 0;
        for (long j = 0; j < s->bins; j++) shorter[j] = INT64_MAX;
        for (long i = 0; i < s->bins; i++) {
            const int64_t *loss = s->loss + i * s->bins, base = distance[i];
            if (base == NEVER) continue;
            for (long j = 0; j < s->bins; j++) {
                const int64_t length = base + loss[j];
                through[j] = length < shorter[j] ? i : through[j];
                shorter[j] = length < shorter[j] ? length : shorter[j];
            }
        }
        for (long j = 0; j < s->bins; j++) {
            if (shorter[j] >= distance[j]) continue;
            better = 1;
            distance[j] = shorter[j];
            previous[j] = through[j];
        }
    }
}

static int64_t tied(const State *s, long source, long target, int64_t most, long destination) {
    const int64_t loss = s->loss[source * s->bins + target];
    int64_t count = 0;
    for (long i = 0; i < s->n && count < most; i++) {
        const int64_t *worth = s->affinity + i * s->bins;
        if (s->place[i] != source || worth[source] - worth[target] != loss) continue;
        s->place[i] = destination;
        count++;
    }
    return count;
}

/* Move units along the path path[0] .. path[length], given last bin first. */
static void move(const State *s, const int64_t *path, long length, int64_t amount) {
    for (long k = 0; k < length; k++) {
        const long target = path[k], source = path[k + 1];
        const int64_t idle = s->loss[source * s->bins + target] == 0 ? s->idle[source] : 0;
        const int64_t movable = tied(s, source, target, amount, source) + idle;
        if (movable < amount) amount = movable;
    }
    for (long k = 0; k < length; k++) { /* the last edge first: nothing that has moved is met again */
        const long target = path[k], source = path[k + 1];
        int64_t idle = s->loss[source * s->bins + target] == 0 ? s->idle[source] : 0;
        if (idle > amount) idle = amount;
        const int64_t moved = tied(s, source, target, amount - idle, target);
        s->load[source] -= moved;
        s->load[target] += moved;
        s->idle[source] -= idle;
        s->idle[target] += idle;
    }
    for (long k = 0; k <= length; k++) update_loss(s, path[k]);
}

/* work: (bins * (bins + 5),) */
void balance(const int64_t *affinity, const int64_t *capacity, int64_t *place, int64_t *load, int64_t *idle,
             int64_t *work, long n, long bins) {
    int64_t *distance = work + bins * bins, *previous = distance + bins, *shorter = previous + bins;
    int64_t *through = shorter + bins, *path = through + bins;
    const State s = {affinity, capacity, place, load, idle, work, n, bins};
    for (long bin = 0; bin < bins; bin++) update_loss(&s, bin);
    for (;;) {
        long fullest = -1, emptiest = 0;
        int64_t room = INT64_MAX;
        for (long bin = 0; bin < bins; bin++) {
            const int64_t excess = load[bin] + idle[bin] - capacity[bin];
            distance[bin] = excess > 0 ? 0 : NEVER;
            previous[bin] = -1;
            if (excess > 0) fullest = bin;
            if (excess < room) {
                room = excess;
                emptiest = bin;
            }
        }
        if (fullest < 0) return;
        shortest_paths(&s, distance, previous, shorter, through);
        long length = 0;
        path[0] = emptiest;
        while (previous[path[length]] >= 0) {
            path[length + 1] = previous[path[length]];
            length++;
        }
        const long first = path[length];
        const int64_t excess = load[first] + idle[first] - capacity[first];
        move(&s, path, length, excess < -room ? excess : -room);
    }
}

/* counts (n, groups): tokens of each group in each row of tokens, whose rows are `stride` apart; below 0 is padding. */
void count_groups(int64_t *counts, const int32_t *tokens, const int64_t *group_of_token, long n, long length,
                  long stride, long groups) {
    for (long i = 0; i < n; i++) {
        int64_t *row = counts + i * groups;
        for (long t = 0; t < length; t++) {
            const int32_t token = tokens[i * stride + t];
            if (token >= 0) row[group_of_token[token]]++;
        }
    }
}
