// Pages of keys and values: how they lie, how new tokens are stored in them, and which of them a token sees.
//
// A page holds 16 tokens of one layer and head: keys as [E, 16], so that a vector is one feature of 16 tokens, values
// as [16, E], so that a vector is 16 features of one token. They lie there as they are, or as codes of 8 bits with the
// scales of the 16 tokens behind them: a number is its code times its token's scale. Codes are multiplied as they are;
// scores then take the keys' scales, and shares the values'. Scales are in bfloat16, so that a share of 1 loses nothing.
//
// New tokens may be a tree of guesses: then a row sees what came before the tree and its own branch.

#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "functions.h"

namespace {

constexpr int kPage = kLanes;     // tokens of a page
constexpr int kSpan = 128;        // keys between two rescalings
constexpr int kPages = kSpan / kPage;
constexpr float kNever = -0x1p100f;  // the score of a key that may not be seen: finite, and its multiples are exact

struct Batch {
  const void *q, *k, *v;   // [N, H, E], [N, K, E] and [N, K, E], rows `q_row` and `k_row` elements apart
  void *keys, *values;     // of the layer: page p begins at byte p * page_stride, its heads follow each other
  void* out;               // [N, H, E]
  const int32_t* pages;    // tables of all sequences, end to end
  const int32_t* table;    // [S] where in `pages` each begins
  const int32_t* first;    // [S + 1] row of each sequence's first new token
  const int32_t* past;     // [S] tokens before it
  const int64_t *limit, *seen, *position;  // [N] a row sees its sequence's slots below `limit`, whose tokens stand at as
                                           // many positions, and slot `limit + i` if bit i of `seen` is set
  int64_t page_stride, q_row, k_row;                // bytes; elements
  int32_t sequences, heads, kv_heads, dim, window;  // window: positions that a query sees, its own included; 0: all
  int32_t coded;                                    // whether pages hold codes
  float scale, cap;                                 // cap: scores become cap * tanh(score / cap); 0: not
};

struct Code {
  int8_t bits;
};
using Codes = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
using Shorts = int16_t __attribute__((vector_size(32)));

inline float widen(Code x) { return x.bits; }
inline Vector widen16(const Code* from) {
  const auto shorts = __builtin_convertvector(*reinterpret_cast<const Codes*>(from), Shorts);
  return __builtin_convertvector(__builtin_convertvector(shorts, Ints), Vector);
}

inline Pack widen_pack(const Code* from) {
  using Some = int8_t __attribute__((vector_size(kPack)));
  using Wider = int16_t __attribute__((vector_size(2 * kPack)));
  using Bits = int32_t __attribute__((vector_size(4 * kPack)));
  Some some;
  std::memcpy(&some, from, sizeof some);
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(some, Wider), Bits), Pack);
}

// C: what pages hold, Code or the numbers themselves.
template <typename C>
constexpr bool kCoded = std::is_same_v<C, Code>;

// The page of a head, within the keys or the values of the layer.
template <typename C>
C* page_of(const Batch& b, void* half, int32_t page, int head) {
  const int64_t bytes = kPage * (b.dim * sizeof(C) + (kCoded<C> ? sizeof(Half) : 0));
  return reinterpret_cast<C*>(static_cast<uint8_t*>(half) + page * b.page_stride + head * bytes);
}

// The scales of the tokens of a page of codes.
inline Half* scales_of(Code* page, int dim) { return reinterpret_cast<Half*>(page + kPage * dim); }
inline const Half* scales_of(const Code* page, int dim) { return reinterpret_cast<const Half*>(page + kPage * dim); }

// One token's numbers go into slot `slot` of a page, `step` apart from `out` on.
template <typename T>
void put(const T* x, int dim, T*, int, T* out, int step) {
  for (int e = 0; e < dim; ++e) out[e * step] = x[e];
}

// The largest becomes 127 or -127. What cannot be coded is 0 times a scale that is no number.
template <typename T>
void put(const T* x, int dim, Code* page, int slot, Code* out, int step) {
  uint32_t top = 0;  // as bits, among which no number is above all
  for (int e = 0; e < dim; ++e) top = std::max(top, std::bit_cast<uint32_t>(widen(x[e])) & 0x7FFFFFFF);
  Half& stored = scales_of(page, dim)[slot];
  narrow(std::bit_cast<float>(top) * (1.0f / 127.0f), stored);
  const float scale = widen(stored);
  const bool sound = scale >= FLT_MIN && scale <= FLT_MAX;
  if (scale < FLT_MIN) stored.bits = 0;
  for (int e = 0; e < dim; ++e)
    out[e * step].bits = sound ? static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(widen(x[e]) / scale))) : 0;
}

template <typename T, typename C>
void store_in(const Batch& b, int sequence, int head) {
  const int32_t* pages = b.pages + b.table[sequence];
  for (int row = b.first[sequence]; row < b.first[sequence + 1]; ++row) {
    const int at = b.past[sequence] + row - b.first[sequence], slot = at % kPage;
    const int64_t from = row * b.k_row + int64_t{head} * b.dim;
    C* keys = page_of<C>(b, b.keys, pages[at / kPage], head);
    C* values = page_of<C>(b, b.values, pages[at / kPage], head);
    put(static_cast<const T*>(b.k) + from, b.dim, keys, slot, keys + slot, kPage);
    put(static_cast<const T*>(b.v) + from, b.dim, values, slot, values + slot * b.dim, 1);
  }
}

template <typename T>
void store(const Batch& b, int sequence, int head) {
  b.coded ? store_in<T, Code>(b, sequence, head) : store_in<T, T>(b, sequence, head);
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

constexpr Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// -1 for each of the slots from `start` on that may not be seen.
inline Ints hidden(const Sight& sight, int start) {
  const Ints slot = lane + start;
  const Ints out = (slot >= sight.limit) | (slot < sight.oldest);
  const int from = start - sight.limit;  // the bit of the first
  if (!sight.seen || from <= -kPage || from >= 64) return out;
  const uint64_t bits = from < 0 ? sight.seen << -from : sight.seen >> from;
  const Ints branch = -(((Ints{} + static_cast<int32_t>(bits & 0xFFFF)) >> lane) & 1);
  return out & ~branch;
}

// cap * tanh(x / cap), with an error of some units in the last place of the cap.
template <typename V>
V capped(V x, float cap) {
  return cap * (2.0f * sigmoid(x * (2.0f / cap)) - 1.0f);
}

// Keys [start, start + count) of a sequence and head, and where their pages begin.
template <typename C>
struct Span {
  int start, count, dim;
  const C *keys[kPages], *values[kPages];

  Span(const Batch& b, int sequence, int head, int from, int stop)
      : start(from), count(std::min(kSpan, stop - from)), dim(b.dim) {
    const int32_t* pages = b.pages + b.table[sequence] + start / kPage;
    for (int p = 0; p * kPage < count; ++p) {
      keys[p] = page_of<C>(b, b.keys, pages[p], head);
      values[p] = page_of<C>(b, b.values, pages[p], head);
    }
    for (int p = this->pages(); p < kPages; ++p) keys[p] = keys[p - 1], values[p] = values[p - 1];  // may be read
  }
  int pages() const { return (count + kPage - 1) / kPage; }

  // Whether all of it may be seen, and all of its pages are full.
  bool seen_by(const Sight& sight) const {
    return sight.oldest <= start && sight.limit >= start + count && count % kPage == 0;
  }

  // Products with the keys of page p, times what stands before these.
  Vector scaled(int p, Vector score) const {
    if constexpr (kCoded<C>) return score * widen16(scales_of(keys[p], dim));
    return score;
  }
  // Shares of the values of page p, times what stands before these. Nobody knows what that is beyond the last token.
  Vector weighted(int p, Vector share) const {
    if constexpr (kCoded<C>) return lane < count - p * kPage ? share * widen16(scales_of(values[p], dim)) : Vector{};
    return share;
  }
};

}  // namespace
