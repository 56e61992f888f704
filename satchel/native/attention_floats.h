// Attention in float32, whatever pages hold: a few queries at a time, by vectors as wide as a register.

#pragma once

#include "attention_parts.h"
#include "tiles.h"

namespace {

constexpr int kQueries = 16;  // tokens of a sequence whose queries a thread takes at once
constexpr int kSharing = 4;   // queries that share one reading of the keys
constexpr int kPacks = kPage / kPack;  // of a page

// The queries of some tokens of one sequence that read one key head: row r is token r / group, query head r % group.
struct Rows {
  int count, group;
  std::vector<Sight> sights;  // of the tokens
  std::vector<float> q, states;
  State state;

  Tiles tiles() const { return Tiles(false, 0); }
};

// Asks for a page that is read soon: pages lie far from each other.
template <typename C>
void ask_for(const C* page, int dim) {
  for (int i = 0; i < kPage * dim; i += 64 / sizeof(C)) __builtin_prefetch(page + i);
}

// Products of rows [row, row + R) with the keys of P packs of a span.
template <typename C, int R, int P>
void score(const Batch& b, const Rows& rows, int row, const Span<C>& span, int pack, Pack (&out)[R][kSpan / kPack]) {
  const C* keys[P];
  for (int p = 0; p < P; ++p) keys[p] = span.keys[(pack + p) / kPacks] + (pack + p) % kPacks * kPack;
  Pack s[R][P] = {};
  const float* q = rows.q.data() + int64_t{row} * b.dim;
  for (int e = 0; e < b.dim; ++e)
    for (int p = 0; p < P; ++p) {
      const Pack k = widen_pack(keys[p] + e * kPage);
      for (int r = 0; r < R; ++r) s[r][p] += q[r * b.dim + e] * k;
    }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) out[r][pack + p] = s[r][p];
}

// Where values are read for the first time, those of the next span are asked for. Features [e, e + W packs) of: out = out * keep + sum over tokens of share * value, for rows [row, row + R).
template <typename C, int R, int W>
void mix_some(const Batch& b, float* out, int e, const float* weight, const float* keep, const Span<C>& span,
              const Span<C>* next) {
  Pack sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = widen_pack(out + r * b.dim + e + w * kPack) * keep[r];
  for (int t = 0; t < span.count; ++t) {
    if (next && t % kPage == 0) ask_for(next->values[t / kPage], b.dim);
    const C* value = span.values[t / kPage] + t % kPage * b.dim + e;
    for (int w = 0; w < W; ++w) {
      const Pack v = widen_pack(value + w * kPack);
      for (int r = 0; r < R; ++r) sum[r][w] += weight[r * kSpan + t] * v;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) std::memcpy(out + r * b.dim + e + w * kPack, &sum[r][w], sizeof(Pack));
}

template <typename C, int R>
void mix(const Batch& b, Rows& rows, int row, const float* weight, const float* keep, const Span<C>& span,
         const Span<C>& next) {
  constexpr int kWide = kPack == 16 ? 4 : 2;  // as the registers allow
  float* out = rows.state.out + int64_t{row} * b.dim;
  int e = 0;
  for (; e + kWide * kPack <= b.dim; e += kWide * kPack)
    mix_some<C, R, kWide>(b, out, e, weight, keep, span, row + e == 0 ? &next : nullptr);
  for (; e + kPack <= b.dim; e += kPack) mix_some<C, R, 1>(b, out, e, weight, keep, span, nullptr);
  for (; e < b.dim; ++e)
    for (int r = 0; r < R; ++r) {
      float sum = out[r * b.dim + e] * keep[r];
      for (int t = 0; t < span.count; ++t)
        sum = __builtin_fmaf(weight[r * kSpan + t], widen(span.values[t / kPage][t % kPage * b.dim + e]), sum);
      out[r * b.dim + e] = sum;
    }
}

// The scores of a row, scaled, capped and hidden where it may not look; gives the largest.
template <typename C>
float look_over(const Batch& b, const Sight& sight, const Span<C>& span, Pack* scores) {
  const int packs = span.pages() * kPacks;
  if constexpr (kCoded<C>)
    for (int p = 0; p < span.pages(); ++p) {
      auto& page = reinterpret_cast<Vector&>(scores[p * kPacks]);
      page = span.scaled(p, page);
    }
  if (b.cap > 0)
    for (int p = 0; p < packs; ++p) scores[p] = capped(scores[p], b.cap);
  if (!span.seen_by(sight))
    for (int p = 0; p < span.pages(); ++p) {
      auto& page = reinterpret_cast<Vector&>(scores[p * kPacks]);
      page = hidden(sight, span.start + p * kPage) ? all(kNever) : page;
    }
  Pack top = scores[0];
  for (int p = 1; p < packs; ++p) top = scores[p] > top ? scores[p] : top;
  return largest(top);
}

// The shares of a row, from its scores; gives their sum.
template <typename C>
float share_out(const Span<C>& span, float top, Pack* scores) {
  Pack sum = {};
  for (int p = 0; p < span.pages() * kPacks; ++p) sum += scores[p] = exponential(scores[p] - top);
  if constexpr (kCoded<C>)
    for (int p = 0; p < span.pages(); ++p) {
      auto& page = reinterpret_cast<Vector&>(scores[p * kPacks]);
      page = span.weighted(p, page);
    }
  return total(sum);
}

// Rows [row, row + R) look at the keys of a span.
template <typename C, int R>
void look(const Batch& b, const Span<C>& span, const Span<C>& next, int row, Rows& rows) {
  alignas(64) Pack s[R][kSpan / kPack];
  int pack = 0;
  for (int page = 0; page < span.pages(); ++page) {
    if (row == 0) ask_for(next.keys[page], b.dim);
    for (; pack + 2 <= (page + 1) * kPacks; pack += 2) score<C, R, 2>(b, rows, row, span, pack, s);
  }
  if (pack < span.pages() * kPacks) score<C, R, 1>(b, rows, row, span, pack, s);
  float keep[R];
  for (int r = 0; r < R; ++r) {
    float& highest = rows.state.top[row + r];
    const float top = std::max(highest, look_over(b, rows.sights[(row + r) / rows.group], span, s[r]));
    keep[r] = std::exp(highest - top);
    highest = top;
    rows.state.sum[row + r] = rows.state.sum[row + r] * keep[r] + share_out(span, top, s[r]);
  }
  mix<C, R>(b, rows, row, reinterpret_cast<const float*>(s), keep, span, next);
}

template <typename C>
void look_at(const Batch& b, const Span<C>& span, const Span<C>& next, Rows& rows) {
  int row = 0;
  for (; row + kSharing <= rows.count; row += kSharing) look<C, kSharing>(b, span, next, row, rows);
  switch (rows.count - row) {
    case 3: return look<C, 3>(b, span, next, row, rows);
    case 2: return look<C, 2>(b, span, next, row, rows);
    case 1: return look<C, 1>(b, span, next, row, rows);
  }
}

template <typename T>
void gather(const Batch& b, const Task& task, Rows& rows) {
  rows.q.resize(int64_t{rows.count} * b.dim);
  for (int r = 0; r < rows.count; ++r) {
    const T* q = static_cast<const T*>(b.q) + (task.row + r / rows.group) * b.q_row +
                 (int64_t{task.head} * rows.group + r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) rows.q[int64_t{r} * b.dim + e] = widen(q[e]) * b.scale;
  }
}

inline Vector power(Vector x, const Rows&) { return exponential(x); }

template <typename T, typename C>
void finish(const Batch& b, const Task& task, const Rows& rows, const State& found) {
  for (int r = 0; r < rows.count; ++r) {
    T* out = static_cast<T*>(b.out) + ((task.row + r / rows.group) * int64_t{b.heads} + task.head * rows.group +
                                      r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) narrow(found.out[int64_t{r} * b.dim + e] / found.sum[r], out[e]);
  }
}

}  // namespace
