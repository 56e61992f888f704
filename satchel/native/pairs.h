// Keys and values as products in bfloat16 take them: two features, or two tokens, side by side.

#pragma once

#include "input.h"
#include "pages.h"

namespace {

#if defined(SATCHEL_BF16)

constexpr int kTile = kRows * kBlock;  // halves of a tile: 16 rows of 32, or 16 pairs of 16

// Codes a and c of 16 places side by side in bfloat16, in which codes are exact.
inline __m512i side_by_side(const Code* a, const Code* c) {
  const auto widened = [](const Code* from) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
  };
  return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(widened(a), 16), widened(c));
}

// Two features of 16 tokens side by side.
inline __m512i pair_features(const Half* page) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), _mm512_loadu_si512(page));
}
inline __m512i pair_features(const Code* page) { return side_by_side(page, page + kPage); }

struct Two {
  __m512i left, right;
};

// 32 features of two tokens side by side, of which `count` are there and the others zeros. On the left are those whose
// third bit is 0: see `in_order`.
inline Two pair_tokens(const Half* a, const Half* c, int count) {
  const __m512i first = count > 0 ? _mm512_loadu_si512(a) : __m512i{};
  const __m512i second = count > 1 ? _mm512_loadu_si512(c) : __m512i{};
  return {_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)};
}
// In order. Codes of a token that is not there are numbers, too, and its share is 0.
inline Two pair_tokens(const Code* a, const Code* c, int) {
  return {side_by_side(a, c), side_by_side(a + kRows, c + kRows)};
}

// Two vectors of the features that `pair_tokens` parted, in their order again.
inline void in_order(__m512 left, __m512 right, __m512* out) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  out[0] = _mm512_permutex2var_ps(left, low, right);
  out[1] = _mm512_permutex2var_ps(left, _mm512_add_epi32(low, _mm512_set1_epi32(8)), right);
}

// The keys of a span, read from its pages; what is read of the next span soon is asked for meanwhile, since these lie far
// from each other. keys(page, e): features e and e + 1 of the 16 tokens.
template <typename C>
struct PageKeys {
  const Span<C>&span, &next;

  __m512i operator()(int page, int e) const {
    __builtin_prefetch(next.keys[page] + e * kPage);
    return pair_features(span.keys[page] + e * kPage);
  }
};

// values(t, e): features [e, e + 32) of tokens t and t + 1 of the span.
template <typename C>
struct PageValues {
  const Span<C>&span, &next;

  Two operator()(int t, int e) const {
    const int64_t at = t % kPage * span.dim + e;
    __builtin_prefetch(next.values[t / kPage] + at);
    __builtin_prefetch(next.values[t / kPage] + at + span.dim);
    const C* token = span.values[t / kPage] + at;
    return pair_tokens(token, token + span.dim, span.count - t);
  }
};

// The same from tiles that were made of them: [pages][E / 32] and [keys / 32][E / 16] tiles.
struct TileKeys {
  const uint16_t* tiles;
  int dim;

  __m512i operator()(int page, int e) const { return _mm512_load_si512(tiles + (int64_t{page} * dim + e) * kPage); }
};

struct TileValues {
  const uint16_t* tiles;
  int dim;

  Two operator()(int t, int e) const {
    const uint16_t* left = tiles + (int64_t{t / kBlock} * dim + e) * kBlock + t % kBlock * kRows;
    return {_mm512_load_si512(left), _mm512_load_si512(left + kTile)};
  }
};

template <typename C>
TileKeys in_tiles(const PageKeys<C>& keys, int pages, int dim, uint16_t* tiles) {
  for (int p = 0; p < pages; ++p)
    for (int e = 0; e < dim; e += 2) _mm512_store_si512(tiles + (int64_t{p} * dim + e) * kPage, keys(p, e));
  return {tiles, dim};
}

template <typename C>
TileValues in_tiles(const PageValues<C>& values, int count, int dim, uint16_t* tiles) {
  for (int t = 0; t < count; t += 2)
    for (int e = 0; e < dim; e += kBlock) {
      const Two two = values(t, e);
      uint16_t* left = tiles + (int64_t{t / kBlock} * dim + e) * kBlock + t % kBlock * kRows;
      _mm512_store_si512(left, two.left);
      _mm512_store_si512(left + kTile, two.right);
    }
  return {tiles, dim};
}

#endif

}  // namespace
