// The functions that the loader (loader.py) asks first.
#include "lanes.h"
#include "tiles.h"

#if defined(NR_AMX)
#define NR_INSTRUCTION_SET "amx"
#elif defined(NR_AVX512)
#define NR_INSTRUCTION_SET "avx512"
#else
#define NR_INSTRUCTION_SET "avx2"
#endif

extern "C" {

// The loader looks for these bytes in the file, before it loads it.
extern const char nr_sources[];
const char nr_sources[] = "nightrails sources " NR_SOURCE_HASH;

const char* nr_instruction_set() { return NR_INSTRUCTION_SET; }

// Whether this process may call the kernels. The first tile ends a process that may not.
int nr_is_usable() { return nr::may_use_tiles; }

// The rows of a product are padded to a multiple of this, and so must be those of a model's weights.
int nr_rows() { return nr::ROWS; }
}
