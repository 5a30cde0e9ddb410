/* This file keeps the list of the levels (instruction sets) of this library. Each level registers itself when the
 * library is loaded. */

#include "level.h"

static struct level *first;

/* Add a level to the list, which stays in ascending order of preference. */
void add_level(struct level *level) {
    struct level **at = &first;
    while (*at && (*at)->preference < level->preference) at = &(*at)->next;
    level->next = *at;
    *at = level;
}

static const struct level *level_at(long index) {
    const struct level *level = first;
    while (level && index--) level = level->next;
    return level;
}

/* Return the name of a level, counted from the least to the most preferred; return NULL after the last. */
const char *level_name(long index) {
    const struct level *level = level_at(index);
    return level ? level->name : NULL;
}

/* Tell whether this processor has all that the level needs. */
long level_usable(long index) { return level_at(index)->usable(); }

/* Return the number of floats in a register of the level. */
long level_floats(long index) { return level_at(index)->floats; }

/* Tell whether the level's own products are faster than a tuned BLAS. */
long level_own_products(long index) { return level_at(index)->own_products; }
