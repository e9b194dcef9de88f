// The sampled softmax loss of one training position and its gradients with respect to all scores.
#pragma once

#include <cmath>

#include "matrices.h"

namespace nr::training {

// What one position brings, and where its gradients go.
struct Position {
  int64_t number;
  const float *components, *gate;  // (Q, D), (P,)
  float positive, weight;          // its own item's score; the weight of its loss
  const uint8_t* is_left_out;      // (N,)
  float *component_sums, *gate_sums, *positive_sum;
  double* loss;
};

// The loss, for the scores (N,) without their corrections. Writes the gradients: of the positive's score to the
// position, of the others to `sums`, where those up to `items_up` are 0. A score that is not finite makes the loss NaN.
inline double softmax_loss(const Position& position, const float* scores, const float* corrections, int items,
                           int items_up, float* sums) {
  float largest = position.positive;
  for (int n = 0; n < items; n++) {
    sums[n] = scores[n] + corrections[n];
    if (!position.is_left_out[n] && sums[n] > largest) largest = sums[n];
  }
  const float of_positive = std::exp(position.positive - largest);
  double total = of_positive;
  for (int n = 0; n < items_up; n += L) {
    const VF score = load<VF>(sums + n);
    store(sums + n, exponential(score - largest) + 0 * score);  // 0 * score: the bounds in exp would hide a NaN
  }
  for (int n = 0; n < items_up; n++) {
    if (n >= items || position.is_left_out[n]) sums[n] = 0;
    total += sums[n];
  }
  const float share = (float)(position.weight / total);
  for (int n = 0; n < items_up; n++) sums[n] *= share;
  *position.positive_sum = (float)(position.weight * (of_positive / total - 1));
  return position.weight * (std::log(total) + largest - position.positive);
}

}  // namespace nr::training
