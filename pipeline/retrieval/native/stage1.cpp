// Stage 1: for each query the items with the largest inner products, without ever writing queries × items scores.
//
// A tile of queries meets a chunk of items that stays in the cache; a score is compared with its query's threshold in
// the register where it was summed, and only what is above it is stored.
#include "product.h"
#include "reservoir.h"
#include "threads.h"

namespace nr {

constexpr int ROOM = 3;               // of a reservoir, as a multiple of what is kept
constexpr int QUERY_TILE = 256;       // at most; a thread's queries and reservoirs
constexpr int CHUNK_BYTES = 24 << 10;  // of items: most of the first-level cache

// Items in blocks of sixteen columns, padded with blocks of zeros to whole groups of BLOCKS.
inline int64_t num_blocks(int64_t num_items) { return (num_items + COLUMNS - 1) / COLUMNS * BLOCKS; }

template <class K>
struct Stage1 {
  typedef typename K::Group Group;
  typedef typename K::Sum Sum;
  const Group* queries;  // (num_queries, groups), padded to a multiple of ROWS
  int64_t num_queries;
  const Group* table;       // [blocks][groups][16]
  const int32_t* starts;    // [blocks][16]: 8-bit tables only
  const uint16_t* allowed;  // [blocks]: a bit per item; also says which columns are padding
  int64_t num_items;
  int groups, num_kept;
  const float* factors;  // of the scores of each query, or null
  const int64_t* excluded_offsets;
  const int32_t* excluded;
  float* scores;   // (num_queries, num_kept)
  int64_t* items;  // (num_queries, num_kept)

  void tile(int64_t low, int64_t high, std::vector<Reservoir>& reservoirs, std::vector<Sum>& thresholds) const {
    const int n = (int)(high - low), padded = (n + ROWS - 1) / ROWS * ROWS;
    for (int q = 0; q < padded; q++) {
      const bool is_query = q < n;
      Excluded mine{nullptr, nullptr};
      if (is_query) mine = {excluded + excluded_offsets[low + q], excluded + excluded_offsets[low + q + 1]};
      if (is_query) reservoirs[q].reset(num_kept, ROOM, lowest(), mine);
      thresholds[q] = limit(is_query ? lowest() : INFINITY);
    }
    const int64_t blocks = num_blocks(num_items), block_size = (int64_t)groups * BLOCK;
    int64_t chunk = CHUNK_BYTES / (block_size * (int64_t)sizeof(Group)) / BLOCKS * BLOCKS;
    chunk = std::max<int64_t>(chunk, BLOCKS);
    for (int64_t first = 0; first < blocks; first += chunk)
      for (int q = 0; q < padded; q += ROWS)
        for (int64_t b = first; b < std::min(blocks, first + chunk); b += BLOCKS)
          meet(low, q, b, block_size, reservoirs.data(), thresholds.data());
    for (int q = 0; q < n; q++) {
      const float factor = factors ? factors[low + q] : 1.0f;
      reservoirs[q].finish(factor, scores + (low + q) * num_kept, items + (low + q) * num_kept);
    }
  }

 private:
  static float lowest() { return -INFINITY; }
  static VF limit_of(float threshold, VF) { return broadcast<VF>(threshold); }
  static VI limit_of(float threshold, VI) {
    const float most = 2147483520.0f;
    return broadcast<VI>((int32_t)std::max(-most, std::min(most, threshold)));
  }
  static Sum limit(float threshold) { return limit_of(threshold, Sum{}); }
  static VF as_float(VF values) { return values; }
  static VF as_float(VI values) { return __builtin_convertvector(values, VF); }

  void meet(int64_t low, int q, int64_t b, int64_t block_size, Reservoir* reservoirs, Sum* thresholds) const {
    constexpr int PARTS_HERE = PARTS<Sum>, LANES_HERE = LANES<Sum>, PER_BLOCK = BLOCK / LANES_HERE;
    Sum start[PARTS_HERE];
    if (starts)
      for (int p = 0; p < PARTS_HERE; p++) start[p] = load<Sum>(starts + b * BLOCK + p * LANES_HERE);
    product<K>(queries + (low + q) * groups, groups, ROWS, table + b * block_size, block_size, groups,
               starts ? start : nullptr, [&](int row, const auto& sums) {
                 constexpr int R = ROWS_AT_ONCE<K>;
#pragma GCC unroll 8
                 for (int r = 0; r < R; r++) {
                   const Sum threshold = thresholds[q + row + r];
                   Sum top = sums[r][0];
#pragma GCC unroll 12
                   for (int p = 1; p < PARTS_HERE; p++) top = larger(top, sums[r][p]);
                   if (__builtin_expect(mask_above(top, threshold) == 0, 1)) continue;
                   Reservoir& reservoir = reservoirs[q + row + r];
                   for (int p = 0; p < PARTS_HERE; p++) {
                     const uint32_t bits = allowed[b + p / PER_BLOCK] >> (p % PER_BLOCK * LANES_HERE);
                     const uint32_t mask = mask_above(sums[r][p], threshold) & bits;
                     if (mask)
                       reservoir.add(mask, as_float(sums[r][p]),
                                     lane_numbers() + (int32_t)(b * BLOCK + p * LANES_HERE));
                   }
                   thresholds[q + row + r] = limit(reservoir.threshold());
                 }
               });
  }
};

template <class K>
static void run_stage1(const Stage1<K>& stage, int num_threads) {
  int64_t tile = QUERY_TILE;  // smaller when there are too few queries for all threads
  while (tile > ROWS && (stage.num_queries + tile - 1) / tile < 2 * num_threads) tile /= 2;
  for_tiles((stage.num_queries + tile - 1) / tile, num_threads, [&] {
    return [&, reservoirs = std::vector<Reservoir>(tile), thresholds = std::vector<typename K::Sum>(tile)](
               int64_t number) mutable {
      stage.tile(number * tile, std::min(stage.num_queries, (number + 1) * tile), reservoirs, thresholds);
    };
  });
}

// A table or queries of any kind as groups: rows of float32 padded with zeros. dtype 0 float32, 1 bfloat16, 2 int8.
static uint32_t group_of(const float* row, int dim, int g, int dtype, float scale, int offset) {
  uint32_t group = 0;
  if (dtype == 0) {
    std::memcpy(&group, row + g, 4);
  } else if (dtype == 1) {
    for (int e = 0; e < 2 && 2 * g + e < dim; e++) group |= to_bf16(row[2 * g + e]) << (16 * e);
  } else {
    for (int e = 0; e < 4; e++) {
      const float value = 4 * g + e < dim ? row[4 * g + e] : 0.0f;
      const int rounded = (int)std::lrint(std::max(-127.0f, std::min(127.0f, value * scale)));
      group |= (uint32_t)((rounded + offset) & 255) << (8 * e);
    }
  }
  return group;
}

}  // namespace nr

using namespace nr;

extern "C" {

// What rows of a product are padded to: a model's weights must be.
int nr_rows() { return ROWS; }

int64_t nr_num_blocks(int64_t num_items) { return num_blocks(num_items); }

// rows (num_items, dim) float32 -> table [blocks][groups][16]; starts [blocks][16] for int8; both are filled whole.
void nr_pack_table(const float* rows, int64_t num_items, int64_t row_stride, int dim, int groups, int dtype,
                   float scale, uint32_t* table, int32_t* starts) {
  for (int64_t b = 0; b < num_blocks(num_items); b++)
    for (int c = 0; c < BLOCK; c++) {
      const int64_t item = b * BLOCK + c;
      int32_t sum = 0;
      for (int g = 0; g < groups; g++) {
        const uint32_t group = item < num_items ? group_of(rows + item * row_stride, dim, g, dtype, scale, 0) : 0;
        table[(b * groups + g) * BLOCK + c] = group;
        for (int e = 0; e < 4; e++) sum += (int8_t)(group >> (8 * e));
      }
      if (dtype == 2) starts[b * BLOCK + c] = -128 * sum;
    }
}

// queries (num_queries, dim) float32 against a packed table; `query_scales` for int8 (what a query is multiplied by).
void nr_stage1(const float* queries, int64_t num_queries, int dim, const uint32_t* table, const int32_t* starts,
               const uint16_t* allowed, int64_t num_items, int groups, int dtype, const float* query_scales,
               const float* factors, int num_kept, const int64_t* excluded_offsets, const int32_t* excluded,
               int num_threads, float* scores, int64_t* items) {
  const int64_t padded = (num_queries + ROWS - 1) / ROWS * ROWS + ROWS;
  std::vector<uint32_t> packed(padded * groups);
  for (int64_t q = 0; q < num_queries; q++)
    for (int g = 0; g < groups; g++)
      packed[q * groups + g] =
          group_of(queries + q * dim, dim, g, dtype, query_scales ? query_scales[q] : 0.0f, dtype == 2 ? 128 : 0);
  auto run = [&](auto kind, const auto* a, const auto* b) {
    typedef decltype(kind) K;
    run_stage1(Stage1<K>{a, num_queries, b, starts, allowed, num_items, groups, num_kept, factors, excluded_offsets,
                         excluded, scores, items},
               num_threads);
  };
  if (dtype == 0)
    run(Float32{}, (const float*)packed.data(), (const float*)table);
  else if (dtype == 1)
    run(Bf16{}, packed.data(), table);
  else
    run(Int8{}, packed.data(), table);
}
}
