/* The instruction sets that this library was built with. Each registers itself when the library is loaded. */

#include "level.h"

static struct level *first;

/* Keep the list in ascending order of preference. */
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

/* The name of a level, from the least to the most preferred; NULL behind the last. */
const char *level_name(long index) {
    const struct level *level = level_at(index);
    return level ? level->name : NULL;
}

/* Whether this processor has all that the level needs. */
long level_usable(long index) { return level_at(index)->usable(); }

/* Floats in a register of the level. */
long level_floats(long index) { return level_at(index)->floats; }

/* Whether the level's own products are faster than a tuned BLAS. */
long level_own_products(long index) { return level_at(index)->own_products; }
