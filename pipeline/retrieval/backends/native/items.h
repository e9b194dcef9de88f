// The item side of a shard: a row per item, its components and then its gate, in two planes.
//
// The high plane is the row rounded to bfloat16, half up; the low plane is the rounding error, as a difference of
// bits. Together they are the exact float32 row in the memory of one, and bfloat16 scoring reads only the high plane.
#pragma once

#include "product.h"
#include "transpose.h"

namespace nr {

struct Items {
  const uint16_t* high;  // (N, stride)
  const int16_t* low;    // (N, stride)
  int64_t num_items;     // N
  int64_t stride;        // numbers from row to row, a multiple of 32 (64 bytes)
  int width;             // X · D + P, even

  // Writes an item's float32 row, and up to a vector's length beyond it.
  void row(int64_t item, float* to) const {
    typedef uint16_t Highs __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef int16_t Lows __attribute__((vector_size(VECTOR_BYTES / 2)));
    for (int n = 0; n < width; n += LANES<VI>) {
      const VI h = __builtin_convertvector(load<Highs>(high + item * stride + n), VI);
      const VI l = __builtin_convertvector(load<Lows>(low + item * stride + n), VI);
      store(to + n, (h << 16) + l);
    }
  }

  // Gathers the rows of 48 items as operand B: [blocks][groups][16].
  template <class K>
  void gather(const int32_t* at, typename K::Group* b) const {
    const int groups = width / K::PER_GROUP;
    for (int block = 0; block < BLOCKS; block++, at += BLOCK, b += (int64_t)groups * BLOCK) {
      if constexpr (K::PER_GROUP == 2) {
        const uint32_t* rows[BLOCK];
        for (int c = 0; c < BLOCK; c++) rows[c] = (const uint32_t*)(high + at[c] * stride);
        transpose(rows, groups, b, BLOCK);
      } else {
        thread_local std::vector<float> floats;
        floats.resize((size_t)BLOCK * (width + BLOCK));
        const uint32_t* rows[BLOCK];
        for (int c = 0; c < BLOCK; c++) {
          float* to = floats.data() + (size_t)c * (width + BLOCK);
          row(at[c], to);
          rows[c] = (const uint32_t*)to;
        }
        if constexpr (sizeof(typename K::Group) == 4) {
          transpose(rows, groups, (uint32_t*)b, BLOCK);
        } else {
          thread_local std::vector<uint32_t> narrow;
          narrow.resize((size_t)groups * BLOCK);
          transpose(rows, groups, narrow.data(), BLOCK);
          const uint32_t* from = narrow.data();
          for (int n = 0; n < groups * BLOCK; n += LANES<VF>) {
            const VF values = load<VF>(from + n);
            for (int lane = 0; lane < LANES<VF>; lane++) b[n + lane] = values[lane];
          }
        }
      }
    }
  }

  // Prefetches a row into the second-level cache: in the first it would push out the network's operands.
  template <class K>
  void prefetch(int64_t item) const {
    prefetch_row(high + item * stride);
    if constexpr (K::PER_GROUP == 1) prefetch_row(low + item * stride);
  }

  template <class T>
  void prefetch_row(const T* row) const {
    for (int n = 0; n < width; n += 32) _mm_prefetch((const char*)(row + n), _MM_HINT_T1);
  }
};

}  // namespace nr
