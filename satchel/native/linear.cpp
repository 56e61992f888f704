// y = x W^T + b for a matrix in tiles, such a matrix or some rows of it as numbers, and what the processor may use.

#include "product.h"
#include "team.h"

namespace {

struct Call {
  Matrix matrix;
  const void* x;   // [rows, inputs], rows `x_row` elements apart
  void* y;         // [rows, outputs]
  uint8_t* room;   // scratch: see `room` in linear.py
  int64_t x_row;
  int32_t rows, threads;
};

template <typename T>
void widen_row(const T* from, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <typename T>
void put(Vector value, const Matrix& m, int group, T* row) {
  const int first = group * kRows, count = std::min(kRows, m.outputs - first);
  for (int i = 0; i < count; ++i) narrow(m.bias ? value[i] + m.bias[first + i] : value[i], row[first + i]);
}

template <typename T>
void linear(const Call& c) {
  const Matrix& m = c.matrix;
  const bool bf16 = m.kind == kBF16, tiles = by_tiles(c.rows, bf16), as_half = as_halves(c.rows, bf16);
  const Input x = input_in(c.room, c.rows, m.inputs);
  const int items = (m.groups() + 1) / 2;
  const int64_t cost = int64_t{c.rows} * m.inputs * m.outputs;
  Team team;
  team.run(cost < kWorthThreads ? 1 : std::min(c.threads, items), [&](int me) {
    std::vector<float> wide(m.inputs);
    const auto [first, last] = share(c.rows, me, team.size);
    for (int row = first; row < last; ++row) {
      widen_row(static_cast<const T*>(c.x) + row * c.x_row, m.inputs, wide.data());
      prepare(wide.data(), x, row, as_half);
    }
    team.meet();
    const bool codes = !as_half && may_use_codes(c.rows);
    const Tiles configured(tiles || codes, codes ? kRows : c.rows, codes);
    std::vector<uint16_t> panels(tiles ? 2 * int64_t{m.inputs} * kRows : 0);
    const auto [from, to] = share(items, me, team.size);
    for (int item = from; item < to; ++item) {
      const int left = 2 * item, right = std::min(left + 1, m.groups() - 1);
      product({&m, left}, {&m, right}, x, panels.data(), [&](int row, Vector a, Vector b) {
        T* y = static_cast<T*>(c.y) + int64_t{row} * m.outputs;
        put(a, m, left, y);
        if (right != left) put(b, m, right, y);
      });
    }
  });
}

template <typename T>
void rows_of(const Matrix& m, const int64_t* at, int64_t count, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    T* to = static_cast<T*>(out) + i * m.inputs;
    const int lane = static_cast<int>(at[i] % kRows);
    numbers_of(m, static_cast<int>(at[i] / kRows), [&](int input, Vector a, Vector b) {
      narrow(a[lane], to[input]);
      narrow(b[lane], to[input + 1]);
    });
  }
}

// Two inputs of 16 rows, as words that follow one another in each row.
inline void put_words(Vector a, Vector b, Ints* words, const float*) {
  words[0] = reinterpret_cast<Ints>(a);
  words[1] = reinterpret_cast<Ints>(b);
}
inline void put_words(Vector a, Vector b, Ints* words, const Half*) {
  Half low[kLanes], high[kLanes];
  narrow16(a, low);
  narrow16(b, high);
  *words = __builtin_convertvector(*reinterpret_cast<const Halves*>(low), Ints) |
           __builtin_convertvector(*reinterpret_cast<const Halves*>(high), Ints) << 16;
}

// The numbers of a group as rows of `to`: 32 inputs at a time, which are then turned round.
template <typename T>
void dense_group(const Matrix& m, int group, T* to) {
  constexpr int kWords = kBlock * sizeof(T) / 4;
  Ints block[kWords];
  const int rows = std::min(kRows, m.outputs - group * kRows);
  int filled = 0;
  numbers_of(m, group, [&](int input, Vector a, Vector b) {
    put_words(a, b, block + input % kBlock * kWords / kBlock, to);
    if ((filled += 2) % kBlock) return;
    for (int r = 0; r < rows; ++r) {
      int32_t row[kWords];
      for (int i = 0; i < kWords; ++i) row[i] = block[i][r];
      std::memcpy(to + int64_t{r} * m.inputs + input / kBlock * kBlock, row, sizeof row);
    }
  });
}

template <typename T>
void dense(const Matrix& m, void* out, int threads) {
  each(m.groups(), int64_t{m.inputs} * m.outputs < kWorthThreads ? 1 : threads, [&](int64_t group) {
    dense_group(m, static_cast<int>(group), static_cast<T*>(out) + group * kRows * m.inputs);
  });
}

}  // namespace

extern "C" {

void satchel_linear(const Call* call, int bfloat16) {
  bfloat16 ? linear<Half>(*call) : linear<float>(*call);
}

// Writes nothing and returns 0 where a number is not that of a row.
int satchel_rows(const Matrix* matrix, const int64_t* at, int64_t count, void* out, int bfloat16) {
  for (int64_t i = 0; i < count; ++i)
    if (at[i] < 0 || at[i] >= matrix->outputs) return 0;
  bfloat16 ? rows_of<Half>(*matrix, at, count, out) : rows_of<float>(*matrix, at, count, out);
  return 1;
}

void satchel_dense(const Matrix* matrix, void* out, int bfloat16, int threads) {
  bfloat16 ? dense<Half>(*matrix, out, threads) : dense<float>(*matrix, out, threads);
}

int satchel_many(void) { return may_use_tiles() ? kMany : 0; }
}
