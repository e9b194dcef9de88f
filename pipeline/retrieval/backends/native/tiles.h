// The matrix unit of Intel CPUs (AMX): eight tiles of sixteen rows of 64 bytes, and the product of two added to a third.
//
// With NR_EMULATED_TILES a plain model of the unit takes its place, so that what is built on it can be tested anywhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace nr {

constexpr int TILE = 16;  // rows of a tile, and 32-bit numbers in each

#if !defined(NR_AMX)

struct TileUse {};

#elif !defined(NR_EMULATED_TILES)

// A thread must hold one while it uses tiles.
class TileUse {
 public:
  TileUse() {
    alignas(64) uint8_t shape[64] = {1};  // palette 1, then 16-bit row lengths from byte 16 and row counts from byte 48
    for (int tile = 0; tile < 8; tile++) shape[16 + 2 * tile] = 64, shape[48 + tile] = TILE;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileUse() { asm volatile("tilerelease"); }
  TileUse(const TileUse&) = delete;
};

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride_bytes) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride_bytes) : "memory");
}
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// A unsigned, B signed.
template <int C, int A, int B>
inline void tile_dot_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

inline thread_local uint32_t tiles[8][TILE][TILE];
inline thread_local bool has_shape = false;  // on the real unit, a tile without a shape ends the process

struct TileUse {
  TileUse() {
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

#endif

}  // namespace nr
