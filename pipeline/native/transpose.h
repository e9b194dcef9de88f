// Rows of 32-bit numbers to columns.
#pragma once

#include "lanes.h"

namespace nr {

// Transposes sixteen rows of 32-bit numbers to [groups][16]; `stride` is from group to group.
// Rows may be read up to a multiple of sixteen numbers.
inline void transpose(const uint32_t* const rows[BLOCK], int groups, uint32_t* to, int64_t stride) {
#ifdef NR_AVX2
  for (int g = 0; g < groups; g++)
    for (int c = 0; c < BLOCK; c++) to[g * stride + c] = rows[c][g];
#else
  for (int g = 0; g < groups; g += BLOCK) {
    __m512i a[BLOCK], b[BLOCK];
    for (int c = 0; c < BLOCK; c++) a[c] = _mm512_loadu_si512(rows[c] + g);
    for (int c = 0; c < BLOCK; c += 2) {
      b[c] = _mm512_unpacklo_epi32(a[c], a[c + 1]);
      b[c + 1] = _mm512_unpackhi_epi32(a[c], a[c + 1]);
    }
    for (int c = 0; c < BLOCK; c += 4) {
      a[c] = _mm512_unpacklo_epi64(b[c], b[c + 2]);
      a[c + 1] = _mm512_unpackhi_epi64(b[c], b[c + 2]);
      a[c + 2] = _mm512_unpacklo_epi64(b[c + 1], b[c + 3]);
      a[c + 3] = _mm512_unpackhi_epi64(b[c + 1], b[c + 3]);
    }
    // a[4q + t] holds numbers t, t + 4, t + 8, t + 12 of rows 4q … 4q + 3.
    for (int t = 0; t < 4; t++) {
      const __m512i even01 = _mm512_shuffle_i32x4(a[t], a[4 + t], 0x88), odd01 = _mm512_shuffle_i32x4(a[t], a[4 + t], 0xdd);
      const __m512i even23 = _mm512_shuffle_i32x4(a[8 + t], a[12 + t], 0x88);
      const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + t], a[12 + t], 0xdd);
      b[t] = _mm512_shuffle_i32x4(even01, even23, 0x88);
      b[t + 8] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
      b[t + 4] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
      b[t + 12] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
    for (int n = 0; n < BLOCK && g + n < groups; n++) _mm512_storeu_si512(to + (g + n) * stride, b[n]);
  }
#endif
}

}  // namespace nr
