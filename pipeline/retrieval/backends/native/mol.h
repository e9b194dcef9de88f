// MoL scores of one query with 48 of its candidates, in bfloat16, float32 or float64 (Ding & Zhai 2025, section 2).
//
// Lanes are candidates: nothing is ever summed across lanes, and a pair's score does not depend on its neighbours.
// Pairs of components are numbered p = j·Q + i here, with Q rounded up to an even number, so that the two values of a
// bfloat16 group come from neighbouring rows of one product. The added pairs have weight zero.
#pragma once

#include <vector>

#include "items.h"
#include "product.h"

namespace nr {

// The part of a model that the pair network needs. Python lays the arrays out (layout.py).
struct Model {
  int query_components, item_components, width, hidden;  // Q (even), X, D (even), H (a multiple of ROWS)
  const float* in_weight;    // (H, P)
  const float* in_bias;      // (H,)
  const float* out_weight;   // (P rounded up to ROWS, H)
  const float* out_bias;     // (P rounded up to ROWS,)
  const float* is_pair;      // (P,): 1, or 0 where the number of query components was rounded up
  double scale;              // 1 / temperature
  int pairs() const { return query_components * item_components; }
  int out_rows() const { return (pairs() + ROWS - 1) / ROWS * ROWS; }
};

// Converts rows of numbers, times a factor, into A of a product of kind K: (rows, columns / PER_GROUP).
template <class K>
inline std::vector<typename K::Group> as_rows(const float* values, int64_t rows, int columns, double factor = 1) {
  std::vector<typename K::Group> groups(rows * (columns / K::PER_GROUP));
  for (size_t g = 0; g < groups.size(); g++) {
    if constexpr (K::PER_GROUP == 2)
      groups[g] = to_bf16((float)(values[2 * g] * factor)) | to_bf16((float)(values[2 * g + 1] * factor)) << 16;
    else
      groups[g] = (typename K::Group)(values[g] * factor);
  }
  return groups;
}

template <class K>
class PairNetwork {
  typedef typename K::Sum V;
  typedef typename K::Group Group;
  typedef typename ScalarOf<V>::type Number;
  static constexpr int PARTS_HERE = PARTS<V>, L = LANES<V>, PER_BLOCK = BLOCK / L;
  static constexpr bool IS_ROUGH = K::PER_GROUP == 2;

 public:
  explicit PairNetwork(const Model& model)
      : model_(model),
        pairs_(model.pairs()),
        in_weight_(as_rows<K>(model.in_weight, model.hidden, pairs_)),
        out_weight_(as_rows<K>(model.out_weight, model.out_rows(), model.hidden)),
        logits_((int64_t)pairs_ * PARTS_HERE),
        gates_((int64_t)pairs_ * PARTS_HERE),
        logit_groups_((int64_t)pairs_ / K::PER_GROUP * COLUMNS),
        hidden_groups_((int64_t)model.hidden / K::PER_GROUP * COLUMNS),
        item_groups_((int64_t)(model.item_components * model.width + pairs_) / K::PER_GROUP * COLUMNS),
        query_rows_((int64_t)(model.query_components + ROWS) * model.width / K::PER_GROUP) {}

  // components (Q, D), gate (P,)
  void set_query(const float* components, const float* gate) {
    auto rows = as_rows<K>(components, model_.query_components, model_.width, model_.scale);
    std::copy(rows.begin(), rows.end(), query_rows_.begin());
    gate_ = gate;
  }

  // Scores 48 items into `scores`; `at` may repeat items.
  void score(const Items& items, const int32_t* at, float* scores) {
    items.gather<K>(at, item_groups_.data());
    const int groups = model_.width / K::PER_GROUP;
    for (int j = 0; j < model_.item_components; j++)
      product<K, true>(query_rows_.data(), groups, (model_.query_components + ROWS - 1) / ROWS * ROWS,
                 item_groups_.data() + (int64_t)j * groups * BLOCK, item_stride(), groups,
                 [&](int row, const auto& sums) { keep_logits(j, row, sums); });
    product<K, true>(in_weight_.data(), pairs_ / K::PER_GROUP, model_.hidden, logit_groups_.data(),
               (int64_t)pairs_ / K::PER_GROUP * BLOCK, pairs_ / K::PER_GROUP,
               [&](int row, const auto& sums) { keep_hidden(row, sums); });
    V largest[PARTS_HERE];
    for (auto& value : largest) value = broadcast<V>(-1);  // silu is never below -0.28
    product<K, true>(out_weight_.data(), model_.hidden / K::PER_GROUP, model_.out_rows(), hidden_groups_.data(),
               (int64_t)model_.hidden / K::PER_GROUP * BLOCK, model_.hidden / K::PER_GROUP,
               [&](int row, const auto& sums) { keep_gates(row, sums, largest); });
    mix(largest, scores);
  }

 private:
  int64_t item_stride() const { return (int64_t)(model_.item_components * model_.width + pairs_) / K::PER_GROUP * BLOCK; }

  static V activation(V x) {
    if constexpr (IS_ROUGH)
      return rough_silu(x);
    else
      return silu(x);
  }

  // Stores rows into an operand B: as numbers, or two rows together as bfloat16 pairs.
  template <class Sums>
  static void keep(Group* b, int64_t block_stride, int row, const Sums& rows, int num_rows) {
    for (int p = 0; p < PARTS_HERE; p++) {
      Group* to = b + (p / PER_BLOCK) * block_stride + (p % PER_BLOCK) * L;
      for (int r = 0; r < num_rows; r += K::PER_GROUP) {
        if constexpr (K::PER_GROUP == 2)
          store(to + (int64_t)(row + r) / 2 * BLOCK, pack_pair(rows[r][p], rows[r + 1][p]));
        else
          store(to + (int64_t)(row + r) * BLOCK, rows[r][p]);
      }
    }
  }

  template <class Sums>
  void keep_logits(int j, int row, const Sums& sums) {
    const int num_rows = std::min<int>(ROWS_AT_ONCE<K>, model_.query_components - row);
    const int first = j * model_.query_components + row;
    for (int r = 0; r < num_rows; r++)
      for (int p = 0; p < PARTS_HERE; p++) logits_[(int64_t)(first + r) * PARTS_HERE + p] = sums[r][p];
    if (num_rows > 0) keep(logit_groups_.data(), (int64_t)pairs_ / K::PER_GROUP * BLOCK, first, sums, num_rows);
  }

  template <class Sums>
  void keep_hidden(int row, const Sums& sums) {
    V active[ROWS_AT_ONCE<K>][PARTS_HERE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE<K>; r++) {
      const V bias = broadcast<V>((Number)model_.in_bias[row + r]);
      for (int p = 0; p < PARTS_HERE; p++) active[r][p] = activation(sums[r][p] + bias);
    }
    keep(hidden_groups_.data(), (int64_t)model_.hidden / K::PER_GROUP * BLOCK, row, active, ROWS_AT_ONCE<K>);
  }

  // The gates before the softmax over pairs, and the largest gate of each item.
  template <class Sums>
  void keep_gates(int row, const Sums& sums, V* largest) {
    const Group* gates = item_groups_.data() + (int64_t)model_.item_components * model_.width / K::PER_GROUP * BLOCK;
    for (int r = 0; r < ROWS_AT_ONCE<K> && row + r < pairs_; r++) {
      const int pair = row + r;
      if (model_.is_pair[pair] == 0.0f) continue;
      const V of_query = broadcast<V>((Number)gate_[pair]), bias = broadcast<V>((Number)model_.out_bias[pair]);
      for (int p = 0; p < PARTS_HERE; p++) {
        const Group* of_item = gates + (p / PER_BLOCK) * item_stride() + (int64_t)pair / K::PER_GROUP * BLOCK +
                               (p % PER_BLOCK) * L;
        V item_gate;
        if constexpr (K::PER_GROUP == 2)
          item_gate = pair % 2 ? second_of_pair(load<VI>(of_item)) : first_of_pair(load<VI>(of_item));
        else
          item_gate = load<V>(of_item);
        const V gate = activation(of_query * item_gate + (sums[r][p] + bias));
        gates_[(int64_t)pair * PARTS_HERE + p] = gate;
        largest[p] = larger(largest[p], gate);
      }
    }
  }

  // Writes the scores: means of the logits, weighted by the softmax of the gates.
  void mix(const V* largest, float* scores) const {
    V weights[PARTS_HERE] = {}, totals[PARTS_HERE] = {};
    for (int pair = 0; pair < pairs_; pair++) {
      if (model_.is_pair[pair] == 0.0f) continue;
#pragma GCC unroll 12
      for (int p = 0; p < PARTS_HERE; p++) {
        V weight = gates_[(int64_t)pair * PARTS_HERE + p] - largest[p];
        if constexpr (IS_ROUGH)
          weight = rough_exponential(weight);
        else
          weight = exponential(weight);
        weights[p] += weight;
        totals[p] = weight * logits_[(int64_t)pair * PARTS_HERE + p] + totals[p];
      }
    }
    for (int p = 0; p < PARTS_HERE; p++) {
      const V score = totals[p] / weights[p];
      for (int lane = 0; lane < L; lane++) scores[p * L + lane] = (float)score[lane];
    }
  }

  Model model_;
  int pairs_;
  std::vector<Group> in_weight_, out_weight_;
  std::vector<V> logits_, gates_;
  std::vector<Group> logit_groups_, hidden_groups_, item_groups_, query_rows_;
  const float* gate_ = nullptr;
};

}  // namespace nr
