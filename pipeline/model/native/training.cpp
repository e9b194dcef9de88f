// One training step of the pair network over all positions (pipeline/model/step.py).
//
// The work is cut into units of about sixty-four positions, each with sums of its own, which are added up in the order
// of the units. So the result is the same to the bit on any number of threads.
#include <memory>

#include "network.h"
#include "threads.h"

namespace nr::training {

constexpr int64_t POSITIONS_PER_UNIT = 64;

// T = G · S positions in groups, each with N negatives.
struct StepSizes {
  int query_components, item_components, width, hidden, negatives;
  int64_t num_groups, group_size;
  float scale;  // 1 / temperature
  int num_dropped;  // of the 256 values of a random byte
  uint64_t seed;
};

struct StepInputs {
  const float *query_components, *query_gates, *positives, *weights;  // (T, Q, D), (T, P), (T,), (T,)
  const float *item_components, *item_gates, *corrections;            // (G, N, X, D), (G, N, P), (G, N)
  const uint8_t* is_left_out;                                         // (T, N)
  const float *in_weight, *in_bias, *out_weight, *out_bias;           // (H, P), (H,), (P, H), (P,)
};

struct StepOutputs {
  double* losses;                                             // (T,), times weight
  float *query_components, *query_gates, *positives;          // as the inputs
  float *item_components, *item_gates;
  float *in_weight, *in_bias, *out_weight, *out_bias;
};

class Step {
 public:
  Step(const StepSizes& sizes, const StepInputs& in, const StepOutputs& out)
      : t_(sizes), s_{sizes.query_components, sizes.item_components, sizes.width, sizes.hidden, sizes.negatives},
        in_(in),
        out_(out),
        weights_(s_, in.in_weight, in.in_bias, in.out_weight, in.out_bias),
        num_slices_((sizes.group_size + POSITIONS_PER_UNIT - 1) / POSITIONS_PER_UNIT),
        slice_(rounded_up((int)((sizes.group_size + num_slices_ - 1) / num_slices_), TOGETHER)),
        groups_per_unit_(std::max<int64_t>(1, POSITIONS_PER_UNIT / sizes.group_size)),
        num_units_((sizes.num_groups + groups_per_unit_ - 1) / groups_per_unit_ * num_slices_),
        components_size_((int64_t)s_.items * s_.item_components * s_.width),
        gates_size_((int64_t)s_.items * s_.pairs()),
        component_slices_(new float[(num_slices_ - 1) * t_.num_groups * components_size_]),
        gate_slices_(new float[(num_slices_ - 1) * t_.num_groups * gates_size_]),
        gradients_(num_units_ * WeightGradients::size(s_)) {}

  void run(int num_threads) {
    for_tiles(num_units_, num_threads, [&] {
      auto network = std::make_shared<PairNetwork>(s_, weights_, t_.scale, t_.seed, t_.num_dropped);
      auto negatives = std::make_shared<Negatives>(s_);
      return [this, network, negatives](int64_t unit) { add_unit(unit, *network, *negatives); };
    });
    for_tiles(t_.num_groups, num_threads, [&] { return [this](int64_t group) { add_slices(group); }; });
    add_gradients();
  }

 private:
  void add_unit(int64_t unit, PairNetwork& network, Negatives& negatives) {
    WeightGradients gradients(s_, gradients_.data() + unit * WeightGradients::size(s_));
    const int64_t slice = unit % num_slices_, first = unit / num_slices_ * groups_per_unit_;
    for (int64_t group = first; group < std::min(first + groups_per_unit_, t_.num_groups); group++) {
      negatives.set(in_.item_components + group * components_size_, in_.item_gates + group * gates_size_);
      const int64_t end = std::min((slice + 1) * slice_, t_.group_size);
      for (int64_t member = slice * slice_; member < end; member += TOGETHER) {
        Position positions[TOGETHER];
        const int count = (int)std::min<int64_t>(TOGETHER, end - member);
        for (int p = 0; p < count; p++) positions[p] = position(group * t_.group_size + member + p);
        network.add(positions, count, in_.corrections + group * s_.items, negatives, gradients);
      }
      const int64_t extra = (slice - 1) * t_.num_groups + group;
      negatives.write_sums(
          slice ? component_slices_.get() + extra * components_size_ : out_.item_components + group * components_size_,
          slice ? gate_slices_.get() + extra * gates_size_ : out_.item_gates + group * gates_size_);
    }
    network.finish(gradients);
  }

  Position position(int64_t t) const {
    const int64_t size = (int64_t)s_.query_components * s_.width, pairs = s_.pairs();
    return {t,
            in_.query_components + t * size,
            in_.query_gates + t * pairs,
            in_.positives[t],
            in_.weights[t],
            in_.is_left_out + t * s_.items,
            out_.query_components + t * size,
            out_.query_gates + t * pairs,
            out_.positives + t,
            out_.losses + t};
  }

  void add_slices(int64_t group) {
    for (int64_t slice = 0; slice + 1 < num_slices_; slice++) {
      const int64_t extra = slice * t_.num_groups + group;
      const float *components = component_slices_.get() + extra * components_size_;
      add(components, components_size_, out_.item_components + group * components_size_);
      add(gate_slices_.get() + extra * gates_size_, gates_size_, out_.item_gates + group * gates_size_);
    }
  }

  void add_gradients() {
    const int64_t size = WeightGradients::size(s_);
    for (int64_t unit = 1; unit < num_units_; unit++) add(gradients_.data() + unit * size, size, gradients_.data());
    const WeightGradients sums(s_, gradients_.data());
    for (int row = 0; row < s_.pair_rows(); row++) {
      const int pair = s_.pair_of(row);
      if (pair < 0) continue;
      out_.out_bias[pair] = sums.out_bias[row];
      for (int h = 0; h < s_.hidden; h++) {
        out_.in_weight[h * s_.pairs() + pair] = sums.in[h * s_.pairs_up() + row];
        out_.out_weight[pair * s_.hidden + h] = sums.out[h * s_.pairs_up() + row];
      }
    }
    std::copy_n(sums.in_bias, s_.hidden, out_.in_bias);
  }

  static void add(const float* from, int64_t size, float* to) {
    for (int64_t n = 0; n < size; n++) to[n] += from[n];
  }

  StepSizes t_;
  Sizes s_;
  StepInputs in_;
  StepOutputs out_;
  Weights weights_;
  int64_t num_slices_, slice_, groups_per_unit_, num_units_, components_size_, gates_size_;
  std::unique_ptr<float[]> component_slices_, gate_slices_;  // of all slices of a group but the first
  Buffer<float> gradients_;
};

}  // namespace nr::training

using namespace nr;
using namespace nr::training;

extern "C" {

void nr_train_pairs(const StepSizes* sizes, const StepInputs* inputs, const StepOutputs* outputs, int num_threads) {
  Step(*sizes, *inputs, *outputs).run(num_threads);
}

// Which gates the step keeps: 1 or 0 for (T, N, P).
void nr_gate_masks(const StepSizes* sizes, uint8_t* is_kept) {
  const Sizes s{sizes->query_components, sizes->item_components, sizes->width, sizes->hidden, sizes->negatives};
  for (int64_t t = 0; t < sizes->num_groups * sizes->group_size; t++) {
    const Masks masks(sizes->seed, t, sizes->num_dropped);
    for (int row = 0; row < s.pair_rows(); row++)
      for (int n = 0; n < s.items; n += L) {
        const VU numbers = masks.numbers((VU)(lane_numbers() + n), row / Masks::PER_NUMBER * Masks::PER_NUMBER);
        const VI kept = masks.kept(numbers, row);
        for (int lane = 0; lane < L && n + lane < s.items; lane++)
          if (s.pair_of(row) >= 0) is_kept[(t * s.items + n + lane) * s.pairs() + s.pair_of(row)] = kept[lane] != 0;
      }
  }
}
}
