/* This level is the compiler's baseline: vectors of four floats, which every processor has in some form. */

#include "level.h"

#define LEVEL plain
#define W 4
#define ROWS 4
#define VECS 2
#define PROWS 4
#include "layers.h"
#include "products.h"

static int usable(void) { return 1; }
REGISTER_LEVEL("plain", 0, 0, usable)
