// Matrices in tiles of 16 rows (formats.h): their products with few rows of inputs, their numbers, their panels for AMX.

#pragma once

#include "formats.h"

namespace {

enum Kind : int32_t { kQ4_0, kQ4_1, kQ8_0, kQ4_K, kBF16, kInt8, kInt4, kInt4Low };  // as in linear.py

#if defined(__AVX512F__)
constexpr int kTogether = 8;  // rows of inputs that share one reading of the weights: as the registers allow
#else
constexpr int kTogether = 2;
#endif

struct Matrix {
  const uint8_t* tiles;
  const float* bias;  // [outputs]; null: none
  int32_t kind, outputs, inputs;
  int32_t group;  // inputs of a block
  int groups() const { return (outputs + kRows - 1) / kRows; }
};

template <typename Work>
auto by_format(const Matrix& m, Work work) {
  switch (m.kind) {
    case kQ4_0: return work(Q4_0{});
    case kQ4_1: return work(Q4_1{});
    case kQ8_0: return work(Q8_0{});
    case kQ4_K: return work(Q4_K{});
    case kBF16: return work(BF16{});
    case kInt8: return work(Int8{m.group});
    case kInt4: return work(Int4<false>{m.group});
    default: return work(Int4<true>{m.group});
  }
}

template <typename Format>
const uint8_t* group_of(const Format& format, const Matrix& m, int group) {
  return m.tiles + int64_t{group} * (m.inputs / format.inputs()) * format.bytes();
}

// Asks for what is read soon: the processor looks ahead by itself, but only to the end of a page of 4 KiB.
// Beyond the matrix nothing comes of it.
inline void look_ahead(const uint8_t* from, int64_t bytes) {
  constexpr int kAhead = 2048;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + kAhead + i);
}

template <int R, typename Format>
void few_rows(const Format& format, const uint8_t* tile, const Input& x, int row, Vector* out) {
  Vector sum[R] = {};
  for (int block = 0; block < x.blocks(); block += format.inputs() / kBlock, tile += format.bytes()) {
    look_ahead(tile, format.bytes());
    format.template few<R>(tile, x, row, block, sum);
  }
  for (int r = 0; r < R; ++r) out[r] = sum[r];
}

// The products of `count` <= kTogether rows of inputs, from `row` on, with the 16 outputs of a group.
[[gnu::noinline]] inline void few(const Matrix& m, int group, const Input& x, int row, int count, Vector* out) {
  by_format(m, [&](auto format) {
    const uint8_t* tile = group_of(format, m, group);
    switch (count) {
      case 1: return few_rows<1>(format, tile, x, row, out);
      case 2: return few_rows<2>(format, tile, x, row, out);
#if defined(__AVX512F__)
      case 3: return few_rows<3>(format, tile, x, row, out);
      case 4: return few_rows<4>(format, tile, x, row, out);
      case 5: return few_rows<5>(format, tile, x, row, out);
      case 6: return few_rows<6>(format, tile, x, row, out);
      case 7: return few_rows<7>(format, tile, x, row, out);
      case 8: return few_rows<8>(format, tile, x, row, out);
#endif
    }
  });
}

// The numbers of a group: emit(input, a, b) for every even input, those of 32 inputs together.
template <typename Emit>
void numbers_of(const Matrix& m, int group, Emit emit) {
  by_format(m, [&](auto format) {
    const uint8_t* tile = group_of(format, m, group);
    for (int first = 0; first < m.inputs; first += format.inputs(), tile += format.bytes())
      format.each(tile, [&](int input, Vector a, Vector b) { emit(first + input, a, b); });
  });
}

// Two inputs of 16 outputs as pairs of bfloat16; halves are rounded away from zero.
inline Ints pairs(Vector a, Vector b) {
  using Unsigned = uint32_t __attribute__((vector_size(64)));
  const Unsigned low = (reinterpret_cast<Unsigned>(a) + 0x8000u) >> 16;
  return reinterpret_cast<Ints>(low | ((reinterpret_cast<Unsigned>(b) + 0x8000u) & 0xFFFF0000u));
}

// A group as AMX multiplies by it: [inputs / 32][16 pairs][16 outputs][2] of bfloat16, made in `room` where it is not.
[[gnu::noinline]] inline const uint16_t* panel(const Matrix& m, int group, uint16_t* room) {
  if (m.kind == kBF16) return reinterpret_cast<const uint16_t*>(group_of(BF16{}, m, group));
  numbers_of(m, group, [&](int input, Vector a, Vector b) {
    const Ints both = pairs(a, b);
    std::memcpy(room + int64_t{input / 2} * 2 * kRows, &both, sizeof both);
  });
  return room;
}

}  // namespace
