// What the kernels for CPUs share: vectors of 16 floats as the compiler's own extension has them, numbers in float32 or
// bfloat16, and threads.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"

namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kPack = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int kPack = 8;
#else
constexpr int kPack = 4;
#endif
constexpr int64_t kWorthThreads = 1 << 16;  // multiplications below which one thread is quicker

using Vector = float __attribute__((vector_size(64), aligned(4), may_alias));
using Pack = float __attribute__((vector_size(4 * kPack)));  // of larger ones GCC passes each through memory
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

inline Pack widen_pack(const float* from) {
  Pack out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
inline Pack widen_pack(const Half* from) {
  using Some = uint16_t __attribute__((vector_size(2 * kPack)));
  using Bits = int32_t __attribute__((vector_size(4 * kPack)));
  Some some;
  std::memcpy(&some, from, sizeof some);
  return reinterpret_cast<Pack>(__builtin_convertvector(some, Bits) << 16);
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

template <typename V>
float total(V x) {
  for (int half = sizeof(V) / sizeof(float) / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

}  // namespace
