// Vectors of the instruction set that this library is built for, and the functions of MoL on them.
//
// Arithmetic is written with the compiler's vector types; only what they cannot say is an intrinsic. A block is sixteen
// columns (items); BLOCKS blocks are worked on at once, always as many, so that a column's result never depends on
// how many others there are.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace nr {

#ifdef NR_AVX2
constexpr int VECTOR_BYTES = 32;
constexpr int ACCUMULATORS = 12;  // vector registers that a product keeps its sums in
#else
constexpr int VECTOR_BYTES = 64;
constexpr int ACCUMULATORS = 24;
#endif
constexpr int BLOCK = 16;
constexpr int BLOCKS = 3;
constexpr int COLUMNS = BLOCK * BLOCKS;
#ifdef NR_AMX
constexpr int ROWS = 16;  // rows of a product are padded to a multiple of this
#else
constexpr int ROWS = 8;
#endif

typedef float VF __attribute__((vector_size(VECTOR_BYTES)));
typedef double VD __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t VI __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t VU __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t VL __attribute__((vector_size(VECTOR_BYTES)));

template <class V>
struct ScalarOf;
template <>
struct ScalarOf<VF> { typedef float type; };
template <>
struct ScalarOf<VD> { typedef double type; };
template <>
struct ScalarOf<VI> { typedef int32_t type; };

template <class V>
constexpr int LANES = VECTOR_BYTES / sizeof(typename ScalarOf<V>::type);
template <class V>
constexpr int PARTS = COLUMNS / LANES<V>;  // vectors of a row of a product

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class V>
inline V broadcast(typename ScalarOf<V>::type value) {
  return value - V{};
}

inline uint32_t mask_above(VF left, VF right) {
#ifdef NR_AVX2
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)left, (__m256)right, _CMP_GT_OQ));
#else
  return _mm512_cmp_ps_mask((__m512)left, (__m512)right, _CMP_GT_OQ);
#endif
}

inline uint32_t mask_above(VI left, VI right) {
#ifdef NR_AVX2
  return _mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)left, (__m256i)right));
#else
  return _mm512_cmpgt_epi32_mask((__m512i)left, (__m512i)right);
#endif
}

// The compiler makes a comparison and a selection of `a > b ? a : b`; these are one instruction.
#ifdef NR_AVX2
inline VF larger(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VD larger(VD a, VD b) { return (VD)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline VI larger(VI a, VI b) { return (VI)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline VF smaller(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
inline VD smaller(VD a, VD b) { return (VD)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
inline VF larger(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VD larger(VD a, VD b) { return (VD)_mm512_max_pd((__m512d)a, (__m512d)b); }
inline VI larger(VI a, VI b) { return (VI)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline VF smaller(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
inline VD smaller(VD a, VD b) { return (VD)_mm512_min_pd((__m512d)a, (__m512d)b); }
#endif

// Writes the marked lanes one after the other; may write up to a vector's length. Returns how many.
inline int compress(float* to, uint32_t mask, VF values) {
#ifdef NR_AVX2
  int n = 0;
  for (uint32_t m = mask; m; m &= m - 1) to[n++] = values[__builtin_ctz(m)];
  return n;
#else
  store(to, _mm512_maskz_compress_ps(mask, (__m512)values));  // compressing into memory is microcode on Zen 4
  return __builtin_popcount(mask);
#endif
}

inline int compress(int32_t* to, uint32_t mask, VI values) {
#ifdef NR_AVX2
  int n = 0;
  for (uint32_t m = mask; m; m &= m - 1) to[n++] = values[__builtin_ctz(m)];
  return n;
#else
  store(to, _mm512_maskz_compress_epi32(mask, (__m512i)values));
  return __builtin_popcount(mask);
#endif
}

inline VI lane_numbers() {
  VI numbers;
  for (int lane = 0; lane < LANES<VI>; lane++) numbers[lane] = lane;
  return numbers;
}

// ---- bfloat16: two values share 32 bits, the first in the low half.

inline uint32_t to_bf16(float value) {  // round half up: the rest then fits 16 signed bits (see items.h)
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits + 0x8000u) >> 16;
}

inline VF first_of_pair(VI pairs) { return (VF)(pairs << 16); }
inline VF second_of_pair(VI pairs) { return (VF)(pairs & (int32_t)0xffff0000); }

inline VI pack_pair(VF first, VF second) {
#ifdef NR_AVX2
  VU low = ((VU)first + 0x8000u) >> 16, high = ((VU)second + 0x8000u) & 0xffff0000u;
  return (VI)(low | high);
#else
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (VI)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#endif
}

// ---- exp and silu. float32 to about 1e-7, float64 to about 1e-15 relative.

inline VF exponential(VF x) {
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  x = smaller(larger(x, broadcast<VF>(-87.0f)), broadcast<VF>(88.0f));
  VF shifted = x * 1.44269504f + magic;
  VF n = shifted - magic;
  VF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VF p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  VI scale = ((VI)shifted - (VI)broadcast<VF>(magic) + 127) << 23;
  return p * (VF)scale;
}

inline VD exponential(VD x) {
  const double magic = 6755399441055744.0;  // 1.5 · 2^52
  x = smaller(larger(x, broadcast<VD>(-700.0)), broadcast<VD>(700.0));
  VD shifted = x * 1.4426950408889634074 + magic;
  VD n = shifted - magic;
  VD r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  VD p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  VL scale = ((VL)shifted - (VL)broadcast<VD>(magic) + 1023) << 52;
  return p * (VD)scale;
}

template <class V>
inline V silu(V x) {
  return x / (exponential(-x) + 1);
}

// For bfloat16 scores: to about 1e-4, a third of the work.
inline VF rough_exponential(VF x) {
  const float magic = 12582912.0f;
  VF t = smaller(larger(x * 1.44269504f, broadcast<VF>(-126.0f)), broadcast<VF>(126.0f));
  VF shifted = t + magic;
  VF r = t - (shifted - magic);
  VF p = r * 5.5826318e-2f + 2.4264008e-1f;  // 2^r on [-1/2, 1/2]
  p = p * r + 6.9314718e-1f;
  p = p * r + 9.9992448e-1f;
  VI scale = (VI)shifted << 23;
  return (VF)((VI)p + scale);
}

inline VF rough_silu(VF x) {
  VF denominator = rough_exponential(-x) + 1.0f;
#ifdef NR_AVX2
  return x / denominator;
#else
  return x * (VF)_mm512_rcp14_ps((__m512)denominator);
#endif
}

}  // namespace nr
