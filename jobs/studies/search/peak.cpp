// The peak of one core: multiply-adds on registers alone, for shares of peak in the benchmark.
#include <time.h>

#include "product.h"

namespace nr {

// CPU seconds of this thread, whoever else uses the machine.
static double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Multiply-adds per second of one thread, by K's own instruction.
template <class K>
static double peak(double seconds) {
  typedef typename K::Sum Sum;
  constexpr int SUMS = 20;
  Sum sums[SUMS] = {};
  typename K::Group number = 0;
  const auto factor = K::factor(&number);
  auto column = decltype(K::column(&number)){};
  const double begun = thread_seconds();
  double passed = 0, count = 0;
  while (passed < seconds) {
#ifdef NR_AMX
    if constexpr (K::PER_GROUP > 1) {
      constexpr int IN_TILES = 1000;
      for (int repeat = 0; repeat < IN_TILES; repeat++) {
        tile_dot<K, 0, 6, 7>(), tile_dot<K, 1, 6, 7>(), tile_dot<K, 2, 6, 7>();
        tile_dot<K, 3, 6, 7>(), tile_dot<K, 4, 6, 7>(), tile_dot<K, 5, 6, 7>();
      }
      count += 6.0 * IN_TILES * TILE * TILE * TILE * K::PER_GROUP;
      passed = thread_seconds() - begun;
      continue;
    }
#endif
    for (int repeat = 0; repeat < 10000; repeat++) {
#pragma GCC unroll 20
      for (int s = 0; s < SUMS; s++) {
        sums[s] = K::multiply_add(sums[s], factor, column);
        asm volatile("" : "+x"(sums[s]));  // keeps it in its register, and in the loop
      }
    }
    count += 10000.0 * SUMS * LANES<Sum> * K::PER_GROUP;
    passed = thread_seconds() - begun;
  }
  return count / passed;
}

}  // namespace nr

using namespace nr;

extern "C" {

// Floating-point operations per second (a multiply-add is two) of this thread. The kernels must be usable here.
double nr_bfloat16_peak(double seconds) {
  [[maybe_unused]] TileUse use;
  return 2 * peak<Bf16>(seconds);
}
}
