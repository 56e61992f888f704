// Attention in bfloat16 by AMX: 16 queries at a time against the keys and values of a span.
//
// Queries, keys and values are multiplied as they are, shares rounded to bfloat16; the sum that they are divided by is of
// float32. A row of a tile is computed as if it were alone, so that it has the same bits in any company.

#pragma once

#include "pages.h"
#include "tiles.h"

namespace {

#if defined(SATCHEL_AMX)

constexpr int kTile = kRows * kBlock;  // halves of a tile
constexpr int kTileQueries = 96;       // queries that a thread takes at once: they share the reading of keys and values

struct alignas(64) Line {
  uint16_t halves[kBlock];
};

// What a thread attends with. R tiles of rows, E features; a tile of queries has 16 rows of 32 features.
struct TileRows {
  int count, group, blocks;  // rows; rows of a token; tiles of a query's features
  std::vector<Sight> sights;
  std::vector<Line> q;             // [R][E / 32] tiles
  std::vector<Line> keys, values;  // of a span: [8 pages][E / 32] and [4][E / 16] tiles, pairs of rows interleaved
  std::vector<float> out, top, sum;  // [R * 16][E], features as `pair_tokens` parts them; [R * 16]
  alignas(64) float scores[kRows * kSpan];
  alignas(64) uint16_t shares[kRows * kSpan];  // [4] tiles
};

inline uint16_t* halves(std::vector<Line>& lines) { return lines[0].halves; }
inline __m512 m512(Vector x) { return reinterpret_cast<__m512>(x); }

// The compiler does not know that tiles are loaded from memory: here everything is written.
inline void written() { asm volatile("" : : : "memory"); }

inline void gather(const Batch& b, const Task& task, TileRows& rows) {
  const int tiles = (rows.count + kRows - 1) / kRows;
  rows.q.assign(int64_t{tiles} * rows.blocks * kRows, Line{});
  for (int r = 0; r < rows.count; ++r) {
    const auto* q = static_cast<const uint16_t*>(b.q) + (task.row + r / rows.group) * b.q_row +
                    (int64_t{task.head} * rows.group + r % rows.group) * b.dim;
    for (int i = 0; i < rows.blocks; ++i)
      std::memcpy(&rows.q[(int64_t{r / kRows} * rows.blocks + i) * kRows + r % kRows], q + i * kBlock, sizeof(Line));
  }
}

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

template <typename C>
void pair_keys(const C* page, int dim, uint16_t* out) {
  for (int e = 0; e < dim; e += 2) _mm512_store_si512(out + e * kPage, pair_features(page + e * kPage));
}

// 32 features of two tokens side by side, of which `left` are there and the others zeros, in two tiles. That on the left
// has those whose third bit is 0: see `in_order`.
inline void pair_tokens(const Half* a, const Half* c, int left, uint16_t* to) {
  const __m512i first = left > 0 ? _mm512_loadu_si512(a) : __m512i{};
  const __m512i second = left > 1 ? _mm512_loadu_si512(c) : __m512i{};
  _mm512_store_si512(to, _mm512_unpacklo_epi16(first, second));
  _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(first, second));
}
// In order. Codes of a token that is not there are numbers, too, and its share is 0.
inline void pair_tokens(const Code* a, const Code* c, int, uint16_t* to) {
  _mm512_store_si512(to, side_by_side(a, c));
  _mm512_store_si512(to + kTile, side_by_side(a + kRows, c + kRows));
}

template <typename C>
void pair_values(const Span<C>& span, int dim, uint16_t* out) {
  const int features = dim / kRows;
  for (int t = 0; t < (span.count + kBlock - 1) / kBlock * kBlock; t += 2) {
    const C *a = span.values[std::min(t, span.count - 1) / kPage] + t % kPage * dim, *c = a + dim;
    uint16_t* to = out + int64_t{t / kBlock} * features * kTile + t % kBlock * kRows;
    for (int e = 0; e < dim; e += kBlock, to += 2 * kTile) pair_tokens(a + e, c + e, span.count - t, to);
  }
}

// Two vectors of the features that `pair_tokens` parted, in their order again.
inline void in_order(__m512 left, __m512 right, __m512* out) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  out[0] = _mm512_permutex2var_ps(left, low, right);
  out[1] = _mm512_permutex2var_ps(left, _mm512_add_epi32(low, _mm512_set1_epi32(8)), right);
}

// scores[16][kSpan] of a tile of queries with the keys of `pages` pages, or up to three more.
inline void score_tile(const uint16_t* q, const uint16_t* keys, int blocks, int pages, float* scores) {
  const int page = blocks * kTile;
  for (int p = 0; p < pages; p += 4) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < blocks; ++i) {
      const uint16_t* k = keys + int64_t{p} * page + i * kTile;
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
}

// out[16][E] += shares * values, 32 features at a time; `blocks` of 32 keys.
inline void mix_tile(const uint16_t* shares, const uint16_t* values, int blocks, int dim, float* out) {
  const int64_t block = int64_t{dim / kRows} * kTile, row = dim * 4;
  for (int e = 0; e < dim; e += kBlock, values += 2 * kTile, out += kBlock) {
    _tile_loadd(0, out, row);
    _tile_loadd(1, out + kRows, row);
    for (int i = 0; i < blocks; ++i) {
      _tile_loadd(4, shares + i * kTile, 64);
      _tile_loadd(6, values + i * block, 64);
      _tile_loadd(7, values + i * block + kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out, row);
    _tile_stored(1, out + kRows, row);
  }
}

// The scores of a row, capped and hidden where it may not look; gives the largest of them, scaled.
template <typename C>
float look_over(const Batch& b, const Sight& sight, const Span<C>& span, float factor, Vector* scores) {
  const bool all_seen = sight.oldest <= span.start && sight.limit >= span.start + span.count;
  const int pages = span.pages();
  for (int p = 0; p < pages; ++p) scores[p] = span.scaled(p, scores[p]);
  if (b.cap > 0)
    for (int p = 0; p < pages; ++p) scores[p] = capped(scores[p] * b.scale, b.cap);
  if (!all_seen || span.count % kPage)
    for (int p = 0; p < pages; ++p) scores[p] = hidden(sight, span.start + p * kPage) ? all(kNever) : scores[p];
  Vector top = scores[0];
  for (int p = 1; p < pages; ++p) top = scores[p] > top ? scores[p] : top;
  return _mm512_reduce_max_ps(m512(top)) * factor;
}

// Two to the x for x <= 0, to 2 units in the last place.
inline Vector two_to(Vector x) {
  const __m512 whole = _mm512_roundscale_ps(m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector r = x - reinterpret_cast<Vector>(whole);
  Vector y = all(1.32187e-3f);
  y = y * r + 9.6717e-3f;
  y = y * r + 5.550893e-2f;
  y = y * r + 2.4022238e-1f;
  y = y * r + 6.9314686e-1f;
  y = y * r + 1.0f;
  return reinterpret_cast<Vector>(_mm512_scalef_ps(m512(y), whole));
}

// The shares of a row, from its scores; gives their sum.
template <typename C>
float share_out(const Span<C>& span, const Vector* scores, float factor, float top, uint16_t* shares) {
  const int pages = span.pages();
  Vector sum = {};
  for (int p = 0; p < pages; p += 2, shares += kTile) {
    const Vector a = two_to(scores[p] * factor - top);
    const Vector c = p + 1 < pages ? two_to(scores[p + 1] * factor - top) : Vector{};
    sum += a + c;
    const Vector first = span.weighted(p, a), second = p + 1 < pages ? span.weighted(p + 1, c) : Vector{};
    _mm512_store_si512(shares, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(m512(second), m512(first))));
  }
  return _mm512_reduce_add_ps(m512(sum));
}

// A tile of rows, from `first` on, looks at a span.
template <typename C>
void span_tile(const Batch& b, const Span<C>& span, int first, TileRows& rows) {
  const int count = std::min(kRows, rows.count - first), pages = span.pages();
  const float factor = 1.44269504f * (b.cap > 0 ? 1.0f : b.scale);  // in powers of two
  score_tile(halves(rows.q) + int64_t{first} * rows.blocks * kBlock, halves(rows.keys), rows.blocks, pages, rows.scores);
  alignas(64) float top[kRows] = {};
  for (int r = 0; r < count; ++r) {
    auto* scores = reinterpret_cast<Vector*>(rows.scores + r * kSpan);
    const Sight& sight = rows.sights[(first + r) / rows.group];
    top[r] = std::max(rows.top[first + r], look_over(b, sight, span, factor, scores));
  }
  auto& before = reinterpret_cast<Vector&>(rows.top[first]);
  const Vector keep = two_to(before - reinterpret_cast<Vector&>(top));
  before = reinterpret_cast<Vector&>(top);
  float* out = rows.out.data() + int64_t{first} * b.dim;
  for (int r = 0; r < count; ++r) {
    const auto* scores = reinterpret_cast<const Vector*>(rows.scores + r * kSpan);
    const float sum = share_out(span, scores, factor, top[r], rows.shares + r * kBlock);
    rows.sum[first + r] = rows.sum[first + r] * keep[r] + sum;
    for (int e = 0; e < b.dim; e += kLanes) reinterpret_cast<Vector&>(out[r * b.dim + e]) *= keep[r];
  }
  written();
  mix_tile(rows.shares, halves(rows.values), (pages + 1) / 2, b.dim, out);
}

template <typename C>
void finish(const Batch& b, const Task& task, const TileRows& rows) {
  for (int r = 0; r < rows.count; ++r) {
    Half* out = static_cast<Half*>(b.out) + ((task.row + r / rows.group) * int64_t{b.heads} + task.head * rows.group +
                                            r % rows.group) * b.dim;
    const float* sums = rows.out.data() + int64_t{r} * b.dim;
    for (int e = 0; e < b.dim; e += kBlock) {
      __m512 two[2] = {_mm512_loadu_ps(sums + e), _mm512_loadu_ps(sums + e + kRows)};
      if constexpr (!kCoded<C>) in_order(two[0], two[1], two);
      for (int i = 0; i < 2; ++i) narrow16(reinterpret_cast<Vector>(two[i]) / rows.sum[r], out + e + i * kLanes);
    }
  }
}

template <typename T>
bool by_tiles(const Batch& b) {
  return std::is_same_v<T, Half> && b.dim % kBlock == 0 && may_use_tiles();
}

template <typename C>
void look_by_tiles(const Batch& b, const Task& task) {
  thread_local TileRows rows;
  rows.group = b.heads / b.kv_heads;
  rows.count = task.tokens * rows.group;
  rows.blocks = b.dim / kBlock;
  const int64_t padded = (rows.count + kRows - 1) / kRows * kRows;
  rows.out.assign(padded * b.dim, 0.0f);
  rows.top.assign(padded, kNever);
  rows.sum.assign(padded, 0.0f);
  rows.keys.resize(int64_t{kPages} * rows.blocks * kRows);
  rows.values.resize(int64_t{kPages} * rows.blocks * kRows);
  gather(b, task, rows);
  const Reach reach = reach_of(b, task, rows.sights);
  const Tiles configured(true, rows.count);
  for (int start = reach.oldest / kSpan * kSpan; start < reach.stop; start += kSpan) {
    const Span<C> span(b, task.sequence, task.head, start, reach.stop);
    for (int p = 0; p < span.pages(); ++p)
      pair_keys(span.keys[p], b.dim, halves(rows.keys) + int64_t{p} * rows.blocks * kTile);
    pair_values(span, b.dim, halves(rows.values));
    written();
    for (int first = 0; first < rows.count; first += kRows) span_tile(b, span, first, rows);
  }
  finish<C>(b, task, rows);
}

#else

constexpr int kTileQueries = 0;
template <typename T>
bool by_tiles(const Batch&) {
  return false;
}
template <typename C>
void look_by_tiles(const Batch&, const Task&) {}

#endif

}  // namespace
