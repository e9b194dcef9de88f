// What the products of training read and add to: parameters, negatives, and their gradients, laid out as operands.
//
// Pairs of components are numbered p = j·Q + i here, with Q rounded up to a multiple of four and their number to a
// multiple of sixteen. The numbers that this adds have weight zero.
#pragma once

#include <algorithm>
#include <vector>

#include "matrices.h"

namespace nr::training {

// Numbers on cache lines of their own, zero at first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_((size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)) {}
  T* data() { return (T*)lines_.data(); }
  const T* data() const { return (const T*)lines_.data(); }
  void clear() { std::memset(lines_.data(), 0, lines_.size() * sizeof(Line)); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> lines_;
};

struct Sizes {
  int query_components, item_components, width, hidden, items;  // Q, X, D, H, N
  int pairs() const { return query_components * item_components; }
  int queries_up() const { return rounded_up(query_components, ROWS_UP); }
  int pair_rows() const { return queries_up() * item_components; }
  int pairs_up() const { return rounded_up(pair_rows(), UNIT); }
  int hidden_up() const { return rounded_up(hidden, UNIT); }
  int width_up() const { return rounded_up(width, UNIT); }
  int width_groups() const { return (width + PER_GROUP - 1) / PER_GROUP; }
  int items_up() const { return rounded_up(items, BLOCK_UP); }
  int num_blocks() const { return (items_up() + WIDE - 1) / WIDE; }
  int wide(int block) const { return std::min(WIDE, items_up() - block * WIDE); }
  // The pair in the model's order, i·X + j, for a row p here; -1 for an added one.
  int pair_of(int row) const {
    const int i = row % queries_up(), j = row / queries_up();
    return i < query_components && j < item_components ? i * item_components + j : -1;
  }
};

inline Group group_of(const float* numbers, int count, int64_t stride, float factor = 1) {
  if constexpr (PER_GROUP == 1) return (Group)(numbers[0] * factor);
  const uint32_t first = to_bf16(numbers[0] * factor);
  return (Group)(count < 2 ? first : first | to_bf16(numbers[stride] * factor) << 16);
}

// The parameters as operands A, forward and backward.
class Weights {
 public:
  // in_weight (H, P), in_bias (H,), out_weight (P, H), out_bias (P,), in the model's order of pairs
  Weights(const Sizes& sizes, const float* in_weight, const float* in_bias, const float* out_weight,
          const float* out_bias)
      : in_(sizes.hidden_up() * sizes.pairs_up()), in_across_(sizes.pairs_up() * sizes.hidden_up()),
        out_(sizes.pairs_up() * sizes.hidden_up()), out_across_(sizes.hidden_up() * sizes.pairs_up()),
        in_bias_(sizes.hidden_up()), out_bias_(sizes.pairs_up()) {
    const int pairs_up = sizes.pairs_up(), hidden_up = sizes.hidden_up(), pairs = sizes.pairs();
    std::vector<float> in(hidden_up * pairs_up), out(hidden_up * pairs_up);  // (H, P) both
    for (int row = 0; row < pairs_up; row++) {
      const int pair = sizes.pair_of(row);
      if (pair < 0) continue;
      out_bias_.data()[row] = out_bias[pair];
      for (int h = 0; h < sizes.hidden; h++) {
        in[h * pairs_up + row] = in_weight[h * pairs + pair];
        out[h * pairs_up + row] = out_weight[pair * sizes.hidden + h];
      }
    }
    std::copy_n(in_bias, sizes.hidden, in_bias_.data());
    for (int h = 0; h < hidden_up; h++)
      for (int g = 0; g < pairs_up / PER_GROUP; g++) {
        const int64_t at = h * pairs_up + g * PER_GROUP, to = h * (pairs_up / PER_GROUP) + g;
        in_.data()[to] = group_of(&in[at], PER_GROUP, 1);
        out_across_.data()[to] = group_of(&out[at], PER_GROUP, 1);
      }
    for (int row = 0; row < pairs_up; row++)
      for (int g = 0; g < hidden_up / PER_GROUP; g++) {
        const int64_t at = g * PER_GROUP * pairs_up + row, to = row * (hidden_up / PER_GROUP) + g;
        out_.data()[to] = group_of(&out[at], PER_GROUP, pairs_up);
        in_across_.data()[to] = group_of(&in[at], PER_GROUP, pairs_up);
      }
  }
  const Group* in() const { return in_.data(); }                  // (H, P)
  const Group* in_across() const { return in_across_.data(); }    // (P, H)
  const Group* out() const { return out_.data(); }                // (P, H)
  const Group* out_across() const { return out_across_.data(); }  // (H, P)
  const float* in_bias() const { return in_bias_.data(); }
  const float* out_bias() const { return out_bias_.data(); }

 private:
  Buffer<Group> in_, in_across_, out_, out_across_;
  Buffer<float> in_bias_, out_bias_;
};

// The gradients of the parameters: (H, P) for both weights, (H,) and (P,) for the biases.
struct WeightGradients {
  float *in, *out, *in_bias, *out_bias;
  static int64_t size(const Sizes& sizes) {
    return 2 * sizes.hidden_up() * sizes.pairs_up() + sizes.hidden_up() + sizes.pairs_up();
  }
  WeightGradients(const Sizes& sizes, float* numbers) : in(numbers) {
    out = in + sizes.hidden_up() * sizes.pairs_up();
    in_bias = out + sizes.hidden_up() * sizes.pairs_up();
    out_bias = in_bias + sizes.hidden_up();
  }
};

// The negatives of one group as operands B, and their gradients.
class Negatives {
 public:
  explicit Negatives(const Sizes& sizes)
      : sizes_(sizes),
        across_((int64_t)sizes.item_components * sizes.width_groups() * sizes.items_up()),
        along_((int64_t)sizes.item_components * sizes.items_up() * sizes.width_up()),
        gates_((int64_t)sizes.pairs_up() * sizes.items_up()),
        component_sums_((int64_t)sizes.items_up() * sizes.item_components * sizes.width_up()),
        gate_sums_((int64_t)sizes.pairs_up() * sizes.items_up()) {}

  // components (N, X, D), gates (N, P)
  void set(const float* components, const float* gates) {
    const int X = sizes_.item_components, D = sizes_.width, N = sizes_.items;
    for (int n = 0; n < N; n++) {
      const int block = n / WIDE, column = n % WIDE, wide = sizes_.wide(block);
      for (int j = 0; j < X; j++) {
        const float* from = components + ((int64_t)n * X + j) * D;
        Group* to = (Group*)across(block, j) + column;
        for (int g = 0; g < sizes_.width_groups(); g++)
          to[(int64_t)g * wide] = group_of(from + g * PER_GROUP, D - g * PER_GROUP, 1);
      }
      float* to = gates_.data() + block * WIDE * sizes_.pairs_up() + column;
      for (int row = 0; row < sizes_.pair_rows(); row++)
        if (const int pair = sizes_.pair_of(row); pair >= 0) to[row * wide] = gates[(int64_t)n * sizes_.pairs() + pair];
    }
    for (int j = 0; j < X; j++)
      for (int n = 0; n < N; n += PER_GROUP) {
        const float* from = components + ((int64_t)n * X + j) * D;
        Group* to = along_.data() + ((int64_t)j * sizes_.items_up() + n) / PER_GROUP * sizes_.width_up();
        for (int d = 0; d < D; d++) to[d] = group_of(from + d, N - n, (int64_t)X * D);
      }
    component_sums_.clear();
    gate_sums_.clear();
  }

  // [D][N of the block]: numbers along the width are in a group.
  const Group* across(int block, int j) const {
    const int64_t before = (int64_t)block * WIDE * sizes_.item_components + j * sizes_.wide(block);
    return across_.data() + before * sizes_.width_groups();
  }
  // [N of the block][D]: items are in a group.
  const Group* along(int block, int j) const {
    return along_.data() + ((int64_t)j * sizes_.items_up() + block * WIDE) / PER_GROUP * sizes_.width_up();
  }
  const float* gates(int block) const { return gates_.data() + (int64_t)block * WIDE * sizes_.pairs_up(); }  // [P][N]
  float* gate_sums(int block) { return gate_sums_.data() + (int64_t)block * WIDE * sizes_.pairs_up(); }      // [P][N]
  float* component_sums(int block, int j) {  // [N of the block][D], X rows apart
    return component_sums_.data() + ((int64_t)block * WIDE * sizes_.item_components + j) * sizes_.width_up();
  }

  // Writes the gradients with respect to components (N, X, D) and gates (N, P).
  void write_sums(float* components, float* gates) const {
    const int X = sizes_.item_components, D = sizes_.width;
    for (int64_t row = 0; row < (int64_t)sizes_.items * X; row++)
      std::copy_n(component_sums_.data() + row * sizes_.width_up(), D, components + row * D);
    for (int row = 0; row < sizes_.pair_rows(); row++) {
      const int pair = sizes_.pair_of(row);
      if (pair < 0) continue;
      for (int n = 0; n < sizes_.items; n++) {
        const int block = n / WIDE, wide = sizes_.wide(block);
        const float* from = gate_sums_.data() + (int64_t)block * WIDE * sizes_.pairs_up();
        gates[(int64_t)n * sizes_.pairs() + pair] = from[row * wide + n % WIDE];
      }
    }
  }

 private:
  Sizes sizes_;
  Buffer<Group> across_, along_;
  Buffer<float> gates_, component_sums_, gate_sums_;
};

}  // namespace nr::training
