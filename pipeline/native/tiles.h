// The matrix unit of Intel CPUs (AMX): eight tiles of sixteen 64-byte rows; adds the product of two tiles to a third.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace nr {

constexpr int TILE = 16;  // rows of a tile, and 32-bit numbers in each

#ifndef NR_AMX

constexpr bool may_use_tiles = true;  // a library without tiles needs no permission
struct TileUse {};

#else

// Linux lends the tiles to a process that asks for them, and ends a process that uses them unasked with SIGILL. Loading
// the library asks, for all threads. (`static`: an inline variable would be one for all libraries of the process.)
constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
static const bool may_use_tiles = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;

// A thread must hold a TileUse while it uses tiles.
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
// A is unsigned, B signed.
template <int C, int A, int B>
inline void tile_dot_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace nr
