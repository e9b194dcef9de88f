// The pair network of one training position with all its negatives, forward and backward (pipeline/model/mol.py and
// losses.py have the formulas).
//
// Lanes are negatives: nothing is summed across lanes but a position's own gradients and its loss. Negatives go through
// the network in blocks, so that what a block needs stays in the first-level cache; what the backward pass needs of the
// forward pass stays in the second-level cache.
#pragma once

#include "elementwise.h"
#include "loss.h"
#include "masks.h"
#include "operands.h"

namespace nr::training {

constexpr int TOGETHER = 4;           // positions whose gradients of the items' components are added up together
constexpr float LEAST_SHARE = 1e-6f;  // MIN_NORM of mol.py: what is kept of the gates counts as at least this
constexpr int V = 2;                  // vectors of lanes that the elementwise steps work on at once

class PairNetwork {
 public:
  PairNetwork(const Sizes& sizes, const Weights& weights, float scale, uint64_t seed, int num_dropped)
      : s_(sizes), weights_(weights), scale_(scale), seed_(seed), num_dropped_(num_dropped),
        rows_(sizes.pairs_up()), items_(sizes.items_up()),
        query_rows_((TOGETHER * sizes.queries_up() + TILE_ROWS_READ) * rounded_up(sizes.width_groups(), UNIT)),
        query_pairs_(TOGETHER * sizes.queries_up() * sizes.width_up()),
        logits_(rows_ * items_), gates_(rows_ * items_), gate_slopes_(rows_ * items_),
        logits_across_(rows_ * items_), hidden_rows_((int64_t)sizes.hidden_up() * items_),
        slopes_((int64_t)sizes.hidden_up() * items_), logit_sums_((int64_t)TOGETHER * sizes.pair_rows() * items_),
        pairs_block_(rows_ * WIDE), rows_block_((rows_ + TILE_ROWS_READ) * WIDE), across_block_(rows_ * WIDE),
        hidden_pairs_block_(sizes.hidden_up() * WIDE), hidden_rows_block_(sizes.hidden_up() * WIDE),
        scores_(items_), inverses_(items_), clamped_(items_), score_sums_(items_),
        gate_(rows_), gate_sums_(rows_ * L), out_bias_sums_(rows_ * L), in_bias_sums_(sizes.hidden_up() * L),
        component_sums_(sizes.queries_up() * sizes.width_up()) {
    for (int row = 0; row < rows_; row++) pair_of_.push_back(sizes.pair_of(row));
  }

  // Adds the gradients of up to TOGETHER positions. corrections (N,)
  void add(const Position* positions, int count, const float* corrections, Negatives& negatives,
           WeightGradients& gradients) {
    for (int p = 0; p < count; p++) {
      set_query(positions[p], p);
      const Masks masks(seed_, positions[p].number, num_dropped_);
      for (int block = 0; block < s_.num_blocks(); block++) forward(block, p, masks, negatives);
      *positions[p].loss =
          softmax_loss(positions[p], scores_.data(), corrections, s_.items, items_, score_sums_.data());
      component_sums_.clear();
      gate_sums_.clear();
      for (int block = 0; block < s_.num_blocks(); block++) backward(block, p, count, negatives, gradients);
      write_query_sums(positions[p]);
    }
    const int depth = count * s_.queries_up() / PER_GROUP;
    for (int block = 0; block < s_.num_blocks(); block++)
      for (int j = 0; j < s_.item_components; j++)
        add_product({logit_sums(block, j, 0, count), 1, s_.wide(block)}, s_.wide(block), query_pairs_.data(),
                    s_.width_up(), s_.width_up(), depth, negatives.component_sums(block, j),
                    (int64_t)s_.item_components * s_.width_up());
  }

  // Writes the gradients of the biases, which are kept by lane until then.
  void finish(WeightGradients& gradients) {
    for (int row = 0; row < rows_; row++) gradients.out_bias[row] = sum_of(load<VF>(out_bias_sums_.data() + row * L));
    for (int h = 0; h < s_.hidden_up(); h++) gradients.in_bias[h] = sum_of(load<VF>(in_bias_sums_.data() + h * L));
    out_bias_sums_.clear();
    in_bias_sums_.clear();
  }

 private:
  template <class T>
  T* of_block(Buffer<T>& buffer, int block, int rows) {
    return buffer.data() + (int64_t)block * WIDE * rows;
  }
  // [Q / PER_GROUP][N of the block] of component j and of position p of `count`.
  Group* logit_sums(int block, int j, int p, int count) {
    return logit_sums_.data() +
           ((int64_t)block * WIDE * TOGETHER * s_.item_components + (int64_t)(j * count + p) * s_.wide(block)) *
               s_.queries_up() / PER_GROUP;
  }
  Group* query_rows(int p) { return query_rows_.data() + (int64_t)p * s_.queries_up() * s_.width_groups(); }

  void set_query(const Position& position, int p) {
    const int D = s_.width, Q = s_.query_components;
    for (int i = 0; i < Q; i++)
      for (int g = 0; g < s_.width_groups(); g++)
        query_rows(p)[i * s_.width_groups() + g] =
            group_of(position.components + i * D + g * PER_GROUP, D - g * PER_GROUP, 1, scale_);
    for (int i = 0; i < Q; i += PER_GROUP)
      for (int d = 0; d < D; d++)
        query_pairs_.data()[((int64_t)p * s_.queries_up() + i) / PER_GROUP * s_.width_up() + d] =
            group_of(position.components + i * D + d, Q - i, D, scale_);
    for (int row = 0; row < rows_; row++) gate_.data()[row] = pair_of_[row] < 0 ? 0 : position.gate[pair_of_[row]];
  }

  // Logits, hidden layer, gates and scores of a block.
  void forward(int block, int p, const Masks& masks, const Negatives& negatives) {
    const int wide = s_.wide(block), depth = rows_ / PER_GROUP, hidden_depth = s_.hidden_up() / PER_GROUP;
    float *logits = of_block(logits_, block, rows_), *gates = of_block(gates_, block, rows_);
    float* gate_slopes = of_block(gate_slopes_, block, rows_);
    for (int j = 0; j < s_.item_components; j++)
      multiply({query_rows(p), s_.width_groups(), 1}, s_.queries_up(), negatives.across(block, j), wide, wide,
               s_.width_groups(), [&](int row, int column, auto& sums) NR_INLINE {
                 const int first = j * s_.queries_up() + row;
                 store_rows(sums, logits + first * wide + column, wide);
                 keep(sums, wide, pairs_block_.data() + first / PER_GROUP * wide + column,
                      rows_block_.data() + (first * wide + column) / PER_GROUP);
               });
    const int added = rows_ - s_.pair_rows();
    std::fill_n(pairs_block_.data() + s_.pair_rows() * wide / PER_GROUP, added * wide / PER_GROUP, Group());
    std::fill_n(rows_block_.data() + s_.pair_rows() * wide / PER_GROUP, added * wide / PER_GROUP, Group());
    transpose(rows_block_.data(), rows_, wide / PER_GROUP, of_block(logits_across_, block, rows_ / PER_GROUP));

    Group* hidden_rows = of_block(hidden_rows_, block, hidden_depth);
    Group* slopes = of_block(slopes_, block, hidden_depth);
    multiply({weights_.in(), depth, 1}, s_.hidden_up(), pairs_block_.data(), wide, wide, depth,
             [&](int row, int column, auto& sums) NR_INLINE {
               TileOf<decltype(sums)> values, slope;
               each_vector<decltype(sums)>([&](auto r, auto v) NR_INLINE {
                 silu_and_slope(sums[r][v] + weights_.in_bias()[row + r], values[r][v], slope[r][v]);
               });
               keep(values, wide, hidden_pairs_block_.data() + row / PER_GROUP * wide + column,
                    hidden_rows + (row * wide + column) / PER_GROUP);
               keep(slope, wide, slopes + row / PER_GROUP * wide + column, nullptr);
             });
    const float* item_gates = negatives.gates(block);
    multiply({weights_.out(), hidden_depth, 1}, rows_, hidden_pairs_block_.data(), wide, wide, hidden_depth,
             [&](int row, int column, auto& sums) NR_INLINE {
               TileOf<decltype(sums)> values, slope;
               each_vector<decltype(sums)>([&](auto r, auto v) NR_INLINE {
                 const VF of_item = load<VF>(item_gates + (row + r) * wide + column + v * L);
                 const VF input = gate_.data()[row + r] * of_item + (sums[r][v] + weights_.out_bias()[row + r]);
                 silu_and_slope(input, values[r][v], slope[r][v]);
               });
               store_rows(values, gates + row * wide + column, wide);
               store_rows(slope, gate_slopes + row * wide + column, wide);
             });
    for (int column = 0; column < wide; column += V * L) mix(block, column, masks);
  }

  // The scores of some columns of a block. Replaces gates by weights before division by their sum; those that are
  // dropped get a minus.
  void mix(int block, int column, const Masks& masks) {
    const int wide = s_.wide(block), item = block * WIDE + column;
    const float* logits = of_block(logits_, block, rows_) + column;
    float* gates = of_block(gates_, block, rows_) + column;
    VF largest[V], all[V] = {}, kept[V] = {}, totals[V] = {};
    each<V>([&](auto v) NR_INLINE { largest[v] = broadcast<VF>(-1); });  // silu is never below -0.28
    for (int row = 0; row < s_.pair_rows(); row++)
      if (pair_of_[row] >= 0)
        each<V>([&](auto v) NR_INLINE { largest[v] = larger(largest[v], load<VF>(gates + row * wide + v * L)); });
    VU numbers[V] = {};
    for (int row = 0; row < s_.pair_rows(); row++) {
      if (masks.drops() && row % Masks::PER_NUMBER == 0)
        each<V>([&](auto v) NR_INLINE { numbers[v] = masks.numbers((VU)(lane_numbers() + (item + v * L)), row); });
      if (pair_of_[row] < 0) continue;
      each<V>([&](auto v) NR_INLINE {
        const VF gate = load<VF>(gates + row * wide + v * L);
        const VF weight = power_of_e(gate - largest[v]) + 0 * gate;  // 0 · gate: the bounds in exp would hide a NaN
        all[v] += weight;
        VF kept_weight = weight;
        if (masks.drops()) {
          const VI is_kept = masks.kept(numbers[v], row);
          kept_weight = (VF)((VI)weight & is_kept);
          store(gates + row * wide + v * L, (VF)((VI)weight | (~is_kept & INT32_MIN)));
        } else {
          store(gates + row * wide + v * L, weight);
        }
        kept[v] += kept_weight;
        totals[v] = kept_weight * load<VF>(logits + row * wide + v * L) + totals[v];
      });
    }
    each<V>([&](auto v) NR_INLINE {
      const VF inverse = 1 / larger(kept[v], LEAST_SHARE * all[v]);  // `larger` of a NaN on the right is NaN
      const VF is_clamped = (VF)((VI)(1 / all[v]) & (VI)(kept[v] < LEAST_SHARE * all[v]));
      store(scores_.data() + item + v * L, totals[v] * inverse);
      store(inverses_.data() + item + v * L, inverse);
      store(clamped_.data() + item + v * L, is_clamped);  // 1 / all where the kept gates are clamped, else 0
    });
  }

  // The gradients of a block, in the order of the steps back: gates' inputs, output weights, hidden layer, input
  // weights, logits, query components. Those of the item components wait for the other positions.
  void backward(int block, int p, int count, Negatives& negatives, WeightGradients& gradients) {
    const int wide = s_.wide(block), depth = rows_ / PER_GROUP, hidden_depth = s_.hidden_up() / PER_GROUP;
    const int items = wide / PER_GROUP;
    for (int row = 0; row < rows_; row += 2) backward_gates(block, row, negatives);
    transpose(rows_block_.data(), rows_, items, across_block_.data());
    add_product({of_block(hidden_rows_, block, hidden_depth), items, 1}, s_.hidden_up(), across_block_.data(), rows_,
                rows_, items, gradients.out, rows_);
    const Group* slopes = of_block(slopes_, block, hidden_depth);
    multiply({weights_.out_across(), depth, 1}, s_.hidden_up(), pairs_block_.data(), wide, wide, depth,
             [&](int row, int column, auto& sums) NR_INLINE {
               TileOf<decltype(sums)> values;
               each_vector<decltype(sums), 2>([&](auto r, auto v) NR_INLINE {
                 VF first, second;
                 unpack(slopes + (row + r) / PER_GROUP * wide + column + v * L, wide, first, second);
                 values[r][v] = sums[r][v] * first;
                 values[r + 1][v] = sums[r + 1][v] * second;
               });
               add_row_sums(values, in_bias_sums_.data() + row * L);
               keep(values, wide, hidden_pairs_block_.data() + row / PER_GROUP * wide + column,
                    hidden_rows_block_.data() + (row * wide + column) / PER_GROUP);
             });
    add_product({hidden_rows_block_.data(), items, 1}, s_.hidden_up(),
                of_block(logits_across_, block, rows_ / PER_GROUP), rows_, rows_, items, gradients.in, rows_);
    const float* gates = of_block(gates_, block, rows_);
    multiply({weights_.in_across(), hidden_depth, 1}, s_.pair_rows(), hidden_pairs_block_.data(), wide, wide,
             hidden_depth, [&](int row, int column, auto& sums) NR_INLINE {
               each_vector<decltype(sums)>([&](auto r, auto v) NR_INLINE {
                 sums[r][v] += load<VF>(gates + (row + r) * wide + column + v * L);
               });
               each<TILE_ROWS<decltype(sums)> / ROWS_UP>([&](auto part) NR_INLINE {  // four rows have one j
                 constexpr int VECTORS = TILE_VECTORS<decltype(sums)>;
                 const int first = row + part * ROWS_UP, j = first / s_.queries_up(), i = first % s_.queries_up();
                 keep(reinterpret_cast<VF(&)[ROWS_UP][VECTORS]>(sums[part * ROWS_UP]), wide,
                      logit_sums(block, j, p, count) + i / PER_GROUP * wide + column,
                      rows_block_.data() + (first * wide + column) / PER_GROUP);
               });
             });
    for (int j = 0; j < s_.item_components; j++)
      add_product({rows_block_.data() + j * s_.queries_up() * items, items, 1}, s_.queries_up(),
                  negatives.along(block, j), s_.width_up(), s_.width_up(), items, component_sums_.data(),
                  s_.width_up());
  }

  // Two rows of the softmax over pairs and of the gates' inputs. Replaces weights by the logits' direct gradients.
  void backward_gates(int block, int row, Negatives& negatives) {
    const int wide = s_.wide(block);
    VF gate_sums[2] = {}, bias_sums[2] = {};
    for (int column = 0; column < wide; column += V * L) {
      const int item = block * WIDE + column;
      VF inputs[2][V] = {};
      each<2>([&](auto r) NR_INLINE {
        const int64_t at = (int64_t)block * WIDE * rows_ + (row + r) * wide + column;
        const bool is_pair = pair_of_[row + r] >= 0;
        each<V>([&](auto v) NR_INLINE {
          float* gate = gates_.data() + at + v * L;
          if (!is_pair) return store(gate, VF{});
          const VF of_score = load<VF>(score_sums_.data() + item + v * L);
          const VF score = load<VF>(scores_.data() + item + v * L), logit = load<VF>(logits_.data() + at + v * L);
          const VF clamped = load<VF>(clamped_.data() + item + v * L), weight = load<VF>(gate);
          const VF share = larger(weight, VF{}) * load<VF>(inverses_.data() + item + v * L);
          const VF direct = of_score * share;
          VF input = direct * (logit - score);
          if (mask_above(clamped, VF{})) {  // there the score is no mean: all gates, dropped ones too, divide it
            const VF share_of_all = (VF)((VI)weight & INT32_MAX) * clamped;
            input += (VF)((VI)(of_score * score * (share - share_of_all)) & (VI)(clamped > 0));
          }
          input *= load<VF>(gate_slopes_.data() + at + v * L);
          store(gate, direct);
          inputs[r][v] = input;
          float* item_gate_sums = negatives.gate_sums(block) + (row + r) * wide + column + v * L;
          store(item_gate_sums, load<VF>(item_gate_sums) + input * gate_.data()[row + r]);
          gate_sums[r] += input * load<VF>(negatives.gates(block) + (row + r) * wide + column + v * L);
          bias_sums[r] += input;
        });
      });
      keep(inputs, wide, pairs_block_.data() + row / PER_GROUP * wide + column,
           rows_block_.data() + (row * wide + column) / PER_GROUP);
    }
    each<2>([&](auto r) NR_INLINE {
      float *gate = gate_sums_.data() + (row + r) * L, *bias = out_bias_sums_.data() + (row + r) * L;
      store(gate, load<VF>(gate) + gate_sums[r]);
      store(bias, load<VF>(bias) + bias_sums[r]);
    });
  }

  void write_query_sums(const Position& position) const {
    for (int i = 0; i < s_.query_components; i++)
      for (int d = 0; d < s_.width; d++)
        position.component_sums[i * s_.width + d] = component_sums_.data()[i * s_.width_up() + d] * scale_;
    for (int row = 0; row < s_.pair_rows(); row++)
      if (pair_of_[row] >= 0) position.gate_sums[pair_of_[row]] = sum_of(load<VF>(gate_sums_.data() + row * L));
  }

  Sizes s_;
  const Weights& weights_;
  float scale_;
  uint64_t seed_;
  int num_dropped_, rows_, items_;
  std::vector<int> pair_of_;
  Buffer<Group> query_rows_, query_pairs_;
  Buffer<float> logits_, gates_, gate_slopes_;
  Buffer<Group> logits_across_, hidden_rows_, slopes_, logit_sums_;
  Buffer<Group> pairs_block_, rows_block_, across_block_, hidden_pairs_block_, hidden_rows_block_;
  Buffer<float> scores_, inverses_, clamped_, score_sums_, gate_, gate_sums_, out_bias_sums_, in_bias_sums_;
  Buffer<float> component_sums_;
};

}  // namespace nr::training
