// The products of training: like product.h, but the rows of A may lie in any way, and sums may be added to a matrix.
//
// bfloat16 groups hold two numbers along the depth of a product. A matrix that is multiplied along its rows and along
// its columns is therefore kept twice: `paired`, two rows in a group, and `rows`, two columns in a group.
#pragma once

#include <type_traits>

#include "product.h"
#include "transpose.h"

namespace nr::training {

#ifdef NR_AVX2
typedef Float32 Kind;
constexpr int MOST_VECTORS = 2;  // of a row of sums in registers
#else
typedef Bf16 Kind;
constexpr int MOST_VECTORS = 4;
#endif
typedef Kind::Group Group;
constexpr int PER_GROUP = Kind::PER_GROUP;
constexpr int L = LANES<VF>;
constexpr int ROWS_UP = 4;    // rows of a product are a multiple of this
constexpr int UNIT = 16;      // numbers of pairs and of hidden units are rounded up to multiples of this
constexpr int BLOCK_UP = 32;  // and the number of items to multiples of this: two vectors of bfloat16 make one
constexpr int WIDE = 64;      // items that go through the network at once
#ifdef NR_AMX
constexpr int TILE_ROWS_READ = TILE - ROWS_UP;  // rows that a product may read behind the last of operand A
#else
constexpr int TILE_ROWS_READ = 0;
#endif

inline int rounded_up(int number, int to) { return (number + to - 1) / to * to; }

// Operand A: where its first group is, and how far it is to the next row and to the next group of a row.
struct Rows {
  const Group* from;
  int64_t to_row, to_group;
};

template <int R, int V>
using Tile = VF[R][V];
template <class Sums>  // of a reference to a tile
using TileOf = std::remove_reference_t<Sums>;
template <class Sums>
constexpr int TILE_ROWS = std::extent_v<TileOf<Sums>, 0>;
template <class Sums>
constexpr int TILE_VECTORS = std::extent_v<TileOf<Sums>, 1>;

// body(row, vector) for the vectors of every row, or of every `STEP`th row, of a tile.
template <class Sums, int STEP = 1, class Body>
NR_INLINE inline void each_vector(Body body) {
  each<TILE_ROWS<Sums> / STEP>([&](auto r) NR_INLINE {
    each<TILE_VECTORS<Sums>>([&](auto v) NR_INLINE { body(std::integral_constant<int, r * STEP>{}, v); });
  });
}

// Adds up R rows of V vectors, in registers.
template <int R, int V>
NR_INLINE inline void sum_tile(Rows a, const Group* b, int64_t b_stride, int depth, Tile<R, V>& sums) {
  each<R>([&](auto r) NR_INLINE { each<V>([&](auto v) NR_INLINE { sums[r][v] = VF{}; }); });
  for (int g = 0; g < depth; g++) {
    decltype(Kind::column(b)) columns[V];
    each<V>([&](auto v) NR_INLINE { columns[v] = Kind::column(b + g * b_stride + v * L); });
    each<R>([&](auto r) NR_INLINE {
      const auto factor = Kind::factor(a.from + r * a.to_row + g * a.to_group);
      each<V>([&](auto v) NR_INLINE { sums[r][v] = Kind::multiply_add(sums[r][v], factor, columns[v]); });
    });
  }
}

template <int R, int V, class Done>
inline void multiply_rows(Rows a, int first, int num_rows, const Group* b, int64_t b_stride, int depth, Done done) {
  int row = first;
  for (; row + R <= num_rows; row += R) {
    Tile<R, V> sums;
    sum_tile<R, V>({a.from + row * a.to_row, a.to_row, a.to_group}, b, b_stride, depth, sums);
    done(row, sums);
  }
  if constexpr (R > ROWS_UP)
    if (row < num_rows) multiply_rows<ROWS_UP, V>(a, row, num_rows, b, b_stride, depth, done);
}

#ifdef NR_AMX

static_assert(L == TILE, "a row of a tile is a vector");

inline bool fills_tiles(Rows a, int depth) { return a.to_group == 1 && depth % TILE == 0; }

// Adds a row of tiles, sixteen rows of A times V sixteens of columns of B, to tiles 0 to V - 1.
template <int V>
NR_INLINE inline void sum_in_tiles(Rows a, int row, const Group* b, int64_t b_stride, int depth) {
  for (int g = 0; g < depth; g += TILE) {
    tile_load<4>(a.from + row * a.to_row + g, a.to_row * sizeof(Group));
    each<V>([&](auto v) NR_INLINE {
      tile_load<5 + v % 2>(b + g * b_stride + v * L, b_stride * sizeof(Group));
      tile_dot_bf16<v, 4, 5 + v % 2>();
    });
  }
}

template <int V, class Done>
inline void multiply_in_tiles(Rows a, int num_rows, const Group* b, int64_t b_stride, int depth, Done done) {
  for (int row = 0; row < num_rows; row += TILE) {
    Tile<TILE, V> sums;
    each<V>([&](auto v) NR_INLINE { tile_zero<v>(); });
    sum_in_tiles<V>(a, row, b, b_stride, depth);
    each<V>([&](auto v) NR_INLINE { tile_store<v>(&sums[0][v], sizeof sums[0]); });
    for (int r = 0; r < std::min(TILE, num_rows - row); r += ROWS_UP)
      done(row + r, reinterpret_cast<Tile<ROWS_UP, V>&>(sums[r]));
  }
}

// C += A · B for whole tiles of C.
template <int V>
inline void add_in_tiles(Rows a, int num_rows, const Group* b, int64_t b_stride, int depth, float* c,
                         int64_t c_stride) {
  for (int row = 0; row < num_rows; row += TILE) {
    float* to = c + row * c_stride;
    each<V>([&](auto v) NR_INLINE { tile_load<v>(to + v * L, c_stride * sizeof(float)); });
    sum_in_tiles<V>(a, row, b, b_stride, depth);
    each<V>([&](auto v) NR_INLINE { tile_store<v>(to + v * L, c_stride * sizeof(float)); });
  }
}

#endif

// done(row, column, sums) for every tile of A · B; `columns` is a multiple of 32, or of 16 with HAS_ODD.
template <bool HAS_ODD = false, class Done>
inline void multiply(Rows a, int num_rows, const Group* b, int64_t b_stride, int columns, int depth, Done done) {
  int column = 0;
#ifdef NR_AMX
  if (fills_tiles(a, depth)) {
    for (int wide; column < columns; column += wide * L) {
      auto rest = [&](int row, auto& sums) NR_INLINE { done(row, column, sums); };
      wide = std::min((columns - column) / L, 4);
      if (wide == 4) multiply_in_tiles<4>(a, num_rows, b + column, b_stride, depth, rest);
      if (wide == 2) multiply_in_tiles<2>(a, num_rows, b + column, b_stride, depth, rest);
      if constexpr (HAS_ODD) {
        if (wide == 3) multiply_in_tiles<3>(a, num_rows, b + column, b_stride, depth, rest);
        if (wide == 1) multiply_in_tiles<1>(a, num_rows, b + column, b_stride, depth, rest);
      }
    }
    return;
  }
#endif
  for (; column + MOST_VECTORS * L <= columns; column += MOST_VECTORS * L)
    multiply_rows<ROWS_UP, MOST_VECTORS>(a, 0, num_rows, b + column, b_stride, depth,
                                         [&](int row, auto& sums) NR_INLINE { done(row, column, sums); });
#ifndef NR_AVX2
  const int left = (columns - column) / L;
  auto rest = [&](int row, auto& sums) NR_INLINE { done(row, column, sums); };
  if (left == 2) multiply_rows<2 * ROWS_UP, 2>(a, 0, num_rows, b + column, b_stride, depth, rest);
  if constexpr (HAS_ODD) {
    if (left == 3) multiply_rows<ROWS_UP, 3>(a, 0, num_rows, b + column, b_stride, depth, rest);
    if (left == 1) multiply_rows<2 * ROWS_UP, 1>(a, 0, num_rows, b + column, b_stride, depth, rest);
  }
#endif
}

// C += A · B.
inline void add_product(Rows a, int num_rows, const Group* b, int64_t b_stride, int columns, int depth, float* c,
                        int64_t c_stride) {
#ifdef NR_AMX
  if (fills_tiles(a, depth) && num_rows % TILE == 0) {
    int column = 0;
    for (; column + 4 * L <= columns; column += 4 * L)
      add_in_tiles<4>(a, num_rows, b + column, b_stride, depth, c + column, c_stride);
    for (; column < columns; column += L)
      add_in_tiles<1>(a, num_rows, b + column, b_stride, depth, c + column, c_stride);
    return;
  }
#endif
  multiply<true>(a, num_rows, b, b_stride, columns, depth, [&](int row, int column, auto& sums) NR_INLINE {
    each_vector<decltype(sums)>([&](auto r, auto v) NR_INLINE {
      float* to = c + (row + r) * c_stride + column + v * L;
      store(to, load<VF>(to) + sums[r][v]);
    });
  });
}

// Writes a tile in both forms, `width` columns in a row of each; without `rows` only in the first.
template <int R, int V>
NR_INLINE inline void keep(const VF (&values)[R][V], int width, Group* paired, Group* rows) {
#ifdef NR_AVX2
  each<R>([&](auto r) NR_INLINE {
    each<V>([&](auto v) NR_INLINE {
      store(paired + r * width + v * L, values[r][v]);
      if (rows) store(rows + r * width + v * L, values[r][v]);
    });
  });
#else
  static_assert(R % 2 == 0 && V % 2 == 0, "two rows, and two vectors, make one of bfloat16");
  // Words 0 to 31 are a row's, words 32 to 63 the next row's.
  alignas(64) static constexpr uint16_t FIRST[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(FIRST), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  each<R / 2>([&](auto pair) NR_INLINE {
    constexpr int r = 2 * pair;
    each<V / 2>([&](auto both) NR_INLINE {
      constexpr int v = 2 * both;
      const __m512i upper = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[r][v + 1], (__m512)values[r][v]);
      const __m512i lower = (__m512i)_mm512_cvtne2ps_pbh((__m512)values[r + 1][v + 1], (__m512)values[r + 1][v]);
      if (rows) {
        _mm512_storeu_si512(rows + (r * width + v * L) / 2, upper);
        _mm512_storeu_si512(rows + ((r + 1) * width + v * L) / 2, lower);
      }
      _mm512_storeu_si512(paired + pair * width + v * L, _mm512_permutex2var_epi16(upper, first, lower));
      _mm512_storeu_si512(paired + pair * width + (v + 1) * L, _mm512_permutex2var_epi16(upper, second, lower));
    });
  });
#endif
}

// Two rows of numbers from their paired form.
NR_INLINE inline void unpack(const Group* paired, [[maybe_unused]] int width, VF& first, VF& second) {
#ifdef NR_AVX2
  first = load<VF>(paired), second = load<VF>(paired + width);
#else
  const VI pairs = load<VI>(paired);
  first = first_of_pair(pairs), second = second_of_pair(pairs);
#endif
}

// Writes `num_rows` rows of `num_columns` groups, both multiples of 16, as columns.
inline void transpose(const Group* from, int num_rows, int num_columns, Group* to) {
#ifdef NR_AVX2
  for (int c = 0; c < num_columns; c++)
    for (int r = 0; r < num_rows; r++) to[(int64_t)c * num_rows + r] = from[(int64_t)r * num_columns + c];
#else
  const uint32_t* sixteen[BLOCK];
  for (int row = 0; row < num_rows; row += BLOCK) {
    for (int r = 0; r < BLOCK; r++) sixteen[r] = from + (int64_t)(row + r) * num_columns;
    nr::transpose(sixteen, num_columns, to + row, num_rows);
  }
#endif
}

template <int R, int V>
NR_INLINE inline void store_rows(const VF (&values)[R][V], float* to, int64_t stride) {
  each<R>([&](auto r) NR_INLINE { each<V>([&](auto v) NR_INLINE { store(to + r * stride + v * L, values[r][v]); }); });
}

// Adds the vectors of every row to one vector per row.
template <int R, int V>
NR_INLINE inline void add_row_sums(const VF (&values)[R][V], float* to) {
  each<R>([&](auto r) NR_INLINE {
    VF sum = load<VF>(to + r * L);
    each<V>([&](auto v) NR_INLINE { sum += values[r][v]; });
    store(to + r * L, sum);
  });
}

inline float sum_of(VF values) {
  float sum = 0;
  for (int lane = 0; lane < L; lane++) sum += values[lane];
  return sum;
}

}  // namespace nr::training
