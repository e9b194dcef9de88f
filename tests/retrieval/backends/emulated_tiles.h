// A plain model of Intel's matrix unit, in place of native/tiles.h: what is built on tiles is tested on any CPU.
//
// It is as strict as the real unit: a tile that is used unasked or without a shape ends the process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace nr {

constexpr int TILE = 16;  // rows of a tile, and 32-bit numbers in each

static const bool may_use_tiles = !std::getenv("EMULATED_TILES_ARE_REFUSED");

inline thread_local uint32_t tiles[8][TILE][TILE];
inline thread_local bool has_shape = false;

struct TileUse {
  TileUse() {
    if (!may_use_tiles) __builtin_trap();
    has_shape = true;
    std::memset(tiles, 0, sizeof tiles);
  }
  ~TileUse() { has_shape = false; }
  TileUse(const TileUse&) = delete;
};

inline void need_shape() {
  if (!has_shape) __builtin_trap();
}

template <int T>
inline void tile_zero() {
  need_shape();
  std::memset(tiles[T], 0, sizeof tiles[T]);
}
template <int T>
inline void tile_load(const void* from, int64_t stride_bytes) {
  need_shape();
  for (int row = 0; row < TILE; row++) std::memcpy(tiles[T][row], (const char*)from + row * stride_bytes, 64);
}
template <int T>
inline void tile_store(void* to, int64_t stride_bytes) {
  need_shape();
  for (int row = 0; row < TILE; row++) std::memcpy((char*)to + row * stride_bytes, tiles[T][row], 64);
}

inline float half_of(uint32_t pair, int half) {
  const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// First halves and second halves are summed apart, as the unit does.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  need_shape();
  for (int row = 0; row < TILE; row++)
    for (int column = 0; column < TILE; column++) {
      float sums[2] = {0, 0}, sum;
      for (int group = 0; group < TILE; group++)
        for (int half = 0; half < 2; half++)
          sums[half] += half_of(tiles[A][row][group], half) * half_of(tiles[B][group][column], half);
      std::memcpy(&sum, &tiles[C][row][column], 4);
      sum += sums[0] + sums[1];
      std::memcpy(&tiles[C][row][column], &sum, 4);
    }
}
template <int C, int A, int B>
inline void tile_dot_int8() {
  need_shape();
  for (int row = 0; row < TILE; row++)
    for (int column = 0; column < TILE; column++)
      for (int group = 0; group < TILE; group++)
        for (int shift = 0; shift < 32; shift += 8)
          tiles[C][row][column] += (uint32_t)((int)(uint8_t)(tiles[A][row][group] >> shift) *
                                              (int)(int8_t)(tiles[B][group][column] >> shift));
}

}  // namespace nr
