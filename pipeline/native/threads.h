// A loop over tiles on several threads, started for each call: it takes milliseconds to seconds, the start microseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "tiles.h"

namespace nr {

// body(tile) for each tile, on workers that make() builds once per thread.
template <class Make>
inline void for_tiles(int64_t num_tiles, int num_threads, Make make) {
  std::atomic<int64_t> next{0};
  auto run = [&] {
    [[maybe_unused]] TileUse use;
    auto body = make();
    for (int64_t tile = next++; tile < num_tiles; tile = next++) body(tile);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < num_threads && t < num_tiles; t++) threads.emplace_back(run);
  run();
  for (auto& thread : threads) thread.join();
}

// The size of tiles, at most `most`, for which every thread gets the same number of tiles.
inline int64_t even_tile(int64_t num, int64_t most, int num_threads) {
  const int64_t rounds = std::max<int64_t>(1, (num + most * num_threads - 1) / (most * num_threads));
  return std::max<int64_t>(1, (num + rounds * num_threads - 1) / (rounds * num_threads));
}

}  // namespace nr
