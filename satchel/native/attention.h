// Attention of ragged sequences over pages of keys and values: new tokens are stored, then attended from.
//
// Scores and sums are float32 whatever the pages hold. A query's result is computed in the same order whatever else is
// in the batch, however its past arrived, and on any number of threads: keys in spans of 128 from the first on, with a
// running maximum.

#pragma once

#include "attention_tiles.h"

namespace {

constexpr int kQueries = 16;  // tokens of a sequence whose queries a thread takes at once
constexpr int kSharing = 4;   // queries that share one reading of the keys

// The queries of some tokens of one sequence that read one key head: row r is token r / group, query head r % group.
struct Rows {
  int count, group;
  std::vector<Sight> sights;  // of the tokens
  std::vector<float> q, out, top, sum;
};

// Scores of rows [row, row + R) with the keys of P pages, scaled, capped, hidden where a row may not look.
template <typename C, int R, int P>
void score(const Batch& b, const Rows& rows, int row, const Span<C>& span, int page, Vector* out) {
  Vector s[R][P] = {};
  const float* q = rows.q.data() + int64_t{row} * b.dim;
  for (int e = 0; e < b.dim; ++e)
    for (int p = 0; p < P; ++p) {
      const Vector k = widen16(span.keys[page + p] + e * kPage);
      for (int r = 0; r < R; ++r) s[r][p] += q[r * b.dim + e] * k;
    }
  for (int r = 0; r < R; ++r) {
    const Sight& sight = rows.sights[(row + r) / rows.group];
    for (int p = 0; p < P; ++p) {
      s[r][p] = span.scaled(page + p, s[r][p]);
      if (b.cap > 0) s[r][p] = capped(s[r][p], b.cap);
      out[r * kPages + page + p] = hidden(sight, span.start + (page + p) * kPage) ? all(kNever) : s[r][p];
    }
  }
}

// Features [e, e + 16 W) of: out = out * keep + sum over tokens of share * value, for rows [row, row + R).
template <typename C, int R, int W>
void mix_some(const Batch& b, float* out, int e, const float* weight, const float* keep, const C* const* values,
              int keys) {
  Vector sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = reinterpret_cast<Vector*>(out + r * b.dim + e)[w] * keep[r];
  for (int t = 0; t < keys; ++t) {
    const C* value = values[t / kPage] + t % kPage * b.dim + e;
    for (int w = 0; w < W; ++w) {
      const Vector v = widen16(value + w * kPage);
      for (int r = 0; r < R; ++r) sum[r][w] += weight[r * kSpan + t] * v;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) reinterpret_cast<Vector*>(out + r * b.dim + e)[w] = sum[r][w];
}

template <typename C, int R>
void mix(const Batch& b, Rows& rows, int row, const Vector* share, const float* keep, const C* const* values, int keys) {
  const float* weight = reinterpret_cast<const float*>(share);
  float* out = rows.out.data() + int64_t{row} * b.dim;
  int e = 0;
  for (; e + 4 * kPage <= b.dim; e += 4 * kPage) mix_some<C, R, 4>(b, out, e, weight, keep, values, keys);
  for (; e + kPage <= b.dim; e += kPage) mix_some<C, R, 1>(b, out, e, weight, keep, values, keys);
  for (; e < b.dim; ++e)
    for (int r = 0; r < R; ++r) {
      float sum = out[r * b.dim + e] * keep[r];
      for (int t = 0; t < keys; ++t)
        sum = __builtin_fmaf(weight[r * kSpan + t], widen(values[t / kPage][t % kPage * b.dim + e]), sum);
      out[r * b.dim + e] = sum;
    }
}

// Rows [row, row + R) look at the keys of a span.
template <typename C, int R>
void look(const Batch& b, const Span<C>& span, int row, Rows& rows) {
  Vector s[R * kPages];
  const int pages = span.pages();
  int done = 0;
  for (; done + 2 <= pages; done += 2) score<C, R, 2>(b, rows, row, span, done, s);
  if (done < pages) score<C, R, 1>(b, rows, row, span, done, s);
  float keep[R];
  for (int r = 0; r < R; ++r) {
    Vector* mine = s + r * kPages;
    Vector highest = mine[0];
    for (int p = 1; p < pages; ++p) highest = mine[p] > highest ? mine[p] : highest;
    const float top = std::max(rows.top[row + r], largest(highest));
    keep[r] = std::exp(rows.top[row + r] - top);
    rows.top[row + r] = top;
    Vector sum = {};
    for (int p = 0; p < pages; ++p) sum += mine[p] = exponential(mine[p] - top);
    rows.sum[row + r] = rows.sum[row + r] * keep[r] + total(sum);
    for (int p = 0; p < pages; ++p) mine[p] = span.weighted(p, mine[p]);
  }
  mix<C, R>(b, rows, row, s, keep, span.values, span.count);
}

template <typename C>
void look(const Batch& b, const Span<C>& span, Rows& rows) {
  int row = 0;
  for (; row + kSharing <= rows.count; row += kSharing) look<C, kSharing>(b, span, row, rows);
  switch (rows.count - row) {
    case 3: return look<C, 3>(b, span, row, rows);
    case 2: return look<C, 2>(b, span, row, rows);
    case 1: return look<C, 1>(b, span, row, rows);
  }
}

template <typename T>
void gather(const Batch& b, const Task& task, Rows& rows) {
  for (int r = 0; r < rows.count; ++r) {
    const T* q = static_cast<const T*>(b.q) + (task.row + r / rows.group) * b.q_row +
                 (int64_t{task.head} * rows.group + r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) rows.q[int64_t{r} * b.dim + e] = widen(q[e]) * b.scale;
  }
}

template <typename T>
void finish(const Batch& b, const Task& task, const Rows& rows) {
  for (int r = 0; r < rows.count; ++r) {
    T* out = static_cast<T*>(b.out) + ((task.row + r / rows.group) * int64_t{b.heads} + task.head * rows.group +
                                      r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) narrow(rows.out[int64_t{r} * b.dim + e] / rows.sum[r], out[e]);
  }
}

template <typename T, typename C>
void look_in(const Batch& b, const Task& task, Rows& rows) {
  if constexpr (std::is_same_v<T, Half>)
    if (by_tiles<T>(b)) return look_by_tiles<C>(b, task);
  rows.group = b.heads / b.kv_heads;
  rows.count = task.tokens * rows.group;
  rows.q.resize(int64_t{rows.count} * b.dim);
  rows.out.assign(int64_t{rows.count} * b.dim, 0.0f);
  rows.top.assign(rows.count, kNever);
  rows.sum.assign(rows.count, 0.0f);
  gather<T>(b, task, rows);
  const Reach reach = reach_of(b, task, rows.sights);
  for (int start = reach.oldest / kSpan * kSpan; start < reach.stop; start += kSpan)
    look<C>(b, Span<C>(b, task.sequence, task.head, start, reach.stop), rows);
  finish<T>(b, task, rows);
}

template <typename T>
void look(const Batch& b, const Task& task, Rows& rows) {
  b.coded ? look_in<T, Code>(b, task, rows) : look_in<T, T>(b, task, rows);
}

// The longest come first.
template <typename T>
std::vector<Task> tasks_of(const Batch& b) {
  const int group = b.heads / b.kv_heads, most = by_tiles<T>(b) ? std::max(1, kTileQueries / group) : kQueries;
  std::vector<Task> tasks;
  for (int s = 0; s < b.sequences; ++s)
    for (int h = 0; h < b.kv_heads; ++h)
      for (int row = b.first[s]; row < b.first[s + 1]; row += most) {
        const int tokens = std::min(most, b.first[s + 1] - row);
        const int64_t keys = b.past[s] + row - b.first[s] + tokens;
        tasks.push_back({s, h, row, tokens, keys * tokens * group * b.dim});
      }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& c) { return a.cost > c.cost; });
  return tasks;
}

}  // namespace
