// Products of rows of inputs with matrices, 32 outputs at a time: few rows by dot products, many by AMX.
//
// A row's result depends neither on the other rows nor on the number of threads; only on whether all of them were many,
// and with a matrix in bfloat16 not even on that.

#pragma once

#include "matrix.h"
#include "tiles.h"

namespace {

constexpr int kMany = 32;  // rows from which unpacking the weights for AMX pays; those in bfloat16 need none

#if defined(SATCHEL_AMX)

// out[32][32] = the products of one or two tiles of 16 rows of inputs with two panels.
template <bool Two>
void tile_product(const uint16_t* x, const uint16_t* a, const uint16_t* b, int blocks, float* out) {
  constexpr int kTile = kRows * kBlock;
  _tile_zero(0);
  _tile_zero(1);
  if (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < blocks; ++i) {
    _tile_loadd(6, a + i * kTile, 64);
    _tile_loadd(7, b + i * kTile, 64);
    _tile_loadd(4, x + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (Two) {
      _tile_loadd(5, x + (blocks + i) * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  if (Two) {
    _tile_stored(2, out + 512, 128);
    _tile_stored(3, out + 528, 128);
  }
}

#else

template <bool Two>
void tile_product(const uint16_t*, const uint16_t*, const uint16_t*, int, float*) {}

#endif

#if defined(SATCHEL_AMX)

// The products of up to 16 rows of inputs with one column of Q8_0, whose bytes lie as tiles of 8 bits take them. The same
// numbers as by `few`. Rows that are missing come to nothing that anybody reads, by the last one's scales: any bits as a
// number may be one that processors take long over.
[[gnu::noinline]] inline void sixteen(Column column, const Input& x, int row, Vector* out) {
  constexpr int kChunk = 8, kBytes = Q8_0::bytes();
  Ints dots[kChunk][kRows];
  Vector sum[kRows] = {};
  const float* scales[kRows];
  for (int r = 0; r < kRows; ++r) scales[r] = x.scale + x.at(std::min(row + r, x.rows - 1), 0);
  const uint8_t* tile = group_of(Q8_0{}, *column.matrix, column.group);
  for (int first = 0; first < x.blocks(); first += kChunk, tile += kChunk * kBytes) {
    const int count = std::min(kChunk, x.blocks() - first);
    for (int i = 0; i < count; ++i) {
      look_ahead(tile + i * kBytes, kBytes);
      _tile_zero(0);
      _tile_loadd(4, x.code(row, first + i), x.inputs);
      _tile_loadd(6, tile + i * kBytes + 2 * kRows, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_stored(0, dots[i], 64);
    }
    asm volatile("" : : : "memory");  // the compiler does not know what tiles write
    for (int i = 0; i < count; ++i) {
      const Vector scale = halves(tile + i * kBytes);
      for (int r = 0; r < kRows; ++r) sum[r] += scale * scales[r][first + i] * floats(dots[i][r]);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum[r];
}

#else

inline void sixteen(Column, const Input&, int, Vector*) {}

#endif

// Whether tiles of codes may be of use: they pay for Q8_0 from 13 rows on. Codes of 4 bits would first have to become 8.
inline bool may_use_codes(int rows) { return rows >= 13 && rows < kMany && may_use_tiles(); }

// How rows are brought to matrices, those in bfloat16 and all others.
inline bool by_tiles(int rows, bool bf16) { return (bf16 || rows >= kMany) && may_use_tiles(); }
inline bool as_halves(int rows, bool bf16) { return bf16 || by_tiles(rows, bf16); }

inline void prepare(const float* from, const Input& x, int row, bool as_halves) {
  as_halves ? narrow_row(from, x, row) : encode(from, x, row);
}

// Calls take(row, a, b) with the products of every row of inputs with two columns. `room`: 64 bytes an input.
template <typename Take>
void many_rows(Column left, Column right, const Input& x, uint16_t* room, Take take) {
  alignas(64) float out[32 * 32];
  const uint16_t* a = panel(*left.matrix, left.group, room);
  const uint16_t* b = panel(*right.matrix, right.group, room + int64_t{x.inputs} * kRows);
  for (int row = 0; row < x.rows; row += 32) {
    const int count = std::min(32, x.rows - row);
    count > kRows ? tile_product<true>(x.half(row), a, b, x.blocks(), out)
                  : tile_product<false>(x.half(row), a, b, x.blocks(), out);
    for (int r = 0; r < count; ++r) {
      const auto* both = reinterpret_cast<const Vector*>(out + 32 * r);
      take(row + r, both[0], both[1]);
    }
  }
}

template <typename Take>
void some_rows(Column left, Column right, const Input& x, Take take) {
  const bool codes = left.matrix->kind == kQ8_0 && right.matrix->kind == kQ8_0;
  for (int row = 0, count; row < x.rows; row += count) {
    const bool many = codes && may_use_codes(x.rows - row);
    count = std::min(many ? kRows : kTogether, x.rows - row);
    Vector a[kRows], b[kRows];
    if (many) {
      sixteen(left, x, row, a);
      sixteen(right, x, row, b);
    } else if (side_by_side(left, right, count)) {
      few_of_two(left, right, x, row, count, a, b);
    } else {
      few(left, x, row, count, a);
      few(right, x, row, count, b);
    }
    for (int r = 0; r < count; ++r) take(row + r, a[r], b[r]);
  }
}

template <typename Take>
void product(Column left, Column right, const Input& x, uint16_t* room, Take take) {
  by_tiles(x.rows, left.matrix->kind == kBF16) ? many_rows(left, right, x, room, take) : some_rows(left, right, x, take);
}

// Where the inputs of a call lie in scratch memory: see `room` in linear.py.
inline Input input_in(uint8_t* room, int rows, int inputs) {
  const int64_t padded = (int64_t{rows} + kRows - 1) / kRows * kRows * inputs;
  auto* scale = reinterpret_cast<float*>(room + padded);
  auto* total = scale + padded / kBlock;
  auto* lift = reinterpret_cast<int32_t*>(total + padded / kBlock);
  return {reinterpret_cast<int8_t*>(room), scale, total, lift, reinterpret_cast<uint16_t*>(room), rows, inputs};
}

}  // namespace
