// Pages of keys and values: how they lie, how new tokens are stored in them, and which of them a token sees.
//
// A page holds 16 tokens of one layer and head: keys as [E, 16], so that a vector is one feature of 16 tokens, values
// as [16, E], so that a vector is 16 features of one token. New tokens may be a tree of guesses: then a row sees what came
// before the tree and its own branch.

#pragma once

#include <bit>
#include <cstring>

#include "functions.h"

namespace {

constexpr int kPage = kLanes;     // tokens of a page
constexpr int kSpan = 128;        // keys between two rescalings
constexpr int kPages = kSpan / kPage;
constexpr float kNever = -0x1p100f;  // the score of a key that may not be seen: finite, and its multiples are exact

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

// cap * tanh(x / cap), with an error of some units in the last place of the cap.
inline Vector capped(Vector x, float cap) { return cap * (2.0f * sigmoid(x * (2.0f / cap)) - 1.0f); }

// Keys [start, start + count) of a sequence and head, and where their pages begin.
template <typename T>
struct Span {
  int start, count;
  const T *keys[kPages], *values[kPages];

  Span(const Batch& b, int sequence, int head, int from, int stop) : start(from), count(std::min(kSpan, stop - from)) {
    const int32_t* pages = b.pages + b.table[sequence];
    for (int p = 0; p * kPage < count; ++p) {
      const int64_t at = pages[start / kPage + p] * b.page_stride + int64_t{head} * kPage * b.dim;
      keys[p] = static_cast<const T*>(b.keys) + at;
      values[p] = static_cast<const T*>(b.values) + at;
    }
  }
  int pages() const { return (count + kPage - 1) / kPage; }
};

// The work of a batch: queries of some tokens of a sequence that read one key head.
struct Task {
  int sequence, head, row, tokens;
  int64_t cost;
};

// The keys that the tokens of a task see lie in [oldest, stop).
struct Reach {
  int oldest, stop;
};

inline Reach reach_of(const Batch& b, const Task& task, std::vector<Sight>& sights) {
  const int stop = b.past[task.sequence] + task.row - b.first[task.sequence] + task.tokens;
  int oldest = stop;
  sights.clear();
  for (int row = task.row; row < task.row + task.tokens; ++row) {
    sights.push_back(sight_of(b, row));
    oldest = std::min(oldest, sights.back().oldest);
  }
  return {oldest, stop};
}

}  // namespace
