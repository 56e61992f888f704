// Products of attention by the tiles of AMX: see attention_tiles.h.

#pragma once

#include "pairs.h"
#include "tiles.h"

namespace {

#if defined(SATCHEL_AMX)

inline bool may_attend_by_tiles() { return may_use_tiles(); }

// The compiler does not know that tiles are loaded from memory: here everything is written.
inline void written() { asm volatile("" : : : "memory"); }

// scores[16][kSpan] of a tile of queries with the keys of `pages` pages, or up to three more.
inline void score_tile(const uint16_t* q, const TileKeys& keys, int dim, int, int pages, float* scores) {
  const int blocks = dim / kBlock, page = blocks * kTile;
  written();
  for (int p = 0; p < pages; p += 4) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < blocks; ++i) {
      const uint16_t* k = keys.tiles + int64_t{p} * page + i * kTile;
      _tile_loadd(4, q + i * kTile, 64);
      _tile_loadd(6, k, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, k + page, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, k + 2 * page, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, k + 3 * page, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
    float* out = scores + p * kPage;
    _tile_stored(0, out, kSpan * 4);
    _tile_stored(1, out + kPage, kSpan * 4);
    _tile_stored(2, out + 2 * kPage, kSpan * 4);
    _tile_stored(3, out + 3 * kPage, kSpan * 4);
  }
  written();
}

// out[16][E] += shares * values, 32 features at a time; `keys`, a multiple of 32, of them.
inline void mix_tile(const uint16_t* shares, const TileValues& values, int dim, int, int keys, float* out) {
  const int64_t block = int64_t{dim} * kBlock, row = dim * 4;
  const uint16_t* from = values.tiles;
  written();
  for (int e = 0; e < dim; e += kBlock, from += 2 * kTile, out += kBlock) {
    _tile_loadd(0, out, row);
    _tile_loadd(1, out + kRows, row);
    for (int i = 0; i < keys / kBlock; ++i) {
      _tile_loadd(4, shares + i * kTile, 64);
      _tile_loadd(6, from + i * block, 64);
      _tile_loadd(7, from + i * block + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, row);
    _tile_stored(1, out + kRows, row);
  }
  written();
}

#endif

}  // namespace
