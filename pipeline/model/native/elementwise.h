// The functions of one number: silu and its slope, and e^x, as exact as the products around them.
#pragma once

#include "lanes.h"

namespace nr::training {

// silu(x) and its slope.
NR_INLINE inline void silu_and_slope(VF x, VF& value, VF& slope) {
#ifdef NR_AVX2
  const VF share = 1 / (exponential(-x) + 1);
#else
  const VF share = (VF)_mm512_rcp14_ps((__m512)(rough_exponential(-x) + 1));
#endif
  value = x * share;
  slope = share + value * (1 - share);
}

NR_INLINE inline VF power_of_e(VF x) {
#ifdef NR_AVX2
  return exponential(x);
#else
  return rough_exponential(x);
#endif
}

}  // namespace nr::training
