// Matrices in tiles of 16 rows (formats.h): their products with few rows of inputs, their numbers, their panels for AMX.

#pragma once

#include "formats.h"

namespace {

enum Kind : int32_t { kQ4_0, kQ4_1, kQ8_0, kQ4_K, kBF16, kInt8, kInt4, kInt4Low };  // as in linear.py

#if defined(__AVX512F__)
constexpr int kTogether = 8;  // rows of inputs that share one reading of the weights: as the registers allow
#elif defined(SATCHEL_HALVES)
constexpr int kTogether = 4;
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

// The same with two groups side by side: memory gives more to two streams than to one, where these are long enough.
template <int R, typename Format>
void few_rows_of_two(const Format& format, const uint8_t* left, const uint8_t* right, const Input& x, int row, Vector* a,
                     Vector* b) {
  Vector sum[2][R] = {};
  const int64_t bytes = format.bytes();
  for (int block = 0; block < x.blocks(); block += format.inputs() / kBlock, left += bytes, right += bytes) {
    look_ahead(left, bytes);
    look_ahead(right, bytes);
    format.template few<R>(left, x, row, block, sum[0]);
    format.template few<R>(right, x, row, block, sum[1]);
  }
  for (int r = 0; r < R; ++r) a[r] = sum[0][r], b[r] = sum[1][r];
}

// 16 outputs of a matrix.
struct Column {
  const Matrix* matrix;
  int group;
};

// The products of `count` <= kTogether rows of inputs, from `row` on, with a column.
[[gnu::noinline]] inline void few(Column column, const Input& x, int row, int count, Vector* out) {
  by_format(*column.matrix, [&](auto format) {
    const uint8_t* tile = group_of(format, *column.matrix, column.group);
    switch (count) {
      case 1: return few_rows<1>(format, tile, x, row, out);
      case 2: return few_rows<2>(format, tile, x, row, out);
#if defined(__AVX512F__) || defined(SATCHEL_HALVES)
      case 3: return few_rows<3>(format, tile, x, row, out);
      case 4: return few_rows<4>(format, tile, x, row, out);
#endif
#if defined(__AVX512F__)
      case 5: return few_rows<5>(format, tile, x, row, out);
      case 6: return few_rows<6>(format, tile, x, row, out);
      case 7: return few_rows<7>(format, tile, x, row, out);
      case 8: return few_rows<8>(format, tile, x, row, out);
#endif
    }
  });
}

// Whether two columns are better multiplied side by side: not those of Q4_K, whose scales take the registers.
inline bool side_by_side(Column left, Column right, int count) {
  constexpr int kLong = 1024, kPair = 2;  // inputs, rows
  const Matrix &a = *left.matrix, &b = *right.matrix;
  return count <= kPair && a.inputs >= kLong && a.kind == b.kind && a.kind != kQ4_K && a.group == b.group;
}

// The products of `count` rows with two columns; the same numbers as by `few`.
[[gnu::noinline]] inline void few_of_two(Column left, Column right, const Input& x, int row, int count, Vector* a, Vector* b) {
  by_format(*left.matrix, [&](auto format) {
    const uint8_t *one = group_of(format, *left.matrix, left.group), *other = group_of(format, *right.matrix, right.group);
    switch (count) {
      case 1: return few_rows_of_two<1>(format, one, other, x, row, a, b);
      case 2: return few_rows_of_two<2>(format, one, other, x, row, a, b);
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
