// Attention in bfloat16, by AMX or by dot products of pairs: 16 queries at a time against the keys and values of a span.
//
// Queries, keys and values are multiplied as they are, shares rounded to bfloat16; the sum that they are divided by is of
// float32. A row of a tile is computed as if it were alone, so that it has the same bits in any company.

#pragma once

#include "attention_amx.h"
#include "attention_dots.h"
#include "attention_parts.h"

namespace {

#if defined(SATCHEL_BF16)

constexpr int kFewQueries = 8;
constexpr int kTileQueries = 96;  // queries that a thread takes at once: they share the reading of keys and values

struct alignas(64) Line {
  uint16_t halves[kBlock];
};

// What a thread attends with. R tiles of rows, E features; a tile of queries has 16 rows of 32 features.
struct TileRows {
  int count, group, blocks;  // rows; rows of a token; tiles of a query's features
  std::vector<Sight> sights;
  std::vector<Line> q;             // [R][E / 32] tiles
  std::vector<Line> keys, values;  // of a span, as in pairs.h
  std::vector<float> states;
  State state;  // features as `pair_tokens` parts them
  alignas(64) float scores[kRows * kSpan];
  alignas(64) uint16_t shares[kRows * kSpan];  // [4] tiles

  Tiles tiles() const { return Tiles(true, count); }
};

inline uint16_t* halves(std::vector<Line>& lines) { return lines[0].halves; }
inline __m512 m512(Vector x) { return reinterpret_cast<__m512>(x); }

template <typename T>
void gather(const Batch& b, const Task& task, TileRows& rows) {
  rows.blocks = b.dim / kBlock;
  rows.keys.resize(int64_t{kPages} * rows.blocks * kRows);
  rows.values.resize(int64_t{kPages} * rows.blocks * kRows);
  rows.q.assign(int64_t{padded(rows.count)} * rows.blocks, Line{});
  for (int r = 0; r < rows.count; ++r) {
    const auto* q = static_cast<const uint16_t*>(b.q) + (task.row + r / rows.group) * b.q_row +
                    (int64_t{task.head} * rows.group + r % rows.group) * b.dim;
    for (int i = 0; i < rows.blocks; ++i)
      std::memcpy(&rows.q[(int64_t{r / kRows} * rows.blocks + i) * kRows + r % kRows], q + i * kBlock, sizeof(Line));
  }
}

// The scores of a row, capped and hidden where it may not look; gives the largest of them, scaled.
template <typename C>
float look_over(const Batch& b, const Sight& sight, const Span<C>& span, float factor, Vector* scores) {
  const int pages = span.pages();
  for (int p = 0; p < pages; ++p) scores[p] = span.scaled(p, scores[p]);
  if (b.cap > 0)
    for (int p = 0; p < pages; ++p) scores[p] = capped(scores[p] * b.scale, b.cap);
  if (!span.seen_by(sight))
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

// Keys of pages, rounded up to tiles of 32.
inline int whole_blocks(int pages) { return (pages + 1) / 2 * kBlock; }

// A tile of rows, from `first` on, looks at a span.
template <typename C, typename Keys, typename Values>
void span_tile(const Batch& b, const Span<C>& span, const Keys& keys, const Values& values, int first, TileRows& rows) {
  const int count = std::min(kRows, rows.count - first), pages = span.pages();
  const float factor = 1.44269504f * (b.cap > 0 ? 1.0f : b.scale);  // in powers of two
  score_tile(halves(rows.q) + int64_t{first} * b.dim, keys, b.dim, count, pages, rows.scores);
  alignas(64) float top[kRows] = {};
  for (int r = 0; r < count; ++r) {
    auto* scores = reinterpret_cast<Vector*>(rows.scores + r * kSpan);
    const Sight& sight = rows.sights[(first + r) / rows.group];
    top[r] = std::max(rows.state.top[first + r], look_over(b, sight, span, factor, scores));
  }
  auto& before = reinterpret_cast<Vector&>(rows.state.top[first]);
  const Vector keep = two_to(before - reinterpret_cast<Vector&>(top));
  before = reinterpret_cast<Vector&>(top);
  float* out = rows.state.out + int64_t{first} * b.dim;
  for (int r = 0; r < count; ++r) {
    const auto* scores = reinterpret_cast<const Vector*>(rows.scores + r * kSpan);
    const float sum = share_out(span, scores, factor, top[r], rows.shares + r * kBlock);
    rows.state.sum[first + r] = rows.state.sum[first + r] * keep[r] + sum;
    for (int e = 0; e < b.dim; e += kLanes) reinterpret_cast<Vector&>(out[r * b.dim + e]) *= keep[r];
  }
  mix_tile(rows.shares, values, b.dim, count, whole_blocks(pages), out);
}

// All rows look at a span: a few at its pages, many at tiles that are made of these once.
template <typename C>
void look_at(const Batch& b, const Span<C>& span, const Span<C>& next, TileRows& rows) {
  const PageKeys<C> keys{span, next};
  const PageValues<C> values{span, next};
#if !defined(SATCHEL_AMX)
  if (rows.count <= kFewQueries) return span_tile(b, span, keys, values, 0, rows);
#endif
  const TileKeys many_keys = in_tiles(keys, span.pages(), b.dim, halves(rows.keys));
  const TileValues many_values = in_tiles(values, whole_blocks(span.pages()), b.dim, halves(rows.values));
  for (int first = 0; first < rows.count; first += kRows) span_tile(b, span, many_keys, many_values, first, rows);
}

inline Vector power(Vector x, const TileRows&) { return two_to(x); }

template <typename T, typename C>
void finish(const Batch& b, const Task& task, const TileRows& rows, const State& found) {
  for (int r = 0; r < rows.count; ++r) {
    Half* out = static_cast<Half*>(b.out) + ((task.row + r / rows.group) * int64_t{b.heads} + task.head * rows.group +
                                            r % rows.group) * b.dim;
    const float* sums = found.out + int64_t{r} * b.dim;
    for (int e = 0; e < b.dim; e += kBlock) {
      __m512 two[2] = {_mm512_loadu_ps(sums + e), _mm512_loadu_ps(sums + e + kRows)};
      if constexpr (!kCoded<C>) in_order(two[0], two[1], two);
      for (int i = 0; i < 2; ++i) narrow16(reinterpret_cast<Vector>(two[i]) / found.sum[r], out + e + i * kLanes);
    }
  }
}

template <typename T>
bool by_tiles(const Batch& b) {
  return std::is_same_v<T, Half> && b.dim % kBlock == 0 && may_attend_by_tiles();
}

#else

constexpr int kTileQueries = 0;
template <typename T>
bool by_tiles(const Batch&) {
  return false;
}

#endif

}  // namespace
