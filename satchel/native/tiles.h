// The tiles of AMX: whether this process may use them, and for how long a thread does.

#pragma once

#include <algorithm>

#include "input.h"

#if defined(SATCHEL_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(SATCHEL_AMX)

// Linux gives tiles to a process that has asked for them once.
inline bool may_use_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return may;
}

// Makes the tiles of this thread 16 rows of 64 bytes, for as long as it lives; 0 to 5, of rows, as many as there are. For
// codes, of which a block is 32 bytes: 4 and 5 rows of 32, 6 and 7, their other side, 8 rows.
class Tiles {
 public:
  Tiles(bool used, int rows, bool codes = false) : used_(used) {
    if (!used) return;
    Layout layout = {};
    layout.palette = 1;
    for (int i = 0; i < 8; ++i) {
      layout.bytes[i] = codes && (i == 4 || i == 5) ? kBlock : 64;
      layout.rows[i] = static_cast<uint8_t>(i < 6 ? std::min(rows, kRows) : codes ? kBlock / 4 : kRows);
    }
    asm volatile("" : : "r"(&layout) : "memory");  // gcc <= 12 drops the stores above: ggml-org/llama.cpp#20824
    _tile_loadconfig(&layout);
  }
  ~Tiles() {
    if (used_) _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  bool used_;
};

#else

inline bool may_use_tiles() { return false; }
struct Tiles {
  Tiles(bool, int, bool = false) {}
};

#endif

}  // namespace
