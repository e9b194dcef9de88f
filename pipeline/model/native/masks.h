// The random masks of gate dropout: a function of a seed and of the gate's place alone, so that a step can be repeated.
#pragma once

#include "lanes.h"

namespace nr::training {

// SplitMix64 (Steele, Lea & Flood 2014): one step from a counter to a random number.
inline uint64_t mixed(uint64_t counter) {
  uint64_t z = counter * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The 32-bit finaliser of MurmurHash3 (Appleby), in every lane.
inline VU mixed(VU x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// The masks of one training position: which of its gates are kept.
class Masks {
 public:
  static constexpr int PER_NUMBER = 4;  // pairs of components that share a 32-bit random number, a byte each

  // Of the 256 values of a byte `num_dropped` drop a gate.
  Masks(uint64_t seed, int64_t position, int num_dropped)
      : key_(mixed(seed ^ mixed((uint64_t)position + 1))), num_dropped_(num_dropped) {}

  bool drops() const { return num_dropped_ > 0; }

  // A random number for every item of the lanes, for the pairs from `pair`, a multiple of PER_NUMBER.
  VU numbers(VU items, int pair) const {
    const uint64_t own = mixed(key_ + (uint64_t)(pair / PER_NUMBER));
    return mixed(mixed(items + (uint32_t)own) + (uint32_t)(own >> 32));
  }

  // All bits are set in the lanes in which the pair is kept.
  VI kept(VU numbers, int pair) const {
    return (VI)((numbers >> (8 * (pair % PER_NUMBER))) & 255) >= num_dropped_;
  }

 private:
  uint64_t key_;
  int num_dropped_;
};

}  // namespace nr::training
