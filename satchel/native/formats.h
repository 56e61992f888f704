// The formats of matrices in tiles of 16 rows: how they lie in memory, their products with few rows, their numbers.
//
// A tile holds one block of each of 16 rows, field by field: 16 scales, (16 offsets,) then 4 bytes of each row after
// the other. So one 512-bit load feeds a dot product of 4 bytes for 16 rows, with the inputs broadcast from memory, and
// no sum runs across a register. As many bytes as the file has; only their order differs.
//
// Q4_0, Q4_1, Q8_0: blocks of 32 inputs, Q4_K: of 256, as GGUF defines them. BF16: blocks of 32, pairs of inputs.
// Int8, Int4: satchel's own, blocks of any multiple of 32, scales in bfloat16 (model/blocks.py).
//
// Each format has `inputs()` of a block and `bytes()` of a tile; `few`, which adds the products of R rows of inputs with
// one tile to their sums; and `each`, which calls emit(input, a, b) with inputs `input` and `input + 1` of the 16 rows,
// those of 32 inputs together. `block` counts blocks of 32 inputs.

#pragma once

#include "input.h"

namespace {

constexpr int32_t kNibbles = 0x0F0F0F0F;

// Products of R rows of codes with 4 N inputs in low nibbles, from `first` of a row's codes on, and as many in high ones,
// from `second` on.
#if defined(SATCHEL_HALVES)
template <int R, int N>
[[gnu::always_inline]] inline void add_nibbles(const uint8_t* nibbles, const int8_t* first, const int8_t* second,
                                               int64_t apart, Ints* low, Ints* high) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; ++half) {
    __m256i lows[R] = {}, highs[R] = {};
    for (int j = 0; j < N; ++j) {
      const __m256i w = half_words(nibbles + 64 * j, half);
      const __m256i w0 = _mm256_and_si256(w, mask), w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
      for (int r = 0; r < R; ++r) {
        const int64_t at = r * apart + 4 * j;
        lows[r] = dot_nibbles(lows[r], w0, four_codes(first + at));
        highs[r] = dot_nibbles(highs[r], w1, four_codes(second + at));
      }
    }
    for (int r = 0; r < R; ++r) {
      add_half(finished(lows[r]), low[r], half);
      add_half(finished(highs[r]), high[r], half);
    }
  }
}
#else
template <int R, int N>
[[gnu::always_inline]] inline void add_nibbles(const uint8_t* nibbles, const int8_t* first, const int8_t* second,
                                               int64_t apart, Ints* low, Ints* high) {
  for (int j = 0; j < N; ++j) {
    const Ints w = words(nibbles + 64 * j), w0 = w & kNibbles, w1 = (w >> 4) & kNibbles;
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * apart + 4 * j;
      low[r] = dot_small(low[r], w0, first + at);
      high[r] = dot_small(high[r], w1, second + at);
    }
  }
}
#endif

// Of a block of 32 inputs: low nibbles are inputs 0-15, high ones 16-31.
template <int R>
[[gnu::always_inline]] inline void add_nibbles(const uint8_t* nibbles, const Input& x, int row, int block, Ints* dots) {
  const int8_t* codes = x.code(row, block);
  add_nibbles<R, 4>(nibbles, codes, codes + 16, x.inputs, dots, dots);
}

// The same for 32 inputs of 8 bits, kExcess included.
template <int R>
[[gnu::always_inline]] inline void add_bytes(const uint8_t* bytes, const Input& x, int row, int block, Ints* dots) {
  const int8_t* codes = x.code(row, block);
#if defined(SATCHEL_HALVES)
  __m256i sums[R][2] = {};
  for (int j = 0; j < 8; ++j) {
    const __m256i w[] = {half_words(bytes + 64 * j, 0), half_words(bytes + 64 * j, 1)};
    for (int r = 0; r < R; ++r) {
      const __m256i four = four_codes(codes + int64_t{r} * x.inputs + 4 * j);
      for (int half = 0; half < 2; ++half) sums[r][half] = dot_bytes(sums[r][half], w[half], four);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half) add_half(sums[r][half], dots[r], half);
#else
  for (int j = 0; j < 8; ++j) {
    const Ints w = words(bytes + 64 * j);
    for (int r = 0; r < R; ++r) dots[r] = dot_signed(dots[r], w, codes + int64_t{r} * x.inputs + 4 * j);
  }
#endif
}

// The numbers of 32 inputs of 4 bits, from input `first` on: scale * q + offset.
template <typename Emit>
inline void each_nibble(const uint8_t* nibbles, Vector scale, Vector offset, int first, Emit emit) {
  for (int j = 0; j < 4; ++j) {
    const Ints w = words(nibbles + 64 * j);
    const auto value = [&](int shift) { return floats((w >> shift) & 15) * scale + offset; };
    emit(first + 4 * j, value(0), value(8));
    emit(first + 4 * j + 2, value(16), value(24));
    emit(first + 16 + 4 * j, value(4), value(12));
    emit(first + 16 + 4 * j + 2, value(20), value(28));
  }
}

// The numbers of 32 inputs of 8 bits: scale * q.
template <typename Emit>
inline void each_byte(const uint8_t* bytes, Vector scale, int first, Emit emit) {
  for (int j = 0; j < 8; ++j) {
    const Ints w = words(bytes + 64 * j);
    const auto value = [&](int k) { return floats((w << (24 - 8 * k)) >> 24) * scale; };
    emit(first + 4 * j, value(0), value(1));
    emit(first + 4 * j + 2, value(2), value(3));
  }
}

// sum += scale * factor * dots, sum += factor * dots, sum += x * factor.
#if defined(SATCHEL_HALVES)
inline __m256 half_floats(const Vector& x, int half) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(&x) + 8 * half);
}
inline void add_half(__m256 x, __m256 y, Vector& sum, int half) {
  auto* to = reinterpret_cast<float*>(&sum) + 8 * half;
  _mm256_storeu_ps(to, _mm256_fmadd_ps(x, y, _mm256_loadu_ps(to)));
}

inline void add_scaled(Vector& sum, const Vector& scale, float factor, Ints& dots) {
  for (int half = 0; half < 2; ++half) {
    const __m256 by = _mm256_mul_ps(half_floats(scale, half), _mm256_set1_ps(factor));
    add_half(by, _mm256_cvtepi32_ps(half_of(dots, half)), sum, half);
  }
}
inline void add_scaled(Vector& sum, float factor, Ints& dots) {
  for (int half = 0; half < 2; ++half)
    add_half(_mm256_set1_ps(factor), _mm256_cvtepi32_ps(half_of(dots, half)), sum, half);
}
inline void add_product(Vector& sum, const Vector& x, float factor) {
  for (int half = 0; half < 2; ++half) add_half(half_floats(x, half), _mm256_set1_ps(factor), sum, half);
}
#else
inline void add_scaled(Vector& sum, Vector scale, float factor, Ints dots) { sum += scale * factor * floats(dots); }
inline void add_scaled(Vector& sum, float factor, Ints dots) { sum += factor * floats(dots); }
inline void add_product(Vector& sum, Vector x, float factor) { sum += x * factor; }
#endif

struct Q4_0 {
  static constexpr int inputs() { return 32; }
  static constexpr int bytes() { return 18 * kRows; }

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Ints dots[R];
    for (int r = 0; r < R; ++r) dots[r] = Ints{} + x.lift[x.at(row + r, block)];
    add_nibbles<R>(tile + 2 * kRows, x, row, block, dots);
    const Vector scale = halves(tile);
    for (int r = 0; r < R; ++r) add_scaled(sum[r], scale, x.scale[x.at(row + r, block)], dots[r]);
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    each_nibble(tile + 2 * kRows, halves(tile), halves(tile) * -8.0f, 0, emit);
  }
};

struct Q4_1 {
  static constexpr int inputs() { return 32; }
  static constexpr int bytes() { return 20 * kRows; }

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Ints dots[R] = {};
    add_nibbles<R>(tile + 4 * kRows, x, row, block, dots);
    const Vector scale = halves(tile), offset = halves(tile + 2 * kRows);
    for (int r = 0; r < R; ++r) {
      const int64_t at = x.at(row + r, block);
      add_scaled(sum[r], scale, x.scale[at], dots[r]);
      add_product(sum[r], offset, x.total[at]);
    }
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    each_nibble(tile + 4 * kRows, halves(tile), halves(tile + 2 * kRows), 0, emit);
  }
};

struct Q8_0 {
  static constexpr int inputs() { return 32; }
  static constexpr int bytes() { return 34 * kRows; }

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Ints dots[R];
    for (int r = 0; r < R; ++r) dots[r] = Ints{} + kExcess / 8 * x.lift[x.at(row + r, block)];
    add_bytes<R>(tile + 2 * kRows, x, row, block, dots);
    const Vector scale = halves(tile);
    for (int r = 0; r < R; ++r) add_scaled(sum[r], scale, x.scale[x.at(row + r, block)], dots[r]);
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    each_byte(tile + 2 * kRows, halves(tile), 0, emit);
  }
};

struct Q4_K {
  static constexpr int inputs() { return 256; }
  static constexpr int bytes() { return 144 * kRows; }

  // Of block `i` of the 8: scale and offset, multiples of 6 bits. See `_k_scales` in model/encodings.py.
  struct Scales {
    Vector scale, offset;
    Ints a, b, low;

    explicit Scales(const uint8_t* tile)
        : scale(halves(tile)), offset(halves(tile + 2 * kRows)), a(words(tile + 4 * kRows)),
          b(words(tile + 8 * kRows)), low(words(tile + 12 * kRows)) {}

    Vector scale_of(int i) const {
      const int at = 8 * (i & 3);
      return scale * floats(i < 4 ? (a >> at) & 63 : ((low >> at) & 15) | ((a >> (at + 6)) & 3) << 4);
    }
    Vector offset_of(int i) const {
      const int at = 8 * (i & 3);
      return offset * floats(i < 4 ? (b >> at) & 63 : ((low >> (at + 4)) & 15) | ((b >> (at + 6)) & 3) << 4);
    }
  };

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    const Scales scales(tile);
    for (int i = 0; i < 8; i += 2) {
      Ints low[R] = {}, high[R] = {};
      const int8_t* codes = x.code(row, block + i);
      add_nibbles<R, 8>(nibbles(tile, i, 0), codes, codes + kBlock, x.inputs, low, high);
      add<R>(low, scales.scale_of(i), scales.offset_of(i), x, row, block + i, sum);
      add<R>(high, scales.scale_of(i + 1), scales.offset_of(i + 1), x, row, block + i + 1, sum);
    }
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    const Scales scales(tile);
    for (int i = 0; i < 8; ++i) {
      const Vector scale = scales.scale_of(i), offset = scales.offset_of(i);
      for (int j = 0; j < 8; ++j) {
        const Ints w = words(nibbles(tile, i, j)) >> 4 * (i & 1);
        const auto value = [&](int k) { return floats((w >> 8 * k) & 15) * scale - offset; };
        emit(kBlock * i + 4 * j, value(0), value(1));
        emit(kBlock * i + 4 * j + 2, value(2), value(3));
      }
    }
  }

  template <int R>
  static void add(Ints* dots, Vector scale, Vector offset, const Input& x, int row, int block, Vector* sum) {
    for (int r = 0; r < R; ++r) {
      const int64_t at = x.at(row + r, block);
      add_scaled(sum[r], scale, x.scale[at], dots[r]);
      add_product(sum[r], offset, -x.total[at]);
    }
  }

  // Low nibbles of 32 bytes are block 2 s, high ones block 2 s + 1.
  static const uint8_t* nibbles(const uint8_t* tile, int i, int j) { return tile + 16 * kRows + 64 * (8 * (i / 2) + j); }
};

struct BF16 {
  static constexpr int inputs() { return 32; }
  static constexpr int bytes() { return 64 * kRows; }

#if defined(SATCHEL_BF16) && !defined(SATCHEL_AMX)
  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Vector part[R] = {};  // each block begins anew: the blocks' chains of sums run side by side
    for (int i = 0; i < kBlock / 2; ++i) {
      const Ints w = words(tile + 64 * i);
      for (int r = 0; r < R; ++r)
        part[r] = reinterpret_cast<Vector>(_mm512_dpbf16_ps(
            reinterpret_cast<__m512>(part[r]), reinterpret_cast<__m512bh>(w),
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair(x, row + r, block, i)))));
    }
    for (int r = 0; r < R; ++r) sum[r] += part[r];
  }
#elif defined(SATCHEL_HALVES)
  // As below.
  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    for (int half = 0; half < 2; ++half) {
      __m256 evens[R] = {}, odds[R] = {};
      for (int i = 0; i < kBlock / 2; ++i) {
        const __m256i w = half_words(tile + 64 * i, half);
        for (int r = 0; r < R; ++r) {
          const __m256i two = _mm256_set1_epi32(pair(x, row + r, block, i));
          evens[r] = _mm256_fmadd_ps(first_of(w), first_of(two), evens[r]);
          odds[r] = _mm256_fmadd_ps(second_of(w), second_of(two), odds[r]);
        }
      }
      for (int r = 0; r < R; ++r) add_half(_mm256_add_ps(evens[r], odds[r]), _mm256_set1_ps(1), sum[r], half);
    }
  }
#else
  // Sums in the order of AMX, and products of bfloat16 are exact in float32: so both ways give the same bits.
  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Vector evens[R] = {}, odds[R] = {};
    add<R>(tile, x, row, block, even, evens);
    add<R>(tile, x, row, block, odd, odds);
    for (int r = 0; r < R; ++r) sum[r] += evens[r] + odds[r];
  }

  template <int R, typename Half>
  [[gnu::always_inline]] static void add(const uint8_t* tile, const Input& x, int row, int block, Half half, Vector* sum) {
    for (int i = 0; i < kBlock / 2; ++i) {
      const Vector w = half(words(tile + 64 * i));
      for (int r = 0; r < R; ++r) sum[r] += w * half(Ints{} + pair(x, row + r, block, i));
    }
  }
#endif

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    for (int i = 0; i < kBlock / 2; ++i) emit(2 * i, even(words(tile + 64 * i)), odd(words(tile + 64 * i)));
  }

  static int32_t pair(const Input& x, int row, int block, int i) {
    int32_t two;
    std::memcpy(&two, x.half(row) + int64_t{block} * kRows * kBlock + 2 * i, sizeof two);
    return two;
  }
};

struct Int8 {
  int group;
  int inputs() const { return group; }
  int64_t bytes() const { return (2 + int64_t{group}) * kRows; }

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Vector part[R] = {};
    for (int i = 0; i < group / kBlock; ++i) {
      Ints dots[R];
      for (int r = 0; r < R; ++r) dots[r] = Ints{} + kExcess / 8 * x.lift[x.at(row + r, block + i)];
      add_bytes<R>(codes(tile, i), x, row, block + i, dots);
      for (int r = 0; r < R; ++r) add_scaled(part[r], x.scale[x.at(row + r, block + i)], dots[r]);
    }
    const Vector scale = bfloats(tile);
    for (int r = 0; r < R; ++r) sum[r] += scale * part[r];
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    for (int i = 0; i < group / kBlock; ++i) each_byte(codes(tile, i), bfloats(tile), i * kBlock, emit);
  }

  static const uint8_t* codes(const uint8_t* tile, int i) { return tile + (2 + int64_t{i} * kBlock) * kRows; }
};

// Scale * q + low, or, without low ones, scale * (q - 8).
template <bool Low>
struct Int4 {
  static constexpr int kLead = (Low ? 4 : 2) * kRows;
  int group;
  int inputs() const { return group; }
  int64_t bytes() const { return kLead + int64_t{group} / 2 * kRows; }

  template <int R>
  void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) const {
    Vector part[R] = {};
    float inputs[R] = {};
    for (int i = 0; i < group / kBlock; ++i) {
      Ints dots[R];
      for (int r = 0; r < R; ++r) dots[r] = Ints{} + (Low ? 0 : x.lift[x.at(row + r, block + i)]);
      add_nibbles<R>(codes(tile, i), x, row, block + i, dots);
      for (int r = 0; r < R; ++r) {
        const int64_t at = x.at(row + r, block + i);
        add_scaled(part[r], x.scale[at], dots[r]);
        if (Low) inputs[r] += x.total[at];
      }
    }
    const Vector scale = bfloats(tile);
    for (int r = 0; r < R; ++r) sum[r] += scale * part[r];
    if (Low)
      for (int r = 0; r < R; ++r) sum[r] += bfloats(tile + 2 * kRows) * inputs[r];
  }

  template <typename Emit>
  void each(const uint8_t* tile, Emit emit) const {
    const Vector scale = bfloats(tile), offset = Low ? bfloats(tile + 2 * kRows) : scale * -8.0f;
    for (int i = 0; i < group / kBlock; ++i) each_nibble(codes(tile, i), scale, offset, i * kBlock, emit);
  }

  static const uint8_t* codes(const uint8_t* tile, int i) { return tile + kLead + int64_t{i} * kBlock / 2 * kRows; }
};

}  // namespace
