// Functions of some floats at once, a Vector or a Pack, each to a few units in the last place.

#pragma once

#include "vectors.h"

namespace {

inline Vector all(float x) { return Vector{} + x; }

template <typename V>
float largest(V x) {
  for (int half = sizeof(V) / sizeof(float) / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = std::max(x[i], x[i + half]);
  return x[0];
}

// e to the x for x <= 0, to 2 units in the last place; 0 below -87.
template <typename V>
V exponential(V x) {
  const V low = V{} - 87.0f;
  const auto gone = x < low;
  x = gone ? low : x;
  const V turns = x * 1.44269504f - 0.5f;
  const auto whole = __builtin_convertvector(turns, decltype(x < low));  // towards zero: up, since turns are negative
  const V n = __builtin_convertvector(whole, V);
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V y = V{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const V power = reinterpret_cast<V>((whole + 127) << 23);
  return gone ? V{} : y * power;
}

// The natural logarithm of normal x > 0, to 2 units in the last place, also next to 1.
inline Vector logarithm(Vector x) {
  const Ints bits = reinterpret_cast<Ints>(x);
  Ints exponent = ((bits >> 23) & 255) - 126;
  Vector m = reinterpret_cast<Vector>((bits & 0x7FFFFF) | 0x3F000000);  // [0.5, 1)
  const Ints low = m < all(0.70710678f);
  exponent += low;  // a comparison that holds is -1
  m = (low ? m + m : m) - 1.0f;
  const Vector e = __builtin_convertvector(exponent, Vector), square = m * m;
  Vector y = all(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * square - e * 2.12194440e-4f - square * 0.5f;
  return m + y + e * 0.693359375f;
}

template <typename V>
V magnitude(V x) {
  return reinterpret_cast<V>(reinterpret_cast<decltype(x < x)>(x) & 0x7FFFFFFF);
}

// 1 / (1 + e to the -x).
template <typename V>
V sigmoid(V x) {
  const V e = exponential(-magnitude(x));
  return (x < V{} ? e : V{} + 1.0f) / (e + 1.0f);
}

// Half of erfc(x / sqrt 2) for x >= 0: the normal distribution's upper tail, to a relative 2e-7 (a Chebyshev fit).
inline Vector upper_tail(Vector x) {
  const Vector z = x * 0.70710678f, t = 1.0f / (z * 0.5f + 1.0f);
  Vector p = all(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f - z * z;
  return t * exponential(p < Vector{} ? p : Vector{}) * 0.5f;
}

}  // namespace
