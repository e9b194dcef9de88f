// One matrix product for everything: C[rows][48] = A[rows][groups] · B[groups][48].
//
// A is row-major; B comes in blocks of sixteen columns, [groups][16] each. A group is the part of the depth that
// one multiply-add takes: two bfloat16, four 8-bit integers, one float or one double. The sums of a few rows stay in
// registers and are handed to `done(row, sums)`. A column is summed in the same order wherever it stands.
#pragma once

#include "lanes.h"
#include "tiles.h"

namespace nr {

struct Bf16 {
  typedef VF Sum;
  typedef uint32_t Group;
  static constexpr int PER_GROUP = 2;
  typedef VI Factor;
  static Factor factor(const Group* a) { return broadcast<VI>((int32_t)*a); }
  static Sum multiply_add(Sum sum, Factor a, VI b) {
#ifdef NR_AVX2
    sum = first_of_pair(a) * first_of_pair(b) + sum;
    return second_of_pair(a) * second_of_pair(b) + sum;
#else
    return (VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  }
  static VI column(const Group* b) { return load<VI>(b); }
};

// A is unsigned (the signed value plus 128); the caller starts the sums at -128 times the column's sum.
struct Int8 {
  typedef VI Sum;
  typedef uint32_t Group;
  static constexpr int PER_GROUP = 4;
  typedef VI Factor;
  static Factor factor(const Group* a) { return broadcast<VI>((int32_t)*a); }
  static Sum multiply_add(Sum sum, Factor a, VI b) {
#ifdef NR_AVX2
    for (int byte = 0; byte < 4; byte++) sum += ((VI)((VU)a << (24 - 8 * byte) >> 24)) * ((b << (24 - 8 * byte)) >> 24);
    return sum;
#else
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#endif
  }
  static VI column(const Group* b) { return load<VI>(b); }
};

template <class V>
struct Real {
  typedef V Sum;
  typedef typename ScalarOf<V>::type Group;
  static constexpr int PER_GROUP = 1;
  typedef V Factor;
  static Factor factor(const Group* a) { return broadcast<V>(*a); }
  static Sum multiply_add(Sum sum, Factor a, V b) { return a * b + sum; }
  static V column(const Group* b) { return load<V>(b); }
};
typedef Real<VF> Float32;
typedef Real<VD> Float64;

// Rows whose sums fit the registers.
template <class K>
constexpr int ROWS_AT_ONCE = ACCUMULATORS / PARTS<typename K::Sum>;

#ifdef NR_AMX

template <class K, int C, int A, int B>
inline void tile_dot() {
  if constexpr (K::PER_GROUP == 2)
    tile_dot_bf16<C, A, B>();
  else
    tile_dot_int8<C, A, B>();
}

// The product in tiles, sixteen rows at a time; the rest of a depth that does not fill a tile goes through vectors.
template <class K, class Done>
inline void product_in_tiles(const typename K::Group* a, int row_stride, int num_rows, const typename K::Group* b,
                             int64_t block_stride, int num_groups, const typename K::Sum* start, Done done) {
  typedef typename K::Sum Sum;
  static_assert(BLOCKS == 3 && PARTS<Sum> == BLOCKS && TILE % ROWS_AT_ONCE<K> == 0 && ROWS % TILE == 0);
  const int in_tiles = num_groups / TILE * TILE;
  for (int row = 0; row < num_rows; row += TILE) {
    const typename K::Group* rows = a + (int64_t)row * row_stride;
    Sum sums[TILE][BLOCKS];
    if (start || !in_tiles)
      for (auto& of_row : sums)
        for (int p = 0; p < BLOCKS; p++) of_row[p] = start ? start[p] : Sum{};
    if (in_tiles) {
      if (start) {
        tile_load<0>(&sums[0][0], sizeof sums[0]);
        tile_load<1>(&sums[0][1], sizeof sums[0]);
        tile_load<2>(&sums[0][2], sizeof sums[0]);
      } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
      }
      for (int g = 0; g < in_tiles; g += TILE) {
        const typename K::Group* columns = b + (int64_t)g * BLOCK;
        tile_load<3>(rows + g, (int64_t)row_stride * 4);
        tile_load<4>(columns, BLOCK * 4);
        tile_dot<K, 0, 3, 4>();
        tile_load<5>(columns + block_stride, BLOCK * 4);
        tile_dot<K, 1, 3, 5>();
        tile_load<6>(columns + 2 * block_stride, BLOCK * 4);
        tile_dot<K, 2, 3, 6>();
      }
      tile_store<0>(&sums[0][0], sizeof sums[0]);
      tile_store<1>(&sums[0][1], sizeof sums[0]);
      tile_store<2>(&sums[0][2], sizeof sums[0]);
    }
    for (int g = in_tiles; g < num_groups; g++)
      for (int p = 0; p < BLOCKS; p++) {
        const auto column = K::column(b + p * block_stride + (int64_t)g * BLOCK);
        for (int r = 0; r < TILE; r++)
          sums[r][p] = K::multiply_add(sums[r][p], K::factor(rows + (int64_t)r * row_stride + g), column);
      }
    for (int r = 0; r < TILE; r += ROWS_AT_ONCE<K>)
      done(row + r, reinterpret_cast<const Sum(&)[ROWS_AT_ONCE<K>][BLOCKS]>(sums[r]));
  }
}

#endif

template <class K>
using Sums = typename K::Sum[ROWS_AT_ONCE<K>][PARTS<typename K::Sum>];

// Adds up ROWS_AT_ONCE rows. `sums` are registers when this is inlined.
template <class K>
NR_INLINE inline void accumulate(const typename K::Group* rows, int row_stride, const typename K::Group* b,
                                 int64_t block_stride, int num_groups, const typename K::Sum* start, Sums<K>& sums) {
  typedef typename K::Sum Sum;
  constexpr int R = ROWS_AT_ONCE<K>, P = PARTS<Sum>, PER_BLOCK = P / BLOCKS;
  each<R>([&](auto r) NR_INLINE { each<P>([&](auto p) NR_INLINE { sums[r][p] = start ? start[p] : Sum{}; }); });
  for (int g = 0; g < num_groups; g++) {
    decltype(K::column(b)) columns[P];
    each<P>([&](auto p) NR_INLINE {
      columns[p] = K::column(b + (p / PER_BLOCK) * block_stride + (int64_t)g * BLOCK + (p % PER_BLOCK) * LANES<Sum>);
    });
    each<R>([&](auto r) NR_INLINE {
      const auto factor = K::factor(rows + (int64_t)r * row_stride + g);
      each<P>([&](auto p) NR_INLINE { sums[r][p] = K::multiply_add(sums[r][p], factor, columns[p]); });
    });
  }
}

template <class K>
NR_INLINE inline void copy(const Sums<K>& from, Sums<K>& to) {
  each<ROWS_AT_ONCE<K>>([&](auto r) NR_INLINE {
    each<PARTS<typename K::Sum>>([&](auto p) NR_INLINE { to[r][p] = from[r][p]; });
  });
}

// `accumulate` as a function of its own, for a `done` that needs many registers itself: inlined together, the
// compiler would move the sums to memory in the inner loop.
template <class K>
__attribute__((noinline)) void accumulate_apart(const typename K::Group* rows, int row_stride,
                                                const typename K::Group* b, int64_t block_stride, int num_groups,
                                                Sums<K>& sums) {
  Sums<K> found;
  accumulate<K>(rows, row_stride, b, block_stride, num_groups, nullptr, found);
  copy<K>(found, sums);
}

// A bit for each of ROWS_AT_ONCE rows: whether one of the row's sums is above its threshold.
template <class K>
NR_INLINE inline uint32_t rows_above(const Sums<K>& sums, const typename K::Sum* thresholds) {
  uint32_t above = 0;
  each<ROWS_AT_ONCE<K>>([&](auto r) NR_INLINE {
    typename K::Sum top = sums[r][0];
    each<PARTS<typename K::Sum>>([&](auto p) NR_INLINE { top = larger(top, sums[r][p]); });
    above |= (uint32_t)(mask_above(top, thresholds[r]) != 0) << r;
  });
  return above;
}

template <class K, bool IS_APART = false, class Done>
inline void product(const typename K::Group* a, int row_stride, int num_rows, const typename K::Group* b,
                    int64_t block_stride, int num_groups, Done done) {
#ifdef NR_AMX
  if constexpr (K::PER_GROUP > 1)
    return product_in_tiles<K>(a, row_stride, num_rows, b, block_stride, num_groups, nullptr, done);
#endif
  for (int row = 0; row < num_rows; row += ROWS_AT_ONCE<K>) {
    Sums<K> sums;
    if constexpr (IS_APART)
      accumulate_apart<K>(a + (int64_t)row * row_stride, row_stride, b, block_stride, num_groups, sums);
    else
      accumulate<K>(a + (int64_t)row * row_stride, row_stride, b, block_stride, num_groups, nullptr, sums);
    done(row, sums);
  }
}

}  // namespace nr
