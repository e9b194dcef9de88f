// Stage 2, the scoring of candidates, and the exact scan of all items.
#include "mol.h"
#include "reservoir.h"
#include "threads.h"

namespace nr {

constexpr int SCAN_QUERIES = 32;  // the most queries that share a chunk of items in the exact scan
constexpr int SCAN_ROOM = 2;      // items in a reservoir, as a multiple of num_kept

struct Queries {
  const float* components;  // (num_queries, Q, D)
  const float* gates;       // (num_queries, P)
  int64_t num_queries;
};

// How far the exact scan goes for each query.
struct Limits {
  const float* floors;   // (num_queries,): scores below are not kept
  const float* margins;  // (num_queries,): how far rounding to bfloat16 may have moved a logit
  int64_t max_scored;    // items per query
};

template <class K>
static void score_pairs(const Model& model, const Items& items, const Queries& queries, const int64_t* at,
                        int64_t per_query, int num_threads, float* scores) {
  const int64_t query_size = (int64_t)model.query_components * model.width;
  for_tiles(queries.num_queries, num_threads, [&] {
    return [&, network = PairNetwork<K>(model), wanted = std::vector<int32_t>(per_query + COLUMNS),
            places = std::vector<int64_t>(per_query)](int64_t q) mutable {
      const int64_t* mine = at + q * per_query;
      float* out = scores + q * per_query;
      int64_t n = 0;
      for (int64_t m = 0; m < per_query; m++) {
        out[m] = -INFINITY;
        if (mine[m] >= 0) wanted[n] = (int32_t)mine[m], places[n++] = m;
      }
      if (!n) return;
      for (int c = 0; c < COLUMNS; c++) wanted[n + c] = wanted[n - 1];  // fills the last step
      network.set_query(queries.components + q * query_size, queries.gates + q * model.pairs());
      for (int64_t m = 0; m < std::min<int64_t>(n, COLUMNS); m++) items.prefetch<K>(wanted[m]);
      for (int64_t first = 0; first < n; first += COLUMNS) {
        for (int64_t m = first + COLUMNS; m < std::min(n, first + 2 * COLUMNS); m++) items.prefetch<K>(wanted[m]);
        float found[COLUMNS];
        network.score(items, wanted.data() + first, found);
        for (int64_t m = first; m < std::min(n, first + COLUMNS); m++) out[places[m]] = found[m - first];
      }
    };
  });
}

// Scans all items for a tile of queries. A score is a weighted mean of logits, so an item is skipped when its largest
// bfloat16 logit, plus the margin for rounding, does not reach the query's threshold.
class Scan {
 public:
  Scan(const Model& model, const Items& items, const Queries& queries, const Mask& mask, const Limits& limits,
       int64_t queries_at_once, const Best& best, float* bounds)
      : model_(model), items_(items), queries_(queries), mask_(mask), limits_(limits), best_(best), bounds_(bounds),
        queries_at_once_(queries_at_once), network_(model), groups_((int64_t)items.width / 2 * COLUMNS),
        states_(queries_at_once) {}

  void operator()(int64_t tile) {
    const int64_t low = tile * queries_at_once_, high = std::min(queries_.num_queries, low + queries_at_once_);
    for (int64_t q = low; q < high; q++) begin(states_[q - low], q);
    int32_t at[COLUMNS];
    for (int64_t first = 0; first < items_.num_items; first += COLUMNS) {
      for (int c = 0; c < COLUMNS; c++) at[c] = (int32_t)std::min(first + c, items_.num_items - 1);
      items_.gather<Bf16>(at, groups_.data());
      for (int64_t q = low; q < high; q++) meet(states_[q - low], first);
    }
    for (int64_t q = low; q < high; q++) end(states_[q - low], q);
  }

 private:
  struct State {
    int64_t query, num_scored;
    Reservoir best;
    Excluded excluded;
    float bound;
    std::vector<uint32_t> rows;
    std::vector<int32_t> waiting;
    int num_waiting;
  };

  void begin(State& state, int64_t q) {
    state.query = q;
    state.num_scored = 0;
    state.best.reset(best_.num_kept, SCAN_ROOM, std::nextafter(limits_.floors[q], -INFINITY), {nullptr, nullptr});
    state.excluded = mask_.excluded_from(q);
    state.bound = -INFINITY;
    state.rows = as_rows<Bf16>(components(q), model_.query_components, model_.width, model_.scale);
    state.rows.resize((size_t)(model_.query_components + ROWS) * model_.width / 2);
    state.waiting.resize(2 * COLUMNS);
    state.num_waiting = 0;
  }

  void meet(State& state, int64_t first) {
    constexpr int L = LANES<VF>, PER_BLOCK = BLOCK / L;
    VF top[PARTS<VF>];
    for (auto& t : top) t = broadcast<VF>(-INFINITY);
    const int groups = model_.width / 2;
    for (int j = 0; j < model_.item_components; j++)
      product<Bf16>(state.rows.data(), groups, (model_.query_components + ROWS - 1) / ROWS * ROWS,
                    groups_.data() + (int64_t)j * groups * BLOCK, (int64_t)items_.width / 2 * BLOCK, groups,
                    [&](int row, const Sums<Bf16>& sums) NR_INLINE {
                      const int num_rows = model_.query_components - row;
                      each<ROWS_AT_ONCE<Bf16>>([&](auto r) NR_INLINE {
                        if (r >= num_rows || model_.is_pair[j * model_.query_components + row + r] == 0.0f) return;
                        each<PARTS<VF>>([&](auto p) NR_INLINE { top[p] = larger(top[p], sums[r][p]); });
                      });
                    });
    const float margin = limits_.margins[state.query];
    const VF needed = broadcast<VF>(state.best.threshold() - margin);
    for (int p = 0; p < PARTS<VF>; p++) {
      const int64_t start = first + p * L;
      uint32_t reaching = mask_above(top[p], needed) & (mask_.allowed[start / BLOCK] >> (p % PER_BLOCK * L));
      for (; reaching; reaching &= reaching - 1) {
        const int lane = __builtin_ctz(reaching);
        const int32_t item = (int32_t)(start + lane);
        if (state.excluded.has(item)) continue;
        if (state.num_scored >= limits_.max_scored) {
          state.bound = std::max(state.bound, top[p][lane] + margin);
          continue;
        }
        state.num_scored++;
        state.waiting[state.num_waiting++] = item;
      }
    }
    if (state.num_waiting >= COLUMNS) flush(state, COLUMNS);
  }

  void flush(State& state, int n) {
    for (int c = n; c < COLUMNS; c++) state.waiting[c] = state.waiting[n - 1];
    float scores[COLUMNS];
    network_.set_query(components(state.query), queries_.gates + state.query * model_.pairs());
    network_.score(items_, state.waiting.data(), scores);
    for (int c = 0; c < n; c++)
      if (scores[c] > state.best.threshold()) state.best.add(scores[c], state.waiting[c]);
    state.num_waiting -= n;
    std::copy(state.waiting.begin() + n, state.waiting.begin() + n + std::max(0, state.num_waiting), state.waiting.begin());
  }

  void end(State& state, int64_t q) {
    if (state.num_waiting) flush(state, state.num_waiting);
    state.best.finish(1.0f, q, best_);
    bounds_[q] = state.bound;
  }

  const float* components(int64_t q) const {
    return queries_.components + q * model_.query_components * model_.width;
  }

  Model model_;
  Items items_;
  Queries queries_;
  Mask mask_;
  Limits limits_;
  Best best_;
  float* bounds_;  // (num_queries,)
  int64_t queries_at_once_;
  PairNetwork<Float32> network_;
  std::vector<uint32_t> groups_;
  std::vector<State> states_;
};

}  // namespace nr

using namespace nr;

extern "C" {

// Scores the items at (num_queries, per_query); -1 is no candidate and scores -inf. precision: 0 float32, 1 bfloat16,
// 3 float64.
void nr_score_pairs(const Model* model, const Items* items, const Queries* queries, const int64_t* at,
                    int64_t per_query, int precision, int num_threads, float* scores) {
  if (precision == 1)
    score_pairs<Bf16>(*model, *items, *queries, at, per_query, num_threads, scores);
  else if (precision == 0)
    score_pairs<Float32>(*model, *items, *queries, at, per_query, num_threads, scores);
  else
    score_pairs<Float64>(*model, *items, *queries, at, per_query, num_threads, scores);
}

// Finds the best of all items for each query. bounds (num_queries,): the most that an item can score that max_scored
// left unscored.
void nr_scan(const Model* model, const Items* items, const Queries* queries, const Mask* mask, const Limits* limits,
             int num_threads, const Best* best, float* bounds) {
  const int64_t at_once = even_tile(queries->num_queries, SCAN_QUERIES, num_threads);
  for_tiles((queries->num_queries + at_once - 1) / at_once, num_threads, [&] {
    return Scan(*model, *items, *queries, *mask, *limits, at_once, *best, bounds);
  });
}
}
