// Adds low-rank updates to the rows of a matrix, each run of rows its own:  y += scale * (x down^T) up.
//
// Ranks differ from run to run and nothing is padded. Sums are float32; y is read and rounded once. A row's result does
// not depend on the others.

#include "vectors.h"

namespace {

constexpr int kRows = 4;                    // rows that share one reading of the weights

struct Batch {
  const void* x;            // [N, I], rows `x_row` elements apart
  void* y;                  // [N, O], rows `y_row` elements apart
  const void* weights;      // where all matrices lie
  const int64_t *down, *up; // [S] offsets of matrices [R, I] and [R, O], in elements
  const int64_t *rank;      // [S] R; 0: nothing to add
  const int64_t *first, *stop;  // [S] rows of each run
  const float* scale;       // [S]
  int64_t x_row, y_row;
  int32_t runs, inputs, outputs;
};

// Products of R rows of x, widened, with one row of `down`.
template <typename T, int R>
void dots(const float* x, const T* down, int inputs, float* out) {
  Vector sum[R] = {};
  int i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    const Vector w = widen16(down + i);
    for (int r = 0; r < R; ++r) sum[r] += *reinterpret_cast<const Vector*>(x + r * inputs + i) * w;
  }
  for (int r = 0; r < R; ++r) out[r] = total(sum[r]);
  for (; i < inputs; ++i)
    for (int r = 0; r < R; ++r) out[r] = __builtin_fmaf(x[r * inputs + i], widen(down[i]), out[r]);
}

template <typename T, int R>
void add(const Batch& b, int run, int64_t row, std::vector<float>& room) {
  const int inputs = b.inputs, outputs = b.outputs;
  const int64_t rank = b.rank[run];
  const T* down = static_cast<const T*>(b.weights) + b.down[run];
  const T* up = static_cast<const T*>(b.weights) + b.up[run];
  room.resize(R * (inputs + outputs));
  float *x = room.data(), *y = x + R * inputs;
  for (int r = 0; r < R; ++r) {
    const T* from = static_cast<const T*>(b.x) + (row + r) * b.x_row;
    for (int i = 0; i < inputs; ++i) x[r * inputs + i] = widen(from[i]);
    const T* old = static_cast<const T*>(b.y) + (row + r) * b.y_row;
    for (int o = 0; o < outputs; ++o) y[r * outputs + o] = widen(old[o]);
  }
  for (int64_t k = 0; k < rank; ++k) {
    float h[R];
    dots<T, R>(x, down + k * inputs, inputs, h);
    const T* w = up + k * outputs;
    for (int r = 0; r < R; ++r) h[r] *= b.scale[run];
    int o = 0;
    for (; o + kLanes <= outputs; o += kLanes) {
      const Vector v = widen16(w + o);
      for (int r = 0; r < R; ++r) *reinterpret_cast<Vector*>(y + r * outputs + o) += h[r] * v;
    }
    for (; o < outputs; ++o)
      for (int r = 0; r < R; ++r) y[r * outputs + o] = __builtin_fmaf(h[r], widen(w[o]), y[r * outputs + o]);
  }
  for (int r = 0; r < R; ++r) {
    T* to = static_cast<T*>(b.y) + (row + r) * b.y_row;
    for (int o = 0; o < outputs; ++o) narrow(y[r * outputs + o], to[o]);
  }
}

template <typename T>
void add_rows(const Batch& b, int run, int64_t row, std::vector<float>& room) {
  switch (std::min<int64_t>(kRows, b.stop[run] - row)) {
    case 4: return add<T, 4>(b, run, row, room);
    case 3: return add<T, 3>(b, run, row, room);
    case 2: return add<T, 2>(b, run, row, room);
    case 1: return add<T, 1>(b, run, row, room);
  }
}

template <typename T>
void run_all(const Batch& b, int threads) {
  std::vector<std::pair<int, int64_t>> tasks;  // run, first row
  int64_t cost = 0;
  for (int s = 0; s < b.runs; ++s) {
    if (!b.rank[s]) continue;
    for (int64_t row = b.first[s]; row < b.stop[s]; row += kRows) tasks.emplace_back(s, row);
    cost += (b.stop[s] - b.first[s]) * b.rank[s] * (b.inputs + b.outputs);
  }
  each(tasks.size(), cost < kWorthThreads ? 1 : threads, [&](int64_t i) {
    thread_local std::vector<float> room;
    add_rows<T>(b, tasks[i].first, tasks[i].second, room);
  });
}

}  // namespace

extern "C" {

void satchel_low_rank(const Batch* batch, int bfloat16, int threads) {
  if (bfloat16)
    run_all<Half>(*batch, threads);
  else
    run_all<float>(*batch, threads);
}
}
