// Rows of inputs as products take them, and their products with 4 bytes of 16 rows of a matrix.

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
#if defined(__AVX2__) && !defined(__AVX512F__)
#define SATCHEL_HALVES 1
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define SATCHEL_AMX 1
#endif

constexpr int kRows = kLanes;  // outputs of a tile
constexpr int kBlock = 32;     // inputs that share the scale of an activation

using Fours = int32_t __attribute__((vector_size(64), aligned(1), may_alias));
using Small = uint16_t __attribute__((vector_size(32), aligned(1), may_alias));

// Rows of inputs, as codes of 8 bits with a scale for each block of 32, or as bfloat16 in tiles of 16 rows and 32
// inputs. A block's inputs are scale * code; `total` is the sum of these, `lift` -8 times that of the codes.
struct Input {
  int8_t* codes;
  float *scale, *total;
  int32_t* lift;
  uint16_t* halves;
  int32_t rows, inputs;
  int blocks() const { return inputs / kBlock; }
  uint16_t* half(int row) const { return halves + int64_t{row / kRows} * kRows * inputs + row % kRows * kBlock; }
  int8_t* code(int row, int block) const { return codes + at(row, block) * kBlock; }
  int64_t at(int row, int block) const { return int64_t{row} * blocks() + block; }
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

// 16 bfloat16 as float32.
inline Vector bfloats(const uint8_t* from) {
  return as_floats(__builtin_convertvector(*reinterpret_cast<const Small*>(from), Ints) << 16);
}

// Of pairs of bfloat16 the first ones, and the second ones.
inline Vector even(Ints pairs) { return as_floats(pairs << 16); }
inline Vector odd(Ints pairs) { return as_floats(pairs & static_cast<int32_t>(0xFFFF0000)); }

#if defined(SATCHEL_VNNI) || (defined(SATCHEL_HALVES) && defined(__AVXVNNI__))
constexpr int kExcess = 128;
#else
constexpr int kExcess = 0;
#endif

#if defined(SATCHEL_HALVES)
// 8 of 16 rows: GCC keeps no vector of 64 bytes in two registers of 32, and would pass each through memory.
inline __m256i half_words(const uint8_t* from, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half);
}
inline __m256i& half_of(Ints& x, int half) { return reinterpret_cast<__m256i*>(&x)[half]; }

inline __m256i four_codes(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

// Of pairs of bfloat16 the first ones, and the second ones.
inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}

#if defined(__AVXVNNI__)
// sum[o] += w[o][k] * x[k] over k < 4; the bytes of w are below 16. In `finished` a sum of 8 such products at most.
inline __m256i dot_nibbles(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline __m256i finished(__m256i sum) { return sum; }

// The same for bytes from -128 to 127, plus kExcess times the sum of x, which the caller takes off beforehand.
inline __m256i dot_bytes(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x);
}
#else
// In 16 bits: 8 pairs of 15 * 128 twice are 30,720.
inline __m256i dot_nibbles(__m256i sum, __m256i w, __m256i x) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}
inline __m256i finished(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

// |w| * (x with the sign of w): 128 * 127 * 2 fits 16 bits.
inline __m256i dot_bytes(__m256i sum, __m256i w, __m256i x) {
  return _mm256_add_epi32(sum, finished(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
}
#endif

inline void add_half(__m256i x, Ints& sum, int half) { half_of(sum, half) = _mm256_add_epi32(half_of(sum, half), x); }
#else

// sum[o] += w[o][k] * x[k] over k < 4; the bytes of w are below 128.
inline Ints dot_small(Ints sum, Ints w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
#if defined(SATCHEL_VNNI)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                                                    _mm512_set1_epi32(four)));
#else
  for (int k = 0; k < 4; ++k) sum += ((w >> 8 * k) & 255) * x[k];
  return sum;
#endif
}

// The same for bytes from -128 to 127, plus kExcess times the sum of x, which the caller takes off beforehand.
inline Ints dot_signed(Ints sum, Ints w, const int8_t* x) {
#if defined(SATCHEL_VNNI)
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  const Ints raised = w ^ static_cast<int32_t>(0x80808080);
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(raised),
                                                    _mm512_set1_epi32(four)));
#else
  for (int k = 0; k < 4; ++k) sum += ((w << (24 - 8 * k)) >> 24) * x[k];
  return sum;
#endif
}
#endif

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

inline uint32_t total(Words x) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(reinterpret_cast<__m512i>(x)));
#else
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

// Row `row` of the inputs as codes: round(x / scale) with scale = max |x| / 127 of each 32.
[[gnu::noinline]] inline void encode(const float* from, const Input& x, int row) {
  for (int b = 0; b < x.blocks(); ++b) {
    const auto* in = reinterpret_cast<const Vector*>(from + b * kBlock);
    const Vector a0 = in[0] < 0 ? -in[0] : in[0], a1 = in[1] < 0 ? -in[1] : in[1];
    const float top = largest_or_nan((a0 > a1 ? a0 : a1) + ((a0 - a0) + (a1 - a1)));  // NaN where one is NaN or infinite
    const float scale = top / 127.0f, inverse = top == 0 ? 0.0f : 127.0f / top;
    // adding 1.5 * 2^23 rounds to the nearest integer, halves to even, which is then in the low bits
    const Words bits0 = reinterpret_cast<Words>(in[0] * inverse + 0x1.8p23f) - 0x4B400000;
    const Words bits1 = reinterpret_cast<Words>(in[1] * inverse + 0x1.8p23f) - 0x4B400000;
    using Bytes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
    auto* codes = reinterpret_cast<Bytes*>(x.code(row, b));
    codes[0] = __builtin_convertvector(bits0, Bytes);
    codes[1] = __builtin_convertvector(bits1, Bytes);
    const uint32_t sum = total(bits0 + bits1);
    const bool sound = inverse <= 0x1.fffffep127f;  // else codes are any bits: of no numbers, or below what can be told
    const int32_t of_codes = sound ? static_cast<int32_t>(sum) : 0;
    const int64_t at = x.at(row, b);
    x.scale[at] = scale;
    x.total[at] = scale * static_cast<float>(of_codes);
    x.lift[at] = -8 * of_codes;
  }
}

// Row `row` of the inputs as bfloat16.
inline void narrow_row(const float* from, const Input& x, int row) {
  uint16_t* out = x.half(row);
  for (int b = 0; b < x.blocks(); ++b, out += kRows * kBlock)
    for (int i = 0; i < kBlock; i += kLanes)
      narrow16(widen16(from + b * kBlock + i), reinterpret_cast<Half*>(out + i));
}

}  // namespace
