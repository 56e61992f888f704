// AMX in software, as Intel's manual has it: what needs a Xeon is tested on whatever has AVX-512.

#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Layout {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

struct Tiles {
  Layout layout;
  uint8_t data[8][16][64];
};
inline thread_local Tiles tiles;

inline int rows(int tile) {
  if (tiles.layout.palette != 1) std::abort();  // a processor stops a program that has not configured them
  return tiles.layout.rows[tile];
}

inline void load_config(const void* from) {
  std::memcpy(&tiles.layout, from, sizeof(Layout));
  std::memset(tiles.data, 0, sizeof tiles.data);
}
inline void release() { tiles.layout = {}; }
inline void zero(int tile) {
  rows(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(from) + r * stride, tiles.layout.bytes[tile]);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[tile][r], tiles.layout.bytes[tile]);
}

template <typename T>
T& at(int tile, int row, int i) {
  return reinterpret_cast<T*>(tiles.data[tile][row])[i];
}
inline float wide(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline void dot_bf16(int to, int a, int b) {
  for (int m = 0; m < rows(to); ++m)
    for (int n = 0; n < tiles.layout.bytes[to] / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < tiles.layout.bytes[a] / 4; ++k) {
        even += wide(at<uint16_t>(a, m, 2 * k)) * wide(at<uint16_t>(b, k, 2 * n));
        odd += wide(at<uint16_t>(a, m, 2 * k + 1)) * wide(at<uint16_t>(b, k, 2 * n + 1));
      }
      at<float>(to, m, n) += even + odd;
    }
}

inline void dot_int8(int to, int a, int b) {
  for (int m = 0; m < rows(to); ++m)
    for (int n = 0; n < tiles.layout.bytes[to] / 4; ++n)
      for (int k = 0; k < tiles.layout.bytes[a]; ++k)
        at<int32_t>(to, m, n) += at<int8_t>(a, m, k) * at<int8_t>(b, k / 4, 4 * n + k % 4);
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::dot_bf16
#define _tile_dpbssd emulated::dot_int8
#define syscall(...) 0  // the system gives tiles

#endif
