// Attention of ragged sequences over pages of keys and values: new tokens are stored, then attended from.
//
// A page holds 16 tokens of one layer and head: keys as [E, 16], so that a vector is one feature of 16 tokens, values
// as [16, E], so that a vector is 16 features of one token. Scores and sums are float32 whatever the pages hold. A
// query's result is computed in the same order whatever else is in the batch, however its past arrived, and on any
// number of threads: keys in spans of 128 from the first on, with a running maximum. New tokens may be a tree of guesses:
// then a row sees what came before the tree and its own branch.

#pragma once

#include <cmath>
#include <cstring>

#include "functions.h"

namespace {

constexpr int kPage = kLanes;         // tokens of a page
constexpr int kSpan = 128;            // keys between two rescalings
constexpr int kQueries = 16;          // tokens of a sequence whose queries a thread takes at once
constexpr int kSharing = 4;              // queries that share one reading of the keys
constexpr float kNever = -1e30f;      // the score of a key that may not be seen; finite, so that its share is 0

struct Batch {
  const void *q, *k, *v;   // [N, H, E], [N, K, E] and [N, K, E], rows `q_row` and `k_row` elements apart
  void *keys, *values;     // of the layer: page p, head h lies at p * page_stride + h * 16 * E
  void* out;               // [N, H, E]
  const int32_t* pages;    // tables of all sequences, end to end
  const int32_t* table;    // [S] where in `pages` each begins
  const int32_t* first;    // [S + 1] row of each sequence's first new token
  const int32_t* past;     // [S] tokens before it
  const int64_t *limit, *seen, *position;  // [N] a row sees its sequence's slots below `limit`, whose tokens stand at as
                                           // many positions, and slot `limit + i` if bit i of `seen` is set
  int64_t page_stride, q_row, k_row;
  int32_t sequences, heads, kv_heads, dim, window;  // window: positions that a query sees, its own included; 0: all
  float scale, cap;                                 // cap: scores become cap * tanh(score / cap); 0: not
};

float largest(Vector x) {
  float out = x[0];
  for (int i = 1; i < kPage; ++i) out = std::max(out, x[i]);
  return out;
}

template <typename T>
void store(const Batch& b, int sequence, int head) {
  const int32_t* pages = b.pages + b.table[sequence];
  for (int row = b.first[sequence]; row < b.first[sequence + 1]; ++row) {
    const int at = b.past[sequence] + row - b.first[sequence];
    const int64_t page = pages[at / kPage] * b.page_stride + int64_t{head} * kPage * b.dim;
    const T* k = static_cast<const T*>(b.k) + row * b.k_row + int64_t{head} * b.dim;
    const T* v = static_cast<const T*>(b.v) + row * b.k_row + int64_t{head} * b.dim;
    T* keys = static_cast<T*>(b.keys) + page + at % kPage;
    for (int e = 0; e < b.dim; ++e) keys[e * kPage] = k[e];
    std::memcpy(static_cast<T*>(b.values) + page + at % kPage * b.dim, v, b.dim * sizeof(T));
  }
}

// The slots that a new token sees: [oldest, limit), and of those from `limit` on the ones with a bit.
struct Sight {
  int oldest, limit;
  uint64_t seen;
};

// A branch's slots rise with its positions, so that a window forgets the lowest first.
inline Sight sight_of(const Batch& b, int row) {
  Sight sight = {0, static_cast<int>(b.limit[row]), static_cast<uint64_t>(b.seen[row])};
  if (b.window <= 0) return sight;
  sight.oldest = std::max(0, static_cast<int>(b.position[row]) - b.window + 1);
  while (std::popcount(sight.seen) > b.window) sight.seen &= sight.seen - 1;
  return sight;
}

// -1 for each of the slots from `start` on that may not be seen.
inline Ints hidden(const Sight& sight, int start) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, slot = lane + start;
  const Ints out = (slot >= sight.limit) | (slot < sight.oldest);
  const int from = start - sight.limit;  // the bit of the first
  if (!sight.seen || from <= -kPage || from >= 64) return out;
  const uint64_t bits = from < 0 ? sight.seen << -from : sight.seen >> from;
  const Ints branch = -(((Ints{} + static_cast<int32_t>(bits & 0xFFFF)) >> lane) & 1);
  return out & ~branch;
}

// The queries of some tokens of one sequence that read one key head: row r is token r / group, query head r % group.
struct Rows {
  int count, group;
  std::vector<Sight> sights;  // of the tokens
  std::vector<float> q, out, top, sum;
};

// Scores of rows [row, row + R) with the keys of P pages, scaled, capped, hidden where a row may not look.
template <typename T, int R, int P>
void score(const Batch& b, const Rows& rows, int row, const T* const* keys, int start, Vector* out) {
  Vector s[R][P] = {};
  const float* q = rows.q.data() + int64_t{row} * b.dim;
  for (int e = 0; e < b.dim; ++e)
    for (int p = 0; p < P; ++p) {
      const Vector k = widen16(keys[p] + e * kPage);
      for (int r = 0; r < R; ++r) s[r][p] += q[r * b.dim + e] * k;
    }
  for (int r = 0; r < R; ++r) {
    const Sight& sight = rows.sights[(row + r) / rows.group];
    for (int p = 0; p < P; ++p) {
      if (b.cap > 0)
        for (int i = 0; i < kPage; ++i) s[r][p][i] = b.cap * std::tanh(s[r][p][i] / b.cap);
      out[r * (kSpan / kPage) + p] = hidden(sight, start + p * kPage) ? all(kNever) : s[r][p];
    }
  }
}

// Features [e, e + 16 W) of: out = out * keep + sum over tokens of share * value, for rows [row, row + R).
template <typename T, int R, int W>
void mix_some(const Batch& b, float* out, int e, const float* weight, const float* keep, const T* const* values,
              int keys) {
  Vector sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = reinterpret_cast<Vector*>(out + r * b.dim + e)[w] * keep[r];
  for (int t = 0; t < keys; ++t) {
    const T* value = values[t / kPage] + t % kPage * b.dim + e;
    for (int w = 0; w < W; ++w) {
      const Vector v = widen16(value + w * kPage);
      for (int r = 0; r < R; ++r) sum[r][w] += weight[r * kSpan + t] * v;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) reinterpret_cast<Vector*>(out + r * b.dim + e)[w] = sum[r][w];
}

template <typename T, int R>
void mix(const Batch& b, Rows& rows, int row, const Vector* share, const float* keep, const T* const* values, int keys) {
  const float* weight = reinterpret_cast<const float*>(share);
  float* out = rows.out.data() + int64_t{row} * b.dim;
  int e = 0;
  for (; e + 4 * kPage <= b.dim; e += 4 * kPage) mix_some<T, R, 4>(b, out, e, weight, keep, values, keys);
  for (; e + kPage <= b.dim; e += kPage) mix_some<T, R, 1>(b, out, e, weight, keep, values, keys);
  for (; e < b.dim; ++e)
    for (int r = 0; r < R; ++r) {
      float sum = out[r * b.dim + e] * keep[r];
      for (int t = 0; t < keys; ++t)
        sum = __builtin_fmaf(weight[r * kSpan + t], widen(values[t / kPage][t % kPage * b.dim + e]), sum);
      out[r * b.dim + e] = sum;
    }
}

// Rows [row, row + R) look at the keys [start, start + count), whose pages begin at keys[i] and values[i].
template <typename T, int R>
void span(const Batch& b, Rows& rows, int row, int start, int count, const T* const* keys, const T* const* values) {
  constexpr int kVectors = kSpan / kPage;
  Vector s[R * kVectors];
  const int pages = (count + kPage - 1) / kPage;
  int done = 0;
  for (; done + 2 <= pages; done += 2) score<T, R, 2>(b, rows, row, keys + done, start + done * kPage, s + done);
  if (done < pages) score<T, R, 1>(b, rows, row, keys + done, start + done * kPage, s + done);
  float keep[R];
  for (int r = 0; r < R; ++r) {
    Vector* mine = s + r * kVectors;
    Vector highest = mine[0];
    for (int p = 1; p < pages; ++p) highest = mine[p] > highest ? mine[p] : highest;
    const float top = std::max(rows.top[row + r], largest(highest));
    keep[r] = std::exp(rows.top[row + r] - top);
    rows.top[row + r] = top;
    Vector sum = {};
    for (int p = 0; p < pages; ++p) sum += mine[p] = exponential(mine[p] - top);
    rows.sum[row + r] = rows.sum[row + r] * keep[r] + total(sum);
  }
  mix<T, R>(b, rows, row, s, keep, values, count);
}

template <typename T>
void spans(const Batch& b, Rows& rows, int row, int start, int count, const T* const* keys, const T* const* values) {
  for (; row + kSharing <= rows.count; row += kSharing) span<T, kSharing>(b, rows, row, start, count, keys, values);
  switch (rows.count - row) {
    case 3: return span<T, 3>(b, rows, row, start, count, keys, values);
    case 2: return span<T, 2>(b, rows, row, start, count, keys, values);
    case 1: return span<T, 1>(b, rows, row, start, count, keys, values);
  }
}

template <typename T>
void gather(const Batch& b, Rows& rows, int head, int first_row) {
  for (int r = 0; r < rows.count; ++r) {
    const T* q = static_cast<const T*>(b.q) + (first_row + r / rows.group) * b.q_row +
                 (int64_t{head} * rows.group + r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) rows.q[int64_t{r} * b.dim + e] = widen(q[e]) * b.scale;
  }
}

template <typename T>
void finish(const Batch& b, const Rows& rows, int head, int first_row) {
  for (int r = 0; r < rows.count; ++r) {
    T* out = static_cast<T*>(b.out) + ((first_row + r / rows.group) * int64_t{b.heads} + head * rows.group +
                                      r % rows.group) * b.dim;
    for (int e = 0; e < b.dim; ++e) narrow(rows.out[int64_t{r} * b.dim + e] / rows.sum[r], out[e]);
  }
}

// The queries of up to kQueries tokens of a sequence, from row `first_row` of the batch on.
template <typename T>
void look(const Batch& b, int sequence, int head, int first_row, Rows& rows) {
  const int tokens = std::min(kQueries, b.first[sequence + 1] - first_row);
  rows.group = b.heads / b.kv_heads;
  rows.count = tokens * rows.group;
  rows.q.resize(int64_t{rows.count} * b.dim);
  rows.out.assign(int64_t{rows.count} * b.dim, 0.0f);
  rows.top.assign(rows.count, kNever);
  rows.sum.assign(rows.count, 0.0f);
  gather<T>(b, rows, head, first_row);
  const int32_t* pages = b.pages + b.table[sequence];
  const int stop = b.past[sequence] + first_row - b.first[sequence] + tokens;
  int oldest = stop;
  rows.sights.clear();
  for (int row = first_row; row < first_row + tokens; ++row) {
    rows.sights.push_back(sight_of(b, row));
    oldest = std::min(oldest, rows.sights.back().oldest);
  }
  for (int start = oldest / kSpan * kSpan; start < stop; start += kSpan) {
    const int count = std::min(kSpan, stop - start);
    const T *keys[kSpan / kPage], *values[kSpan / kPage];
    for (int p = 0; p * kPage < count; ++p) {
      const int64_t at = pages[start / kPage + p] * b.page_stride + int64_t{head} * kPage * b.dim;
      keys[p] = static_cast<const T*>(b.keys) + at;
      values[p] = static_cast<const T*>(b.values) + at;
    }
    spans<T>(b, rows, 0, start, count, keys, values);
  }
  finish<T>(b, rows, head, first_row);
}

// The work of a batch: queries of some tokens of a sequence that read one key head. The longest come first.
struct Task {
  int sequence, head, row;
  int64_t cost;
};

inline std::vector<Task> tasks_of(const Batch& b) {
  std::vector<Task> tasks;
  for (int s = 0; s < b.sequences; ++s)
    for (int h = 0; h < b.kv_heads; ++h)
      for (int row = b.first[s]; row < b.first[s + 1]; row += kQueries) {
        const int tokens = std::min(kQueries, b.first[s + 1] - row);
        const int64_t keys = b.past[s] + row - b.first[s] + tokens;
        tasks.push_back({s, h, row, keys * tokens * (b.heads / b.kv_heads) * b.dim});
      }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& c) { return a.cost > c.cost; });
  return tasks;
}

}  // namespace
