/* This file has the loops of routing, of reading a batch and of the lattice. balance is the inner loop of
 * assignment.py, step for step: it chooses the same moves, ties included. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NEVER ((int64_t)1 << 60)
#define FAR (1 << 29)     /* NEVER as an int32: the sum of two is still an int32 */
#define LARGEST (1 << 26) /* sums of losses along any path stay below it, so that no int32 overflows */
#define LANES 16          /* columns of losses that are computed at once */

typedef int32_t vec __attribute__((vector_size(16)));

typedef struct {
    int32_t *worth;         /* (n, wide): the affinity, in rows of whole LANES */
    uint64_t *inside;       /* (bins, words): a bit for each unit of a bin, so that units are visited in order */
    const int64_t *capacity;
    int64_t *place;         /* (n,) */
    int64_t *load, *idle;   /* (bins,) */
    int32_t *loss;          /* (bins, wide) */
    int32_t *distance, *shorter, *through; /* (wide,) */
    int64_t *previous, *path;              /* (bins,) */
    long n, bins, wide, words;
} State;

static vec smaller(vec a, vec b) {
    const vec is = a < b;
    return (a & is) | (b & ~is);
}

static vec loaded(const int32_t *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* This macro runs the statement that follows it for each unit i of a bin. */
#define FOR_UNITS(s, bin)                              \
    for (long word_ = 0; word_ < (s)->words; word_++) \
        for (uint64_t left_ = (s)->inside[(bin) * (s)->words + word_], i = 0; \
             left_ && (i = 64 * word_ + __builtin_ctzll(left_), 1); left_ &= left_ - 1)

static void update_loss(const State *s, long bin) {
    const int32_t first = s->idle[bin] ? 0 : FAR;
    for (long j = 0; j < s->wide; j += LANES) {
        vec a = {first, first, first, first}, b = a, c = a, d = a;
        FOR_UNITS(s, bin) {
            const int32_t *worth = s->worth + i * s->wide, own = worth[bin];
            const vec all = {own, own, own, own};
            a = smaller(all - loaded(worth + j), a);
            b = smaller(all - loaded(worth + j + 4), b);
            c = smaller(all - loaded(worth + j + 8), c);
            d = smaller(all - loaded(worth + j + 12), d);
        }
        const vec parts[] = {a, b, c, d};
        memcpy(s->loss + bin * s->wide + j, parts, sizeof parts);
    }
}

/* Find the shortest paths (Bellman-Ford), with all bins at once per round, as numpy does. */
static void shortest_paths(const State *s) {
    int32_t *distance = s->distance, *shorter = s->shorter, *through = s->through;
    for (int better = 1; better;) {
        better = 0;
        for (long j = 0; j < s->wide; j++) shorter[j] = INT32_MAX;
        for (long i = 0; i < s->bins; i++) {
            const int32_t *loss = s->loss + i * s->wide, base = distance[i];
            if (base == FAR) continue;
            const vec from = {base, base, base, base}, here = {i, i, i, i};
            for (long j = 0; j < s->wide; j += 4) {
                const vec length = from + loaded(loss + j), least = loaded(shorter + j), is = length < least;
                const vec now = (length & is) | (least & ~is), by = (here & is) | (loaded(through + j) & ~is);
                memcpy(shorter + j, &now, sizeof now);
                memcpy(through + j, &by, sizeof by);
            }
        }
        for (long j = 0; j < s->bins; j++) {
            if (shorter[j] >= distance[j]) continue;
            better = 1;
            distance[j] = shorter[j];
            s->previous[j] = through[j];
        }
    }
}

static void put(const State *s, long i, long bin) {
    const uint64_t bit = (uint64_t)1 << (i % 64);
    s->inside[s->place[i] * s->words + i / 64] &= ~bit;
    s->inside[bin * s->words + i / 64] |= bit;
    s->place[i] = bin;
}

/* Put up to `most` of the units that are tied for the loss of an edge into `destination`; return how many they are. */
static int64_t tied(const State *s, long source, long target, int64_t most, long destination) {
    const int32_t loss = s->loss[source * s->wide + target];
    int64_t count = 0;
    if (most <= 0) return 0;
    FOR_UNITS(s, source) {
        const int32_t *worth = s->worth + i * s->wide;
        if (worth[source] - worth[target] != loss) continue;
        if (destination != source) put(s, i, destination);
        if (++count == most) return count;
    }
    return count;
}

/* Move units along the path path[0] .. path[length], in which the last bin comes first. */
static void move(const State *s, const int64_t *path, long length, int64_t amount) {
    for (long k = 0; k < length; k++) {
        const long target = path[k], source = path[k + 1];
        const int64_t idle = s->loss[source * s->wide + target] == 0 ? s->idle[source] : 0;
        const int64_t movable = tied(s, source, target, amount, source) + idle;
        if (movable < amount) amount = movable;
    }
    for (long k = 0; k < length; k++) { /* the last edge comes first, so that no unit moves twice */
        const long target = path[k], source = path[k + 1];
        int64_t idle = s->loss[source * s->wide + target] == 0 ? s->idle[source] : 0;
        if (idle > amount) idle = amount;
        const int64_t moved = tied(s, source, target, amount - idle, target);
        s->load[source] -= moved;
        s->load[target] += moved;
        s->idle[source] -= idle;
        s->idle[target] += idle;
    }
    for (long k = 0; k <= length; k++) update_loss(s, path[k]);
}

static void settle(const State *s) {
    for (long bin = 0; bin < s->bins; bin++) update_loss(s, bin);
    for (;;) {
        long fullest = -1, emptiest = 0;
        int64_t room = INT64_MAX;
        for (long bin = 0; bin < s->bins; bin++) {
            const int64_t excess = s->load[bin] + s->idle[bin] - s->capacity[bin];
            s->distance[bin] = excess > 0 ? 0 : FAR;
            s->previous[bin] = -1;
            if (excess > 0) fullest = bin;
            if (excess < room) {
                room = excess;
                emptiest = bin;
            }
        }
        if (fullest < 0) return;
        shortest_paths(s);
        long length = 0;
        s->path[0] = emptiest;
        while (s->previous[s->path[length]] >= 0) {
            s->path[length + 1] = s->previous[s->path[length]];
            length++;
        }
        const long first = s->path[length];
        const int64_t excess = s->load[first] + s->idle[first] - s->capacity[first];
        move(s, s->path, length, excess < -room ? excess : -room);
    }
}

/* Put units into the bins that they prefer at these prices, and idle units into the cheapest, as _Assignment begins. */
static void choose(const int32_t *affinity, const int64_t *capacity, const int64_t *prices, int64_t *place,
                   int64_t *load, int64_t *idle, long n, long bins) {
    int64_t left = -n;
    long cheapest = 0;
    memset(load, 0, bins * sizeof *load);
    for (long i = 0; i < n; i++) {
        const int32_t *worth = affinity + i * bins;
        long best = 0;
        int64_t most = worth[0] - prices[0];
        for (long j = 1; j < bins; j++) {
            const int64_t net = worth[j] - prices[j];
            best = net > most ? j : best;
            most = net > most ? net : most;
        }
        place[i] = best;
        load[best]++;
    }
    for (long j = 0; j < bins; j++) {
        left += capacity[j];
        if (prices[j] < prices[cheapest]) cheapest = j;
    }
    for (long j = 0; j < bins; j++) {
        const int64_t room = prices[j] == prices[cheapest] && capacity[j] > load[j] ? capacity[j] - load[j] : 0;
        idle[j] = room < left ? room : left;
        left -= idle[j];
    }
    idle[cheapest] += left;
}

/* Balance an _Assignment; `loss` (bins, bins) is written. Where there are prices (bins,), place, load and idle are
 * chosen by them first. Return 0 where values are too large for this form, or memory is short; then nothing has
 * changed. */
int balance(const int32_t *affinity, const int64_t *capacity, const int64_t *prices, int64_t *place, int64_t *load,
            int64_t *idle, int64_t *loss, long n, long bins) {
    for (long k = 0; k < n * bins; k++)
        if (affinity[k] < 0 || affinity[k] > LARGEST / bins) return 0;
    const long wide = (bins + LANES - 1) / LANES * LANES, words = (n + 63) / 64;
    char *work = calloc(1, 8 * (bins * words + 2 * bins) + 4 * wide * (n + bins + 3));
    if (!work) return 0;
    State s = {.capacity = capacity, .place = place, .load = load, .idle = idle};
    s.n = n, s.bins = bins, s.wide = wide, s.words = words;
    s.inside = (uint64_t *)work;
    s.previous = (int64_t *)(s.inside + bins * words), s.path = s.previous + bins;
    s.worth = (int32_t *)(s.path + bins), s.loss = s.worth + n * wide;
    s.distance = s.loss + bins * wide, s.shorter = s.distance + wide, s.through = s.shorter + wide;
    if (prices) choose(affinity, capacity, prices, place, load, idle, n, bins);
    for (long i = 0; i < n; i++) {
        memcpy(s.worth + i * wide, affinity + i * bins, 4 * bins);
        s.inside[place[i] * words + i / 64] |= (uint64_t)1 << (i % 64);
    }
    settle(&s);
    for (long k = 0; k < bins * bins; k++) {
        const int32_t found = s.loss[k / bins * wide + k % bins];
        loss[k] = found == FAR ? NEVER : found;
    }
    free(work);
    return 1;
}

/* Write leaf and bin (n,) of each sequence; the units of a bin go to its leaves in turn. The leaves of bin b are
 * leaves[bounds[b]] to leaves[bounds[b + 1]]. totals gets the sum of the counts (n, bins), and that of the chosen bins.
 * */
void deal(int64_t *leaf, int64_t *bin, int64_t *totals, const int32_t *counts, const int64_t *unit_bin,
          const int64_t *leaves, const int64_t *bounds, int64_t *turn, long n, long unit, long bins) {
    totals[0] = totals[1] = 0;
    for (long b = 0; b < bins; b++) turn[b] = bounds[b];
    for (long first = 0; first < n; first += unit) {
        const int64_t chosen = unit_bin[first / unit], rank = leaves[turn[chosen]];
        if (++turn[chosen] == bounds[chosen + 1]) turn[chosen] = bounds[chosen];
        for (long i = first; i < n && i < first + unit; i++) {
            leaf[i] = rank;
            bin[i] = chosen;
            totals[1] += counts[i * bins + chosen];
            for (long b = 0; b < bins; b++) totals[0] += counts[i * bins + b];
        }
    }
}

/* Add to counts (n, bins) the tokens of each group in each row of tokens; rows are `stride` apart, and tokens below 0
 * are padding. */
void count_groups(int32_t *counts, const int32_t *tokens, const uint8_t *group_of_token, long n, long length,
                  long stride, long bins) {
    for (long i = 0; i < n; i++) {
        int32_t *row = counts + i * bins;
        for (long t = 0; t < length; t++) {
            const int32_t token = tokens[i * stride + t];
            if (token >= 0) row[group_of_token[token]]++;
        }
    }
}

#define ID_COLUMNS 2 /* the int32s that hold the id of a sequence */
#define AHEAD 4   /* sequences whose tokens are prefetched */
#define TABLES 4  /* tables of counts, so that a group that repeats need not wait for its count */
#define TABLE_BINS 256

/* Write the records (n, 2 + length) of the sequences that begin at starts (n,), and the counts (n, bins) of the groups
 * of all their tokens but the last. */
#define READ_ROWS(NAME, TYPE)                                                                                     \
    void NAME(int32_t *rows, int32_t *counts, const TYPE *tokens, const int64_t *ids, const int64_t *starts,    \
              const int32_t *row_of_token, const uint8_t *group_of_token, long n, long length, long bins) {       \
        for (long i = -AHEAD; i < n; i++) {                                                                       \
            if (i + AHEAD < n) {                                                                                  \
                const char *next = (const char *)(tokens + starts[i + AHEAD]);                                    \
                for (size_t at = 0; at < length * sizeof(TYPE); at += 64) __builtin_prefetch(next + at);          \
            }                                                                                                     \
            if (i < 0) continue;                                                                                  \
            const TYPE *from = tokens + starts[i];                                                                \
            int32_t *row = rows + i * (ID_COLUMNS + length), of[TABLES][TABLE_BINS];                                              \
            for (long k = 0; k < TABLES; k++) memset(of[k], 0, bins * sizeof **of);                               \
            memcpy(row, ids + i, sizeof *ids);                                                                    \
            long t = 0;                                                                                           \
            for (; t + TABLES < length; t += TABLES)                                                              \
                for (long k = 0; k < TABLES; k++) {                                                               \
                    row[ID_COLUMNS + t + k] = row_of_token[from[t + k]];                                                   \
                    of[k][group_of_token[from[t + k]]]++;                                                         \
                }                                                                                                 \
            for (; t < length; t++) {                                                                             \
                row[ID_COLUMNS + t] = row_of_token[from[t]];                                                               \
                if (t < length - 1) of[0][group_of_token[from[t]]]++;                                             \
            }                                                                                                     \
            for (long b = 0; b < bins; b++) counts[i * bins + b] = of[0][b] + of[1][b] + of[2][b] + of[3][b];     \
        }                                                                                                         \
    }

READ_ROWS(read_rows16, uint16_t)
READ_ROWS(read_rows32, uint32_t)

#define PART 64 /* columns that are computed at once */

/* Add the lattice's gradient of the rows of one class to out (V, width); return the class's share of the loss over
 * `coupling`, see Lattice in model/parameters.py. The rows of a class are bounds[class] to bounds[class + 1]. */
double pull_together(float *out, const float *table, const int64_t *bounds, const float *factors, long classes,
                     long class, long width, float coupling) {
    const long first = bounds[class], size = bounds[class + 1] - first;
    double loss = 0.0;
    for (long place = 0; place < size; place++) {
        const long partner = (place ^ 1) < size ? first + (place ^ 1) : -1;
        for (long left = 0; left < width; left += PART) {
            const long n = width - left < PART ? width - left : PART;
            const float *row = table + (first + place) * width + left;
            float shell[PART] = {0}, *to = out + (first + place) * width + left;
            double share = 0.0;
            for (long other = 0; other < classes; other++) {
                if (bounds[other] + place >= bounds[other + 1]) continue;
                const float *from = table + (bounds[other] + place) * width + left;
                for (long k = 0; k < n; k++) shell[k] += from[k];
            }
            for (long k = 0; k < n; k++) shell[k] = row[k] * factors[place] - shell[k];
            if (partner >= 0)
                for (long k = 0; k < n; k++) shell[k] -= table[partner * width + left + k];
            for (long k = 0; k < n; k++) share += (double)row[k] * shell[k];
            for (long k = 0; k < n; k++) to[k] += coupling * shell[k];
            loss += share;
        }
    }
    return 0.5 * loss;
}
