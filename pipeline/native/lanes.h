// Vectors of the instruction set that this library is built for, and the functions of MoL on them.
//
// Arithmetic is written with the compiler's vector types; intrinsics do only what the types cannot. A block is sixteen
// columns (items); always BLOCKS blocks are worked on at once, so that a column's result never depends on how many
// others there are.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

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

#define NR_INLINE __attribute__((always_inline))

// body(0), … body(N - 1), each with a constant number: an array that is indexed by constants only is kept in registers.
template <class Body, int... NUMBERS>
NR_INLINE inline void each_of(Body body, std::integer_sequence<int, NUMBERS...>) {
  (body(std::integral_constant<int, NUMBERS>{}), ...);
}
template <int N, class Body>
NR_INLINE inline void each(Body body) {
  each_of(body, std::make_integer_sequence<int, N>{});
}

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

// The compiler makes two instructions of `a > b ? a : b`, a comparison and a selection; these functions are one.
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

// Writes the marked lanes one after the other; may write up to a vector's length. Returns the number of marked lanes.
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

// ---- exp and silu. e^x is 2^t; the whole part of t goes into the exponent's bits, a polynomial takes the rest.
//
// The quotient x / ln 2 is rounded, so that e^x has an error of |x| units in the last place. This is enough: where |x|
// is large, a weight e^x vanishes beside the largest weight, which is 1, and silu is nearly 0 or x itself.

// Coefficients of 2^r on [-1/2, 1/2], highest power first. Minimax: relative error 2e-8, or 8e-5 for half of the work.
constexpr float FINE[] = {1.53458124e-4f, 1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f,
                          2.40226462e-1f, 6.93147182e-1f, 1.0f};
constexpr float ROUGH[] = {5.51716685e-2f, 2.42611125e-1f, 6.93260968e-1f, 9.99928057e-1f};
// (ln 2)^n / n! from n = 12 down to 0: relative error 2e-16.
constexpr double FINEST[] = {2.5678435993488196e-11, 4.4455382718708101e-10, 7.0549116208011209e-9,
                             1.0178086009239699e-7,  1.3215486790144305e-6,  1.5252733804059838e-5,
                             1.5403530393381606e-4,  1.3333558146428441e-3,  9.6181291076284752e-3,
                             5.5504108664821576e-2,  2.4022650695910069e-1,  6.9314718055994529e-1, 1.0};

inline VF times_power(VF p, VF whole) { return (VF)((VI)p + ((VI)whole << 23)); }
inline VD times_power(VD p, VD whole) { return (VD)((VL)p + ((VL)whole << 52)); }

// Adding `magic` rounds to an integer and leaves it in the lowest bits.
template <class V, class Number, int N>
inline V exponential_by(V x, const Number (&coefficients)[N], Number magic, Number limit) {
  const V t = smaller(larger(x * (Number)1.4426950408889634, broadcast<V>(-limit)), broadcast<V>(limit));
  const V whole = t + magic, r = t - (whole - magic);
  V p = broadcast<V>(coefficients[0]);
#pragma GCC unroll 16
  for (int n = 1; n < N; n++) p = p * r + coefficients[n];
  return times_power(p, whole);
}

// Relative error about 1e-7 in float32, about 1e-15 in float64.
inline VF exponential(VF x) { return exponential_by(x, FINE, 12582912.0f, 126.0f); }
inline VD exponential(VD x) { return exponential_by(x, FINEST, 6755399441055744.0, 1022.0); }

template <class V>
inline V silu(V x) {
  return x / (exponential(-x) + 1);
}

// For bfloat16 scores: relative error about 1e-4.
inline VF rough_exponential(VF x) { return exponential_by(x, ROUGH, 12582912.0f, 126.0f); }

inline VF rough_silu(VF x) {
  VF denominator = rough_exponential(-x) + 1.0f;
#ifdef NR_AVX2
  return x / denominator;
#else
  return x * (VF)_mm512_rcp14_ps((__m512)denominator);
#endif
}

}  // namespace nr
