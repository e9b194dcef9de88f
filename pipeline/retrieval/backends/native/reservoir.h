// The best num_kept of a stream of scores, for one query. Items come in ascending order.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace nr {

// Items that a query may not be shown, ascending; walked once, as the items come.
struct Excluded {
  const int32_t *next, *end;
  bool has(int32_t item) {
    while (next < end && *next < item) next++;
    return next < end && *next == item;
  }
};

// The items that the queries of one call may be given.
struct Mask {
  const uint16_t* allowed;  // [blocks]: a bit per item, 0 for padding
  const int64_t* offsets;   // (num_queries + 1,): query q's exclusions are numbers offsets[q] to offsets[q + 1]
  const int32_t* excluded;  // ascending within a query
  Excluded excluded_from(int64_t q) const { return {excluded + offsets[q], excluded + offsets[q + 1]}; }
};

// The output of one call: the best items of each query, padded with -inf and -1.
struct Best {
  float* scores;   // (num_queries, num_kept)
  int64_t* items;  // (num_queries, num_kept)
  int num_kept;
};

class Reservoir {
 public:
  // Forgets all items. Scores of at most `floor` will not be kept. `room`: items that fit, as a multiple of num_kept.
  void reset(int num_kept, int room, float floor, Excluded excluded) {
    kept_ = num_kept;
    capacity_ = num_kept * room + 64;
    if ((int)scores_.size() < capacity_ + BLOCK) {
      scores_.resize(capacity_ + BLOCK);
      items_.resize(capacity_ + BLOCK);
      keys_.resize(capacity_ + BLOCK);
    }
    size_ = settled_ = 0;
    threshold_ = floor;
    excluded_ = excluded;
  }

  // Scores above this are worth adding; it only rises.
  float threshold() const { return threshold_; }

  void add(uint32_t mask, VF scores, VI items) {
    int added = compress(scores_.data() + size_, mask, scores);
    compress(items_.data() + size_, mask, items);
    size_ += added;
    if (size_ > capacity_ - LANES<VF>) settle();
  }

  void add(float score, int32_t item) {
    scores_[size_] = score;
    items_[size_++] = item;
    if (size_ > capacity_ - LANES<VF>) settle();
  }

  // Raises the threshold to the worst of the best num_kept, when there are that many items.
  void settle() {
    drop_excluded();
    if (size_ > kept_) cut();
  }

  bool is_full() {
    drop_excluded();
    return size_ >= kept_;
  }

  // The least of the best num_kept scores; -inf while there are fewer.
  float worst() {
    if (!is_full()) return -INFINITY;
    cut();
    return threshold_;
  }

  // Writes the best of query q, their scores times `factor`, in any order. Of equal scores the first items stay.
  void finish(float factor, int64_t q, const Best& best) {
    float* scores = best.scores + q * best.num_kept;
    int64_t* items = best.items + q * best.num_kept;
    drop_excluded();
    if (size_ > kept_) cut();
    for (int i = 0; i < size_; i++) scores[i] = scores_[i] * factor, items[i] = items_[i];
    for (int i = size_; i < kept_; i++) scores[i] = -INFINITY, items[i] = -1;
  }

 private:
  void drop_excluded() {
    if (excluded_.next < excluded_.end) {
      int n = settled_;
      for (int i = settled_; i < size_; i++)
        if (!excluded_.has(items_[i])) scores_[n] = scores_[i], items_[n++] = items_[i];
      size_ = n;
    }
    settled_ = size_;
  }

  void cut() {
    for (int i = 0; i < size_; i++) keys_[i] = key_of(scores_[i], items_[i]);
    std::nth_element(keys_.begin(), keys_.begin() + (kept_ - 1), keys_.begin() + size_, std::greater<uint64_t>());
    float worst = INFINITY;
    for (int i = 0; i < kept_; i++) {
      items_[i] = (int32_t)~(uint32_t)keys_[i];
      scores_[i] = score_of(keys_[i]);
      worst = std::min(worst, scores_[i]);
    }
    size_ = settled_ = kept_;
    threshold_ = std::max(threshold_, worst);
  }

  // The key is larger for a larger score, then for a smaller item.
  static uint64_t key_of(float score, int32_t item) {
    uint32_t bits;
    score += 0.0f;  // -0 is 0
    std::memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | ~(uint32_t)item;
  }
  static float score_of(uint64_t key) {
    uint32_t bits = key >> 32;
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
  }

  int kept_ = 0, capacity_ = 0, size_ = 0, settled_ = 0;
  float threshold_ = 0;
  Excluded excluded_{};
  std::vector<float> scores_;
  std::vector<int32_t> items_;
  std::vector<uint64_t> keys_;
};

}  // namespace nr
