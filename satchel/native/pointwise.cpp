// The small operators between a decoder's products: RMS norm, rotary positions, gated activation.
//
// Sums and functions are float32. A row's result does not depend on the others, nor on the number of threads.

#include <cmath>
#include <cstring>

#include "functions.h"

namespace {

constexpr int64_t kPiece = 1 << 15;  // elements that a thread takes at once
constexpr int64_t kWorth = 1 << 19;  // element operations below which one thread is quicker

// The numbers as T holds them, in float32.
inline Vector settled(Vector x, const float*) { return x; }
inline Vector settled(Vector x, const Half*) {
  Half kept[kLanes];
  narrow16(x, kept);
  return widen16(kept);
}
inline float settled(float x, const float*) { return x; }
inline float settled(float x, const Half*) {
  Half kept;
  narrow(x, kept);
  return widen(kept);
}

// Calls row(i) for i < rows; each is `width` elements at `cost` operations.
template <typename Row>
void by_rows(int64_t rows, int64_t width, int64_t cost, int threads, Row row) {
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(width, 1));
  each((rows + step - 1) / step, rows * width * cost < kWorth ? 1 : threads, [&](int64_t piece) {
    for (int64_t i = piece * step; i < std::min(rows, (piece + 1) * step); ++i) row(i);
  });
}

struct Norm {
  const void *x, *weight;  // [N, D] and [D]
  void* out;               // [N, D]
  int64_t rows, width;
  float eps, shift;    // shift: added to the weight
  int32_t late;        // whether to round after the weight only
};

template <typename T>
void norm(const Norm& n, int threads) {
  by_rows(n.rows, n.width, 1, threads, [&](int64_t row) {
    const T *x = static_cast<const T*>(n.x) + row * n.width, *weight = static_cast<const T*>(n.weight);
    T* out = static_cast<T*>(n.out) + row * n.width;
    const int64_t whole = n.width / kLanes * kLanes;
    Vector squares = {};
    for (int64_t d = 0; d < whole; d += kLanes) {
      const Vector v = widen16(x + d);
      squares += v * v;
    }
    float sum = total(squares);
    for (int64_t d = whole; d < n.width; ++d) sum += widen(x[d]) * widen(x[d]);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n.width) + n.eps);
    for (int64_t d = 0; d < whole; d += kLanes) {
      const Vector y = widen16(x + d) * scale;
      narrow16((n.late ? y : settled(y, x)) * (widen16(weight + d) + n.shift), out + d);
    }
    for (int64_t d = whole; d < n.width; ++d) {
      const float y = widen(x[d]) * scale;
      narrow((n.late ? y : settled(y, x)) * (widen(weight[d]) + n.shift), out[d]);
    }
  });
}

struct Turn {
  const void *x, *cos, *sin;  // [N, H, E], rows `x_row` elements apart; [T, R], of which row n uses n % T
  void* out;                  // [N, H, E]
  int64_t rows, x_row, positions;
  int32_t heads, dim, half;   // half: R
};

template <typename T>
void turn_head(const T* x, const T* cos, const T* sin, T* out, int half, int dim) {
  int r = 0;
  for (; r + kLanes <= half; r += kLanes) {
    const Vector a = widen16(x + r), b = widen16(x + half + r), c = widen16(cos + r), s = widen16(sin + r);
    narrow16(a * c - b * s, out + r);
    narrow16(b * c + a * s, out + half + r);
  }
  for (; r < half; ++r) {
    const float a = widen(x[r]), b = widen(x[half + r]), c = widen(cos[r]), s = widen(sin[r]);
    narrow(a * c - b * s, out[r]);
    narrow(b * c + a * s, out[half + r]);
  }
  std::memcpy(out + 2 * half, x + 2 * half, (dim - 2 * half) * sizeof(T));
}

template <typename T>
void turn(const Turn& t, int threads) {
  by_rows(t.rows, int64_t{t.heads} * t.dim, 1, threads, [&](int64_t row) {
    const int64_t table = row % t.positions * t.half;
    for (int64_t head = 0; head < t.heads; ++head)
      turn_head(static_cast<const T*>(t.x) + row * t.x_row + head * t.dim, static_cast<const T*>(t.cos) + table,
                static_cast<const T*>(t.sin) + table, static_cast<T*>(t.out) + (row * t.heads + head) * t.dim, t.half,
                t.dim);
  });
}

enum Act { kSilu, kGelu, kGeluTanh, kRelu };

template <int act>
Vector activated(Vector x) {
  if constexpr (act == kSilu) return x * sigmoid(x);
  if constexpr (act == kGeluTanh) return x * sigmoid(x * (x * x * 0.044715f + 1.0f) * 1.5957691216f);
  if constexpr (act == kRelu) return x > Vector{} ? x : (x != x ? x : Vector{});
  const Vector tail = upper_tail(magnitude(x));
  return x * (x < Vector{} ? tail : 1.0f - tail);
}

struct Gated {
  const void *gate, *up;  // [N, F], rows `gate_row` and `up_row` elements apart
  void* out;              // [N, F]
  int64_t rows, width, gate_row, up_row;
};

template <typename T, int act>
void gated(const Gated& g, int threads) {
  by_rows(g.rows, g.width, 4, threads, [&](int64_t row) {
    const T* gate = static_cast<const T*>(g.gate) + row * g.gate_row;
    const T* up = static_cast<const T*>(g.up) + row * g.up_row;
    T* out = static_cast<T*>(g.out) + row * g.width;
    int64_t f = 0;
    for (; f + kLanes <= g.width; f += kLanes) narrow16(activated<act>(widen16(gate + f)) * widen16(up + f), out + f);
    if (f == g.width) return;
    T last[3][kLanes] = {};
    std::memcpy(last[0], gate + f, (g.width - f) * sizeof(T));
    std::memcpy(last[1], up + f, (g.width - f) * sizeof(T));
    narrow16(activated<act>(widen16(last[0])) * widen16(last[1]), last[2]);
    std::memcpy(out + f, last[2], (g.width - f) * sizeof(T));
  });
}

template <typename T>
void gated(const Gated& g, int act, int threads) {
  switch (act) {
    case kSilu: return gated<T, kSilu>(g, threads);
    case kGelu: return gated<T, kGelu>(g, threads);
    case kGeluTanh: return gated<T, kGeluTanh>(g, threads);
    case kRelu: return gated<T, kRelu>(g, threads);
  }
}

}  // namespace

extern "C" {

void satchel_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t width, float eps, float shift,
                      int late, int bfloat16, int threads) {
  const Norm n = {x, weight, out, rows, width, eps, shift, late};
  bfloat16 ? norm<Half>(n, threads) : norm<float>(n, threads);
}

void satchel_rotate(const void* x, const void* cos, const void* sin, void* out, int64_t rows, int64_t x_row,
                    int64_t positions, int heads, int dim, int half, int bfloat16, int threads) {
  const Turn t = {x, cos, sin, out, rows, x_row, positions, heads, dim, half};
  bfloat16 ? turn<Half>(t, threads) : turn<float>(t, threads);
}

void satchel_gated(const void* gate, const void* up, void* out, int64_t rows, int64_t width, int64_t gate_row,
                   int64_t up_row, int act, int bfloat16, int threads) {
  const Gated g = {gate, up, out, rows, width, gate_row, up_row};
  bfloat16 ? gated<Half>(g, act, threads) : gated<float>(g, act, threads);
}
}
