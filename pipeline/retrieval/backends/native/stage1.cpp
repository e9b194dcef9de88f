// Stage 1: for each query the items with the largest inner products, without ever writing queries × items scores.
//
// A tile of queries meets a chunk of items that stays in the cache; a score is compared with its query's threshold in
// the register where it was summed, and only a score above it is stored. The first threshold comes from a sample of
// the items and is so low that it is almost never too high; if it was, the query meets all items again without it.
#include "product.h"
#include "reservoir.h"
#include "threads.h"

namespace nr {

constexpr int ROOM = 3;                // a reservoir holds up to ROOM × num_kept items
constexpr int QUERY_TILE = 256;        // the most queries that a thread works on at once
constexpr int CHUNK_BYTES = 24 << 10;  // of items that a tile of queries meets: most of the first-level cache
constexpr int SAMPLE_STEP = 32;        // every 32nd group of COLUMNS items is sampled
constexpr int SAMPLED_ITEMS = 4;       // the least number of sampled items per item above the first threshold

// Items in blocks of sixteen columns, padded with blocks of zeros to whole groups of BLOCKS.
inline int64_t num_blocks(int64_t num_items) { return (num_items + COLUMNS - 1) / COLUMNS * BLOCKS; }

enum Dtype { FLOAT32, BFLOAT16, INT8 };

// The items' vectors, in groups of one, two or four numbers.
struct Table {
  const uint32_t* groups;  // [blocks][num_groups][16]
  const int32_t* starts;   // [blocks][16]: where the sums of 8-bit groups start, else null
  int64_t num_items;
  int num_groups, dtype;
};

// The queries' vectors.
struct Vectors {
  const float* rows;  // (num_queries, dim)
  int64_t num_queries;
  int dim;
  const float* scales;   // (num_queries,): a query's numbers times this become 8-bit ones, else null
  const float* factors;  // (num_queries,): 8-bit sums times this become scores, else null
};

template <class K>
struct Stage1 {
  typedef typename K::Group Group;
  typedef typename K::Sum Sum;
  const Group* queries;  // (num_queries, table.num_groups), padded to a multiple of ROWS
  Vectors vectors;
  Table table;
  Mask mask;
  Best best;

  void tile(int64_t low, int64_t high, std::vector<Reservoir>& reservoirs, std::vector<Sum>& thresholds) const {
    const int n = (int)(high - low), padded = (n + ROWS - 1) / ROWS * ROWS;
    std::vector<float> floors(padded, INFINITY);  // INFINITY: the query is done, or is padding
    std::fill(floors.begin(), floors.begin() + n, lowest());
    if (const int num_sampled = above_threshold()) {
      pass(low, floors, num_sampled, SAMPLE_STEP, reservoirs, thresholds);
      for (int q = 0; q < n; q++) floors[q] = reservoirs[q].worst();
    }
    for (bool is_done = false; !is_done;) {
      pass(low, floors, best.num_kept, 1, reservoirs, thresholds);
      is_done = true;
      for (int q = 0; q < n; q++) {
        if (floors[q] == INFINITY) continue;
        if (floors[q] > lowest() && !reservoirs[q].is_full()) {
          floors[q] = lowest();
          is_done = false;
          continue;
        }
        reservoirs[q].finish(vectors.factors ? vectors.factors[low + q] : 1.0f, low + q, best);
        floors[q] = INFINITY;
      }
    }
  }

 private:
  int64_t block_size() const { return (int64_t)table.num_groups * BLOCK; }
  const Group* block(int64_t b) const { return reinterpret_cast<const Group*>(table.groups) + b * block_size(); }
  const Group* query(int64_t q) const { return queries + q * table.num_groups; }

  // The number of sampled items that the first threshold leaves above it; 0 where sampling saves nothing. It is
  // too high when at least as many of the best num_kept are sampled (a Poisson variable): 1 to 3 times in 10,000.
  int above_threshold() const {
    const double expected = (double)best.num_kept / SAMPLE_STEP;
    const int above = (int)std::ceil(expected + 3.5 * std::sqrt(expected) + 2);
    return expected >= 1 && table.num_items >= (int64_t)above * SAMPLED_ITEMS * SAMPLE_STEP ? above : 0;
  }

  // The queries meet every `step`-th group of COLUMNS items.
  void pass(int64_t low, const std::vector<float>& floors, int num_wanted, int step, std::vector<Reservoir>& reservoirs,
            std::vector<Sum>& thresholds) const {
    const int padded = (int)floors.size();
    for (int q = 0; q < padded; q++) {
      thresholds[q] = limit(floors[q]);
      if (floors[q] < INFINITY)
        reservoirs[q].reset(num_wanted, ROOM, floors[q], mask.excluded_from(low + q));
    }
    const int64_t blocks = num_blocks(table.num_items), stride = (int64_t)step * BLOCKS;
    const int64_t at_once = std::max<int64_t>(1, CHUNK_BYTES / (block_size() * (int64_t)sizeof(Group)) / BLOCKS);
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

  // ROWS queries meet the groups of items that begin at blocks `first`, `first` + `stride`, …, before `last`.
  void meet(int64_t low, int q, int64_t first, int64_t last, int64_t stride, Reservoir* reservoirs,
            Sum* thresholds) const {
#ifdef NR_AMX
    if constexpr (K::PER_GROUP > 1) {
      for (int64_t b = first; b < last; b += stride) {
        Sum start[PARTS<Sum>];
        product_in_tiles<K>(query(low + q), table.num_groups, ROWS, block(b), block_size(), table.num_groups,
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
        b = next_above(query(low + row), b, last, stride, thresholds + row, sums, above);
        keep(sums, above, b, reservoirs + row, thresholds + row);
      }
  }

  // Finds the first group with an item above the threshold of a query; fills the group's sums and a bit for each query
  // that has one; returns `last` when there is none. A function of its own, so that the sums stay in registers.
  __attribute__((noinline)) int64_t next_above(const Group* rows, int64_t b, int64_t last, int64_t stride,
                                               const Sum* thresholds, Sums<K>& sums, uint32_t& above) const {
    for (; b < last; b += stride) {
      Sums<K> these;
      Sum start[PARTS<Sum>];
      accumulate<K>(rows, table.num_groups, block(b), block_size(), table.num_groups, starting_sums(b, start), these);
      above = rows_above<K>(these, thresholds);
      if (above) {
        copy<K>(these, sums);
        return b;
      }
    }
    return last;
  }

  NR_INLINE const Sum* starting_sums(int64_t b, Sum* start) const {
    if (!table.starts) return nullptr;
    each<PARTS<Sum>>([&](auto p) NR_INLINE { start[p] = load<Sum>(table.starts + b * BLOCK + p * LANES<Sum>); });
    return start;
  }

  // Adds the items above the thresholds of the marked rows to their reservoirs, and raises the thresholds.
  void keep(const Sums<K>& sums, uint32_t above, int64_t b, Reservoir* reservoirs, Sum* thresholds) const {
    constexpr int LANES_HERE = LANES<Sum>, PER_BLOCK = BLOCK / LANES_HERE;
    for (; above; above &= above - 1) {
      const int r = __builtin_ctz(above);
      for (int p = 0; p < PARTS<Sum>; p++) {
        const uint32_t allowed = mask.allowed[b + p / PER_BLOCK] >> (p % PER_BLOCK * LANES_HERE);
        const uint32_t kept = mask_above(sums[r][p], thresholds[r]) & allowed;
        if (kept)
          reservoirs[r].add(kept, as_float(sums[r][p]), lane_numbers() + (int32_t)(b * BLOCK + p * LANES_HERE));
      }
      thresholds[r] = limit(reservoirs[r].threshold());
    }
  }
};

template <class K>
static void run_stage1(const Stage1<K>& stage, int num_threads) {
  int64_t tile = QUERY_TILE;  // smaller when there are too few queries for all threads
  const int64_t num_queries = stage.vectors.num_queries;
  while (tile > ROWS && (num_queries + tile - 1) / tile < 2 * num_threads) tile /= 2;
  for_tiles((num_queries + tile - 1) / tile, num_threads, [&] {
    return [&, reservoirs = std::vector<Reservoir>(tile), thresholds = std::vector<typename K::Sum>(tile)](
               int64_t number) mutable {
      stage.tile(number * tile, std::min(num_queries, (number + 1) * tile), reservoirs, thresholds);
    };
  });
}

// Group g of a row of float32, padded with zeros; 8-bit numbers are the row's times `scale`, plus `offset`.
static uint32_t group_of(const float* row, int dim, int g, int dtype, float scale, int offset) {
  uint32_t group = 0;
  if (dtype == FLOAT32) {
    std::memcpy(&group, row + g, 4);
  } else if (dtype == BFLOAT16) {
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

int64_t nr_num_blocks(int64_t num_items) { return num_blocks(num_items); }

// Fills the groups and the starts of a table from rows (num_items, dim) of float32; 8-bit numbers are times `scale`.
void nr_pack_table(const float* rows, int dim, float scale, const Table* table, uint32_t* groups, int32_t* starts) {
  for (int64_t b = 0; b < num_blocks(table->num_items); b++)
    for (int c = 0; c < BLOCK; c++) {
      const int64_t item = b * BLOCK + c;
      int32_t sum = 0;
      for (int g = 0; g < table->num_groups; g++) {
        const bool is_item = item < table->num_items;
        const uint32_t group = is_item ? group_of(rows + item * dim, dim, g, table->dtype, scale, 0) : 0;
        groups[(b * table->num_groups + g) * BLOCK + c] = group;
        for (int e = 0; e < 4; e++) sum += (int8_t)(group >> (8 * e));
      }
      if (starts) starts[b * BLOCK + c] = -128 * sum;
    }
}

// Finds the items of the table with the largest inner products with each query.
void nr_stage1(const Vectors* queries, const Table* table, const Mask* mask, int num_threads, const Best* best) {
  const int groups = table->num_groups, dim = queries->dim, offset = table->dtype == INT8 ? 128 : 0;
  const int64_t padded = (queries->num_queries + ROWS - 1) / ROWS * ROWS + ROWS;
  std::vector<uint32_t> packed(padded * groups);
  for (int64_t q = 0; q < queries->num_queries; q++) {
    const float scale = queries->scales ? queries->scales[q] : 0.0f;
    for (int g = 0; g < groups; g++)
      packed[q * groups + g] = group_of(queries->rows + q * dim, dim, g, table->dtype, scale, offset);
  }
  auto run = [&](auto kind) {
    typedef decltype(kind) K;
    run_stage1(Stage1<K>{(const typename K::Group*)packed.data(), *queries, *table, *mask, *best}, num_threads);
  };
  if (table->dtype == FLOAT32)
    run(Float32{});
  else if (table->dtype == BFLOAT16)
    run(Bf16{});
  else
    run(Int8{});
}
}
