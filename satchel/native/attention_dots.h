// Products of attention by dot products of pairs of bfloat16, where there is no AMX: see attention_tiles.h.

#pragma once

#include "pairs.h"

namespace {

#if defined(SATCHEL_BF16) && !defined(SATCHEL_AMX)

inline bool may_attend_by_tiles() { return true; }

// sums[R][C] += the products of R rows of a tile, from `from` on, with pairs of C columns.
template <int R, int C>
[[gnu::always_inline]] inline void add_products(const uint16_t* from, const __m512i (&columns)[C], __m512 (&sums)[R][C]) {
  for (int r = 0; r < R; ++r) {
    int32_t two;
    std::memcpy(&two, from + r * kBlock, sizeof two);
    const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
    for (int c = 0; c < C; ++c)
      sums[r][c] = _mm512_dpbf16_ps(sums[r][c], pair, reinterpret_cast<__m512bh>(columns[c]));
  }
}

// Where inputs `i` and `i + 1` of a tile's first row lie, in tiles of 32 inputs.
inline const uint16_t* pair_at(const uint16_t* tiles, int i) { return tiles + i / kBlock * kTile + i % kBlock; }

template <int R, typename Keys>
void score_rows(const uint16_t* q, const Keys& keys, int dim, int pages, float* scores) {
  for (int p = 0; p < pages; p += 4) {
    __m512 sums[R][4] = {};
    for (int e = 0; e < dim; e += 2) {
      const __m512i columns[] = {keys(p, e), keys(p + 1, e), keys(p + 2, e), keys(p + 3, e)};
      add_products(pair_at(q, e), columns, sums);
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 4; ++c) _mm512_storeu_ps(scores + r * kSpan + (p + c) * kPage, sums[r][c]);
  }
}

// Features [e, e + 16 C) of `out`.
template <int R, int C, typename Values>
void mix_some(const uint16_t* shares, const Values& values, int e, int dim, int keys, float* out) {
  __m512 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = _mm512_loadu_ps(out + r * dim + e + c * kLanes);
  for (int t = 0; t < keys; t += 2) {
    __m512i columns[C];
    for (int c = 0; c < C; c += 2) {
      const Two two = values(t, e + c * kLanes);
      columns[c] = two.left, columns[c + 1] = two.right;
    }
    add_products(pair_at(shares, t), columns, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * dim + e + c * kLanes, sums[r][c]);
}

template <int R, typename Values>
void mix_rows(const uint16_t* shares, const Values& values, int dim, int keys, float* out) {
  int e = 0;
  for (; e + 4 * kLanes <= dim; e += 4 * kLanes) mix_some<R, 4>(shares, values, e, dim, keys, out);
  for (; e < dim; e += 2 * kLanes) mix_some<R, 2>(shares, values, e, dim, keys, out);
}

// work(rows, first) for all of `count` rows, four at once as long as there are four; rows: a constant.
template <typename Work>
void by_fours(int count, Work work) {
  int first = 0;
  for (; first + 4 <= count; first += 4) work(std::integral_constant<int, 4>{}, first);
  switch (count - first) {
    case 3: return work(std::integral_constant<int, 3>{}, first);
    case 2: return work(std::integral_constant<int, 2>{}, first);
    case 1: return work(std::integral_constant<int, 1>{}, first);
  }
}

// scores[count][kSpan] of rows of a tile of queries with the keys of `pages` pages, or up to three more.
template <typename Keys>
void score_tile(const uint16_t* q, const Keys& keys, int dim, int count, int pages, float* scores) {
  by_fours(count, [&](auto rows, int r) { score_rows<rows>(q + r * kBlock, keys, dim, pages, scores + r * kSpan); });
}

// out[count][E] += shares * values, of `keys` keys.
template <typename Values>
void mix_tile(const uint16_t* shares, const Values& values, int dim, int count, int keys, float* out) {
  by_fours(count, [&](auto rows, int r) { mix_rows<rows>(shares + r * kBlock, values, dim, keys, out + r * dim); });
}

#endif

}  // namespace
