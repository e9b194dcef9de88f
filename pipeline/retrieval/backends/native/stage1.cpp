// Stage 1: for each query the items with the largest inner products, without ever writing queries × items scores.
//
// A tile of queries meets a chunk of items that stays in the cache; a score is compared with its query's threshold in
// the register where it was summed, and only what is above it is stored. The threshold begins where a sample of the
// items says that the best will be, lowered so far that it nearly never is too high; where it was, the query meets all
// items again without it.
#include "product.h"
#include "reservoir.h"
#include "threads.h"

namespace nr {

constexpr int ROOM = 3;               // of a reservoir, as a multiple of what is kept
constexpr int QUERY_TILE = 256;       // at most; a thread's queries and reservoirs
constexpr int CHUNK_BYTES = 24 << 10;  // of items: most of the first-level cache
constexpr int SAMPLE_STEP = 32;       // one group of COLUMNS items in so many is sampled
constexpr int SAMPLED_ITEMS = 4;      // at least, for each that the threshold leaves above it

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
    std::vector<float> floors(padded, INFINITY);  // of a query that is not searched for
    std::fill(floors.begin(), floors.begin() + n, lowest());
    if (const int num_sampled = above_threshold()) {
      pass(low, floors, num_sampled, SAMPLE_STEP, reservoirs, thresholds);
      for (int q = 0; q < n; q++) floors[q] = reservoirs[q].worst();
    }
    for (bool is_done = false; !is_done;) {
      pass(low, floors, num_kept, 1, reservoirs, thresholds);
      is_done = true;
      for (int q = 0; q < n; q++) {
        if (floors[q] == INFINITY) continue;
        if (floors[q] > lowest() && !reservoirs[q].is_full()) {
          floors[q] = lowest();
          is_done = false;
          continue;
        }
        const float factor = factors ? factors[low + q] : 1.0f;
        reservoirs[q].finish(factor, scores + (low + q) * num_kept, items + (low + q) * num_kept);
        floors[q] = INFINITY;
      }
    }
  }

 private:
  // How many sampled items are to be above the first threshold; 0 where sampling saves nothing. The chance that as many
  // of the best are sampled (a Poisson variable) is 1 to 3 in 10,000.
  int above_threshold() const {
    const double expected = (double)num_kept / SAMPLE_STEP;
    const int above = (int)std::ceil(expected + 3.5 * std::sqrt(expected) + 2);
    return expected >= 1 && num_items >= (int64_t)above * SAMPLED_ITEMS * SAMPLE_STEP ? above : 0;
  }

  // The queries meet one group of COLUMNS items in `step`.
  void pass(int64_t low, const std::vector<float>& floors, int num_wanted, int step, std::vector<Reservoir>& reservoirs,
            std::vector<Sum>& thresholds) const {
    const int padded = (int)floors.size();
    for (int q = 0; q < padded; q++) {
      thresholds[q] = limit(floors[q]);
      if (floors[q] < INFINITY)
        reservoirs[q].reset(num_wanted, ROOM, floors[q],
                            {excluded + excluded_offsets[low + q], excluded + excluded_offsets[low + q + 1]});
    }
    const int64_t blocks = num_blocks(num_items), block_size = (int64_t)groups * BLOCK, stride = (int64_t)step * BLOCKS;
    const int64_t at_once = std::max<int64_t>(1, CHUNK_BYTES / (block_size * (int64_t)sizeof(Group)) / BLOCKS);
    for (int64_t first = 0; first < blocks; first += at_once * stride)
      for (int q = 0; q < padded; q += ROWS) {
        const bool is_wanted = std::any_of(&floors[q], &floors[q] + ROWS, [](float f) { return f < INFINITY; });
        const int64_t last = std::min(blocks, first + at_once * stride);
        if (is_wanted) meet(low, q, first, last, stride, reservoirs.data(), thresholds.data());
      }
  }

  static float lowest() { return -INFINITY; }
  static VF limit_of(float threshold, VF) { return broadcast<VF>(threshold); }
  static VI limit_of(float threshold, VI) {
    const float most = 2147483520.0f;
    return broadcast<VI>((int32_t)std::max(-most, std::min(most, threshold)));
  }
  static Sum limit(float threshold) { return limit_of(threshold, Sum{}); }
  static VF as_float(VF values) { return values; }
  static VF as_float(VI values) { return __builtin_convertvector(values, VF); }

  // ROWS queries meet the groups of items from block `first` on, one in so many.
  void meet(int64_t low, int q, int64_t first, int64_t last, int64_t stride, Reservoir* reservoirs,
            Sum* thresholds) const {
#ifdef NR_AMX
    if constexpr (K::PER_GROUP > 1) {
      const int64_t block_size = (int64_t)groups * BLOCK;
      for (int64_t b = first; b < last; b += stride) {
        Sum start[PARTS<Sum>];
        product_in_tiles<K>(queries + (low + q) * groups, groups, ROWS, table + b * block_size, block_size, groups,
                            starting_sums(b, start), [&](int row, const Sums<K>& sums) {
                              keep(sums, rows_above<K>(sums, thresholds + q + row), b, reservoirs + q + row,
                                   thresholds + q + row);
                            });
      }
      return;
    }
#endif
    for (int row = q; row < q + ROWS; row += ROWS_AT_ONCE<K>)
      for (int64_t b = first; b < last; b += stride) {
        Sums<K> sums;
        uint32_t above = 0;
        b = next_above(queries + (low + row) * groups, b, last, stride, thresholds + row, sums, above);
        keep(sums, above, b, reservoirs + row, thresholds + row);
      }
  }

  // The first group of items of which a query finds one above its threshold, with the sums of the group and a bit for
  // each such query; `last` when there is none. By itself, so that the sums stay in registers.
  __attribute__((noinline)) int64_t next_above(const Group* rows, int64_t b, int64_t last, int64_t stride,
                                               const Sum* thresholds, Sums<K>& sums, uint32_t& above) const {
    const int64_t block_size = (int64_t)groups * BLOCK;
    for (; b < last; b += stride) {
      Sums<K> found;
      Sum start[PARTS<Sum>];
      accumulate<K>(rows, groups, table + b * block_size, block_size, groups, starting_sums(b, start), found);
      above = rows_above<K>(found, thresholds);
      if (above) {
        copy<K>(found, sums);
        return b;
      }
    }
    return last;
  }

  NR_INLINE const Sum* starting_sums(int64_t b, Sum* start) const {
    if (!starts) return nullptr;
    each<PARTS<Sum>>([&](auto p) NR_INLINE { start[p] = load<Sum>(starts + b * BLOCK + p * LANES<Sum>); });
    return start;
  }

  // Adds what is above the thresholds of the marked rows to their reservoirs, and raises the thresholds.
  void keep(const Sums<K>& sums, uint32_t above, int64_t b, Reservoir* reservoirs, Sum* thresholds) const {
    constexpr int LANES_HERE = LANES<Sum>, PER_BLOCK = BLOCK / LANES_HERE;
    for (; above; above &= above - 1) {
      const int r = __builtin_ctz(above);
      for (int p = 0; p < PARTS<Sum>; p++) {
        const uint32_t bits = allowed[b + p / PER_BLOCK] >> (p % PER_BLOCK * LANES_HERE);
        const uint32_t mask = mask_above(sums[r][p], thresholds[r]) & bits;
        if (mask)
          reservoirs[r].add(mask, as_float(sums[r][p]), lane_numbers() + (int32_t)(b * BLOCK + p * LANES_HERE));
      }
      thresholds[r] = limit(reservoirs[r].threshold());
    }
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
