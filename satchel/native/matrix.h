// Matrices in tiles of 16 rows: how their formats lie in memory, their products with few rows of inputs, their numbers.
//
// A tile holds one block of each of 16 rows, field by field: 16 scales, (16 offsets,) then 4 bytes of each row after
// the other. So one 512-bit load feeds a dot product of 4 bytes for 16 rows, with the inputs broadcast from memory, and
// no sum runs across a register. As many bytes as the file has; only their order differs.
//
// Q4_0, Q4_1, Q8_0: blocks of 32 inputs, Q4_K: of 256, as GGUF defines them. BF16: blocks of 32, pairs of inputs.

#pragma once

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SATCHEL_VNNI 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SATCHEL_BF16 1
#endif

enum Kind : int32_t { kQ4_0, kQ4_1, kQ8_0, kQ4_K, kBF16 };

constexpr int kRows = kLanes;    // outputs of a tile
constexpr int kBlock = 32;       // inputs that share the scale of an activation
#if defined(__AVX512F__)
constexpr int kTogether = 8;     // rows of inputs that share one reading of the weights: as the registers allow
#else
constexpr int kTogether = 2;
#endif

using Fours = int32_t __attribute__((vector_size(64), aligned(1), may_alias));
using Small = uint16_t __attribute__((vector_size(32), aligned(1), may_alias));

struct Matrix {
  const uint8_t* tiles;
  const float* bias;  // [outputs]; null: none
  int32_t kind, outputs, inputs;
  int groups() const { return (outputs + kRows - 1) / kRows; }
};

// Rows of inputs, as codes of 8 bits with a scale for each block of 32, or as bfloat16 in tiles of 16 rows and 32
// inputs. A block's inputs are scale * code; `sum` is that of its codes.
struct Input {
  int8_t* codes;
  float* scale;
  int32_t* sum;
  uint16_t* halves;
  int32_t rows, inputs;
  int blocks() const { return inputs / kBlock; }
  uint16_t* half(int row) const { return halves + int64_t{row / kRows} * kRows * inputs + row % kRows * kBlock; }
};

inline Ints words(const uint8_t* from) { return *reinterpret_cast<const Fours*>(from); }
inline Vector as_floats(Ints bits) { return reinterpret_cast<Vector>(bits); }
inline Vector floats(Ints x) { return __builtin_convertvector(x, Vector); }

// 16 float16 as float32.
inline Vector halves(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
  const Ints bits = __builtin_convertvector(*reinterpret_cast<const Small*>(from), Ints);
  const Vector size = as_floats((bits & 0x7FFF) << 13) * 0x1p112f;  // exact, subnormal numbers too
  return as_floats(reinterpret_cast<Ints>(size) | (bits & 0x8000) << 16);
#endif
}

// sum[o] += w[o][k] * x[k] over k < 4; the bytes of w are below 128.
inline Ints dot_small(Ints sum, Ints w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
#if defined(SATCHEL_VNNI)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                                                    _mm512_set1_epi32(four)));
#elif defined(__AVX2__)
  const __m256i inputs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  __m256i halves[2];
  std::memcpy(halves, &w, sizeof w);
  for (auto& half : halves) half = _mm256_madd_epi16(_mm256_maddubs_epi16(half, inputs), ones);
  std::memcpy(&w, halves, sizeof w);
  return sum + w;
#else
  for (int k = 0; k < 4; ++k) sum += ((w >> 8 * k) & 255) * x[k];
  return sum;
#endif
}

// The same for bytes from -128 to 127, plus kExcess times the sum of x, which the caller takes off beforehand.
#if defined(SATCHEL_VNNI)
constexpr int kExcess = 128;
#else
constexpr int kExcess = 0;
#endif

inline Ints dot_signed(Ints sum, Ints w, const int8_t* x) {
#if defined(SATCHEL_VNNI)
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const Ints raised = w ^ static_cast<int32_t>(0x80808080);
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(raised),
                                                    _mm512_set1_epi32(four)));
#elif defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const __m256i inputs = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  __m256i halves[2];
  std::memcpy(halves, &w, sizeof w);
  for (auto& half : halves) {  // |w| * (x with the sign of w): 128 * 127 * 2 fits 16 bits
    const __m256i product = _mm256_maddubs_epi16(_mm256_abs_epi8(half), _mm256_sign_epi8(inputs, half));
    half = _mm256_madd_epi16(product, ones);
  }
  std::memcpy(&w, halves, sizeof w);
  return sum + w;
#else
  for (int k = 0; k < 4; ++k) sum += ((w << (24 - 8 * k)) >> 24) * x[k];
  return sum;
#endif
}

constexpr int32_t kNibbles = 0x0F0F0F0F;

// Each format has `kInputs` of a block and `kBytes` of a tile; `few`, which adds the products of R rows of inputs with
// one tile to their sums; and `each`, which calls emit(input, a, b) with inputs `input` and `input + 1` of the 16 rows.
// `block` counts blocks of 32 inputs.

struct Q4_0 {
  static constexpr int kInputs = 32, kBytes = 18 * kRows;

  template <int R>
  static void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) {
    add<R>(tile + 2 * kRows, halves(tile), -8, x, row, block, sum);
  }

  // The 4-bit integers of a tile: low nibbles are inputs 0-15, high ones 16-31; `offset` is added to each.
  template <int R>
  static void add(const uint8_t* nibbles, Vector scale, int offset, const Input& x, int row, int block, Vector* sum) {
    Ints dots[R];
    const int8_t* codes[R];
    for (int r = 0; r < R; ++r) {
      dots[r] = Ints{} + offset * x.sum[int64_t{row + r} * x.blocks() + block];
      codes[r] = x.codes + int64_t{row + r} * x.inputs + block * kBlock;
    }
    for (int j = 0; j < 4; ++j) {
      const Ints w = words(nibbles + 64 * j), low = w & kNibbles, high = (w >> 4) & kNibbles;
      for (int r = 0; r < R; ++r) {
        dots[r] = dot_small(dots[r], low, codes[r] + 4 * j);
        dots[r] = dot_small(dots[r], high, codes[r] + 16 + 4 * j);
      }
    }
    for (int r = 0; r < R; ++r) sum[r] += scale * x.scale[int64_t{row + r} * x.blocks() + block] * floats(dots[r]);
  }

  template <typename Emit>
  static void each(const uint8_t* tile, Emit emit) {
    numbers(tile + 2 * kRows, halves(tile), halves(tile) * -8.0f, emit);
  }

  template <typename Emit>
  static void numbers(const uint8_t* nibbles, Vector scale, Vector offset, Emit emit) {
    for (int j = 0; j < 4; ++j) {
      const Ints w = words(nibbles + 64 * j);
      const auto value = [&](int shift) { return floats((w >> shift) & 15) * scale + offset; };
      emit(4 * j, value(0), value(8));
      emit(4 * j + 2, value(16), value(24));
      emit(16 + 4 * j, value(4), value(12));
      emit(16 + 4 * j + 2, value(20), value(28));
    }
  }
};

struct Q4_1 {
  static constexpr int kInputs = 32, kBytes = 20 * kRows;

  template <int R>
  static void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) {
    Q4_0::add<R>(tile + 4 * kRows, halves(tile), 0, x, row, block, sum);
    const Vector offset = halves(tile + 2 * kRows);
    for (int r = 0; r < R; ++r) {
      const int64_t at = int64_t{row + r} * x.blocks() + block;
      sum[r] += offset * (x.scale[at] * static_cast<float>(x.sum[at]));
    }
  }

  template <typename Emit>
  static void each(const uint8_t* tile, Emit emit) {
    Q4_0::numbers(tile + 4 * kRows, halves(tile), halves(tile + 2 * kRows), emit);
  }
};

struct Q8_0 {
  static constexpr int kInputs = 32, kBytes = 34 * kRows;

  template <int R>
  static void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) {
    Ints dots[R];
    const int8_t* codes[R];
    for (int r = 0; r < R; ++r) {
      dots[r] = Ints{} - kExcess * x.sum[int64_t{row + r} * x.blocks() + block];
      codes[r] = x.codes + int64_t{row + r} * x.inputs + block * kBlock;
    }
    for (int j = 0; j < 8; ++j) {
      const Ints w = words(tile + 2 * kRows + 64 * j);
      for (int r = 0; r < R; ++r) dots[r] = dot_signed(dots[r], w, codes[r] + 4 * j);
    }
    const Vector scale = halves(tile);
    for (int r = 0; r < R; ++r) sum[r] += scale * x.scale[int64_t{row + r} * x.blocks() + block] * floats(dots[r]);
  }

  template <typename Emit>
  static void each(const uint8_t* tile, Emit emit) {
    const Vector scale = halves(tile);
    for (int j = 0; j < 8; ++j) {
      const Ints w = words(tile + 2 * kRows + 64 * j);
      const auto value = [&](int k) { return floats((w << (24 - 8 * k)) >> 24) * scale; };
      emit(4 * j, value(0), value(1));
      emit(4 * j + 2, value(2), value(3));
    }
  }
};

struct Q4_K {
  static constexpr int kInputs = 256, kBytes = 144 * kRows;

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
  static void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) {
    const Scales scales(tile);
    for (int i = 0; i < 8; ++i) {
      Ints dots[R] = {};
      for (int j = 0; j < 8; ++j) {
        const Ints w = (words(nibbles(tile, i, j)) >> 4 * (i & 1)) & kNibbles;
        for (int r = 0; r < R; ++r)
          dots[r] = dot_small(dots[r], w, x.codes + int64_t{row + r} * x.inputs + (block + i) * kBlock + 4 * j);
      }
      const Vector scale = scales.scale_of(i), offset = scales.offset_of(i);
      for (int r = 0; r < R; ++r) {
        const int64_t at = int64_t{row + r} * x.blocks() + block + i;
        sum[r] += scale * x.scale[at] * floats(dots[r]);
        sum[r] -= offset * (x.scale[at] * static_cast<float>(x.sum[at]));
      }
    }
  }

  template <typename Emit>
  static void each(const uint8_t* tile, Emit emit) {
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

  // Low nibbles of 32 bytes are block 2 s, high ones block 2 s + 1.
  static const uint8_t* nibbles(const uint8_t* tile, int i, int j) { return tile + 16 * kRows + 64 * (8 * (i / 2) + j); }
};

struct BF16 {
  static constexpr int kInputs = 32, kBytes = 64 * kRows;

  template <int R>
  static void few(const uint8_t* tile, const Input& x, int row, int block, Vector* sum) {
    for (int i = 0; i < kBlock / 2; ++i) {
      const Ints w = words(tile + 64 * i);
      for (int r = 0; r < R; ++r) {
        int32_t two;
        std::memcpy(&two, x.half(row + r) + int64_t{block} * kRows * kBlock + 2 * i, sizeof two);
#if defined(SATCHEL_BF16)
        sum[r] = reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[r]),
            reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_set1_epi32(two))));
#else
        sum[r] += even(w) * std::bit_cast<float>(two << 16);
        sum[r] += odd(w) * std::bit_cast<float>(two & static_cast<int32_t>(0xFFFF0000));
#endif
      }
    }
  }

  template <typename Emit>
  static void each(const uint8_t* tile, Emit emit) {
    for (int i = 0; i < kBlock / 2; ++i) emit(2 * i, even(words(tile + 64 * i)), odd(words(tile + 64 * i)));
  }

  static Vector even(Ints w) { return as_floats(w << 16); }
  static Vector odd(Ints w) { return as_floats(w & static_cast<int32_t>(0xFFFF0000)); }
};

template <typename Work>
auto by_format(int32_t kind, Work work) {
  switch (kind) {
    case kQ4_0: return work(Q4_0{});
    case kQ4_1: return work(Q4_1{});
    case kQ8_0: return work(Q8_0{});
    case kQ4_K: return work(Q4_K{});
    default: return work(BF16{});
  }
}

template <typename Format>
const uint8_t* group_of(const Matrix& m, int group) {
  return m.tiles + int64_t{group} * (m.inputs / Format::kInputs) * Format::kBytes;
}

template <typename Format, int R>
void few_rows(const uint8_t* tile, const Input& x, int row, Vector* out) {
  Vector sum[R] = {};
  for (int block = 0; block < x.blocks(); block += Format::kInputs / kBlock, tile += Format::kBytes)
    Format::template few<R>(tile, x, row, block, sum);
  for (int r = 0; r < R; ++r) out[r] = sum[r];
}

// The products of `count` <= kTogether rows of inputs, from `row` on, with the 16 outputs of a group.
[[gnu::noinline]] inline void few(const Matrix& m, int group, const Input& x, int row, int count, Vector* out) {
  by_format(m.kind, [&](auto format) {
    using Format = decltype(format);
    const uint8_t* tile = group_of<Format>(m, group);
    switch (count) {
      case 1: return few_rows<Format, 1>(tile, x, row, out);
      case 2: return few_rows<Format, 2>(tile, x, row, out);
#if defined(__AVX512F__)
      case 3: return few_rows<Format, 3>(tile, x, row, out);
      case 4: return few_rows<Format, 4>(tile, x, row, out);
      case 5: return few_rows<Format, 5>(tile, x, row, out);
      case 6: return few_rows<Format, 6>(tile, x, row, out);
      case 7: return few_rows<Format, 7>(tile, x, row, out);
      case 8: return few_rows<Format, 8>(tile, x, row, out);
#endif
    }
  });
}

// The numbers of a group: emit(input, a, b) for every even input.
template <typename Emit>
void numbers_of(const Matrix& m, int group, Emit emit) {
  by_format(m.kind, [&](auto format) {
    using Format = decltype(format);
    const uint8_t* tile = group_of<Format>(m, group);
    for (int first = 0; first < m.inputs; first += Format::kInputs, tile += Format::kBytes)
      Format::each(tile, [&](int input, Vector a, Vector b) { emit(first + input, a, b); });
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
  if (m.kind == kBF16) return reinterpret_cast<const uint16_t*>(group_of<BF16>(m, group));
  numbers_of(m, group, [&](int input, Vector a, Vector b) {
    const Ints both = pairs(a, b);
    std::memcpy(room + int64_t{input / 2} * 2 * kRows, &both, sizeof both);
  });
  return room;
}

inline float largest_or_nan(Vector x) {  // NaN if one is
#if defined(__AVX512F__)
  const auto v = reinterpret_cast<__m512>(x);
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) ? __builtin_nanf("") : _mm512_reduce_max_ps(v);
#else
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
#endif
}

// Row `row` of the inputs as codes: round(x / scale) with scale = max |x| / 127 of each 32.
[[gnu::noinline]] inline void encode(const float* from, const Input& x, int row) {
  int8_t* codes = x.codes + int64_t{row} * x.inputs;
  for (int b = 0; b < x.blocks(); ++b) {
    const auto* in = reinterpret_cast<const Vector*>(from + b * kBlock);
    const Vector a0 = in[0] < 0 ? -in[0] : in[0], a1 = in[1] < 0 ? -in[1] : in[1];
    const float top = largest_or_nan((a0 > a1 ? a0 : a1) + ((a0 - a0) + (a1 - a1)));  // NaN where one is NaN or infinite
    const float scale = top / 127.0f, inverse = top == 0 ? 0.0f : 127.0f / top;
    // adding 1.5 * 2^23 rounds to the nearest integer, halves to even, which is then in the low bits
    const Words bits0 = reinterpret_cast<Words>(in[0] * inverse + 0x1.8p23f) - 0x4B400000;
    const Words bits1 = reinterpret_cast<Words>(in[1] * inverse + 0x1.8p23f) - 0x4B400000;
    using Bytes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
    reinterpret_cast<Bytes*>(codes + b * kBlock)[0] = __builtin_convertvector(bits0, Bytes);
    reinterpret_cast<Bytes*>(codes + b * kBlock)[1] = __builtin_convertvector(bits1, Bytes);
    const Words both = bits0 + bits1;
    uint32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += both[i];
    x.scale[int64_t{row} * x.blocks() + b] = scale;
    const bool sound = inverse <= 0x1.fffffep127f;  // else codes are any bits: of no numbers, or below what can be told
    x.sum[int64_t{row} * x.blocks() + b] = sound ? static_cast<int32_t>(sum) : 0;
  }
}

// Row `row` of the inputs as bfloat16.
inline void narrow_row(const float* from, const Input& x, int row) {
  uint16_t* out = x.half(row);
  for (int b = 0; b < x.blocks(); ++b, out += kRows * kBlock)
    for (int i = 0; i < kBlock; ++i) {
      Half half;
      narrow(from[b * kBlock + i], half);
      out[i] = half.bits;
    }
}

}  // namespace
