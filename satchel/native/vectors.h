// What the kernels for CPUs share: vectors of 16 floats as the compiler's own extension has them, numbers in float32 or
// bfloat16, and threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kWorthThreads = 1 << 16;  // multiplications below which one thread is quicker

using Vector = float __attribute__((vector_size(64), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

struct Half {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Half x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline Vector widen16(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline Vector widen16(const Half* from) {
  const auto halves = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Ints) << 16);
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, Half& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // a NaN stays one
}

inline void narrow16(Vector x, float* to) { *reinterpret_cast<Vector*>(to) = x; }
inline void narrow16(Vector x, Half* to) {
  const auto bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words kept = (bits & 0x7FFFFFFF) > 0x7F800000 ? Words{} + 0x7FC0 : rounded;  // a NaN stays one
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(kept, Halves);
}

inline float total(Vector x) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Calls piece(i) for i < count on up to `threads` threads, this one included.
template <typename Piece>
void each(int64_t count, int threads, Piece piece) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) piece(i);
  };
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < std::min<int64_t>(threads, count)) others.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that there are do all of it
  }
  work();
  for (auto& other : others) other.join();
}

}  // namespace
