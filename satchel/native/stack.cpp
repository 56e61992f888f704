// A decoder from tokens to the states that its head reads, for the new tokens of many sequences: embedding; block after
// block norm, queries, keys and values, rotation, attention over pages, output, norm, gated feed-forward; last norm.
//
// The stream from block to block is float32 here. Threads meet five times a block where the rows are few: each then
// prepares the inputs of a product for itself.

#include "attention.h"
#include "product.h"
#include "team.h"

namespace {

enum Act : int32_t { kSilu, kGeluTanh };

struct Columns {
  Column left, right;
};

struct Layer {
  Matrix q, k, v, o, gate, up, down;
  const float *into_attention, *into_mlp;  // weights of the norms, [width]
  const float *q_norm, *k_norm;            // [dim]; null: none
  float eps, scale, cap;
  int32_t window, table, act;  // table: which kind of rotation; -1: none
};

struct Call {
  const Layer* layers;
  const Matrix* embeddings;  // a row a token; null: x is given
  const int64_t* tokens;     // [rows]; used where there are embeddings
  const void* x;             // [rows, width]; used where there are none
  void* y;                   // [rows, width]
  const float* norm;         // weights of the last norm, [width]; null: none
  const float* frequencies;  // of each kind of rotation, [kinds, half]
  const float* factors;      // on cosines and sines, [kinds]
  void* pool;                // of keys and values; layer l, page p begins at byte p * page_stride + 2 l * half_stride
  uint8_t* room;
  const int32_t *pages, *table, *first, *past;  // as in attention.h,
  const int64_t *limit, *seen, *position;       // these too
  int64_t page_stride, half_stride;
  int32_t count, rows, width, hidden, heads, kv_heads, dim, half, kinds, sequences, threads;
  float embed_scale, eps;  // on embeddings, and of the last norm
  int32_t bf16;   // whether the matrices are in bfloat16, all of them
  int32_t coded;  // as in pages.h
};

constexpr int kAlone = 4;  // rows up to which every thread prepares all inputs for itself
constexpr int kItems = 16;        // pairs of columns whose panels lie in the cache together, at most
constexpr int kPanels = 1 << 20;  // bytes of these panels, unless one pair takes more

// Hands out scratch memory; without a beginning it counts.
struct Arena {
  uint8_t* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return out;
  }
};

template <typename T>
struct Work {
  const Call& c;
  bool tiles, as_half, alone;
  int threads, qkv, mixed, widest;
  float *x, *h;             // the stream [rows, width], the feed-forward's inner values [rows, hidden]
  float* tables;            // cosines and sines, [kinds, 2, rows, half]
  T *heads, *seen;          // queries, keys and values [rows, qkv]; what attention found [rows, mixed]
  uint8_t *inputs, *inner;  // rows as products take them; for tiles also the inner values
  int64_t inputs_size;
  uint16_t* panels;
  int64_t panels_size;
  Arena arena;
  Team team;
  std::atomic<int> next{0};
  Plan& plan;  // of a layer's attention

  Work(const Call& call, Plan& plan) : c(call), arena{call.room}, plan(plan) {
    tiles = by_tiles(c.rows, c.bf16);
    as_half = as_halves(c.rows, c.bf16);
    alone = c.rows <= kAlone;
    threads = c.threads;
    mixed = c.heads * c.dim;
    qkv = (c.heads + 2 * c.kv_heads) * c.dim;
    widest = std::max({c.width, mixed, c.hidden});
    const int64_t padded = (int64_t{c.rows} + kRows - 1) / kRows * kRows;
    x = arena.take<float>(int64_t{c.rows} * c.width);
    h = tiles ? nullptr : arena.take<float>(int64_t{c.rows} * c.hidden);
    tables = arena.take<float>(int64_t{2} * c.kinds * c.rows * c.half);
    heads = arena.take<T>(int64_t{c.rows} * qkv);
    seen = arena.take<T>(int64_t{c.rows} * mixed);
    inputs_size = 2 * padded * (tiles ? std::max(c.width, mixed) : widest);
    inputs = arena.take<uint8_t>(inputs_size * (alone ? threads : 1));
    inner = tiles ? arena.take<uint8_t>(2 * padded * c.hidden) : nullptr;
    panels_size = tiles ? std::max<int64_t>(kPanels / 2, 2 * int64_t{widest} * kRows) : 0;
    panels = arena.take<uint16_t>(panels_size * threads);
  }

  static int items_at_once(int inputs) { return std::clamp(kPanels / (inputs * 4 * kRows), 1, kItems); }
};

inline void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
  Vector squares = {};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vector v = *reinterpret_cast<const Vector*>(x + i);
    squares += v * v;
  }
  float sum = total(squares);
  for (; i < width; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
  for (i = 0; i < width; ++i) out[i] = x[i] * inverse * weight[i];
}

inline Vector activate(Vector x, int32_t act) {
  if (act == kSilu) return x * sigmoid(x);
  return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

inline Vector with_bias(Vector value, const Matrix& m, int group) {
  return m.bias ? value + *reinterpret_cast<const Vector*>(m.bias + group * kRows) : value;
}

// One thread's part of a call.
template <typename T>
class Worker {
 public:
  Worker(Work<T>& work, int me) : w(work), c(work.c), me(me), row(work.widest) {}

  void run() {
    const auto [first, last] = share(c.rows, me, w.team.size);
    for (int r = first; r < last; ++r) begin(r);
    w.team.meet();
    for (int i = 0; i < c.count; ++i) layer(c.layers[i], i);
    for (int r = first; r < last; ++r) end(r);
  }

 private:
  Work<T>& w;
  const Call& c;
  const int me;
  std::vector<float> row;

  // The stream of one row, and the angles of its position.
  void begin(int r) {
    float* x = w.x + int64_t{r} * c.width;
    if (c.embeddings)
      embed(c.tokens[r], x);
    else
      for (int i = 0; i < c.width; ++i) x[i] = widen(static_cast<const T*>(c.x)[int64_t{r} * c.width + i]);
    for (int kind = 0; kind < c.kinds; ++kind) {
      auto [cos, sin] = table(kind, r);
      for (int i = 0; i < c.half; ++i) {
        const float angle = static_cast<float>(c.position[r]) * c.frequencies[kind * c.half + i];
        cos[i] = std::cos(angle) * c.factors[kind];
        sin[i] = std::sin(angle) * c.factors[kind];
      }
    }
  }

  // A token's row, rounded as where it is looked up.
  void embed(int64_t token, float* x) {
    const int lane = static_cast<int>(token % kRows);
    numbers_of(*c.embeddings, static_cast<int>(token / kRows), [&](int input, Vector a, Vector b) {
      x[input] = rounded(a[lane]);
      x[input + 1] = rounded(b[lane]);
    });
    if (c.embed_scale == 1) return;
    for (int i = 0; i < c.width; ++i) x[i] = rounded(x[i] * rounded(c.embed_scale));
  }

  static float rounded(float x) {
    T out;
    narrow(x, out);
    return widen(out);
  }

  void end(int r) {
    if (c.norm) rms_norm(w.x + int64_t{r} * c.width, c.norm, c.width, c.eps, w.x + int64_t{r} * c.width);
    for (int64_t i = int64_t{r} * c.width; i < int64_t{r + 1} * c.width; ++i) narrow(w.x[i], static_cast<T*>(c.y)[i]);
  }

  std::pair<float*, float*> table(int kind, int r) {
    float* cos = w.tables + (int64_t{2} * kind * c.rows + r) * c.half;
    return {cos, cos + int64_t{c.rows} * c.half};
  }

  void layer(const Layer& l, int index) {
    const Input normed = inputs(c.width, [&](int r) { norm(r, l.into_attention, l.eps); });
    T* to = w.heads;
    for (const Matrix* m : {&l.q, &l.k, &l.v}) {
      for_pairs(*m, normed, [&](int r, int group, Vector value) {
        narrow16(with_bias(value, *m, group), to + int64_t{r} * w.qkv + group * kRows);
      });
      to += m->outputs;
    }
    const Batch b = batch(l, index);
    if (me == 0) {
      w.next.store(0, std::memory_order_relaxed);
      make<T>(w.plan, b, w.team.size);
    }
    w.team.meet();
    attend(l, b);
    w.team.meet();
    const Input found = inputs(w.mixed, [&](int r) {
      for (int i = 0; i < w.mixed; ++i) row[i] = widen(w.seen[int64_t{r} * w.mixed + i]);
    });
    add(l.o, found);
    w.team.meet();
    feed_forward(l);
    w.team.meet();
  }

  void feed_forward(const Layer& l) {
    const Input normed = inputs(c.width, [&](int r) { norm(r, l.into_mlp, l.eps); });
    const Input inner = input_in(w.inner, c.rows, c.hidden);
    const auto [first, last] = share(l.gate.groups(), me, w.team.size);
    const auto columns = [&](int g) { return Columns{{&l.gate, g}, {&l.up, g}}; };
    products(first, last, normed, columns, [&](int g, int r, Vector a, Vector b) {
      const Vector value = activate(with_bias(a, l.gate, g), l.act) * with_bias(b, l.up, g);
      if (w.tiles)
        narrow16(value, reinterpret_cast<Half*>(inner.half(r) + g / 2 * kRows * kBlock + g % 2 * kRows));
      else
        narrow16(value, w.h + int64_t{r} * c.hidden + g * kRows);
    });
    w.team.meet();
    if (w.tiles) return add(l.down, inner);
    add(l.down, inputs(c.hidden, [&](int r) { std::memcpy(row.data(), w.h + int64_t{r} * c.hidden, c.hidden * 4); }));
  }

  void norm(int r, const float* weight, float eps) { rms_norm(w.x + int64_t{r} * c.width, weight, c.width, eps, row.data()); }

  uint16_t* panels() { return w.panels + me * w.panels_size; }

  // The inputs of a product; make(r) writes row r into `row`. By all threads for all, or by each for itself.
  template <typename Make>
  Input inputs(int count, Make make) {
    const Input x = input_in(w.inputs + (w.alone ? me * w.inputs_size : 0), c.rows, count);
    const auto [first, last] = w.alone ? std::pair{0, c.rows} : share(c.rows, me, w.team.size);
    for (int r = first; r < last; ++r) {
      make(r);
      prepare(row.data(), x, r, w.as_half);
    }
    if (!w.alone) w.team.meet();
    return x;
  }

  // The stream takes what a matrix makes of its inputs.
  void add(const Matrix& m, const Input& x) {
    for_pairs(m, x, [&](int r, int group, Vector value) {
      *reinterpret_cast<Vector*>(w.x + int64_t{r} * c.width + group * kRows) += with_bias(value, m, group);
    });
  }

  // take(row, group, value) for this thread's part of the outputs.
  template <typename Take>
  void for_pairs(const Matrix& m, const Input& x, Take take) {
    const auto [first, last] = share((m.groups() + 1) / 2, me, w.team.size);
    const auto columns = [&](int item) {
      return Columns{{&m, 2 * item}, {&m, std::min(2 * item + 1, m.groups() - 1)}};
    };
    products(first, last, x, columns, [&](int item, int r, Vector a, Vector b) {
      take(r, 2 * item, a);
      if (2 * item + 1 < m.groups()) take(r, 2 * item + 1, b);
    });
  }

  // take(item, row, a, b) with the products of all rows and two columns for each item of [first, last).
  template <typename Both, typename Take>
  void products(int first, int last, const Input& x, Both both, Take take) {
    if (w.tiles) return by_panels(first, last, x, both, take);
    const bool codes = !w.as_half && may_use_codes(c.rows);
    const Tiles configured(codes, kRows, codes);
    for (int item = first; item < last; ++item) {
      const Columns columns = both(item);
      some_rows(columns.left, columns.right, x, [&](int r, Vector a, Vector b) { take(item, r, a, b); });
    }
  }

  // By tiles: panels of some items first, then 32 rows at a time with all of these, so that rows come from far once.
  template <typename Both, typename Take>
  void by_panels(int first, int last, const Input& x, Both both, Take take) {
    const Tiles configured(true, c.rows);
    alignas(64) float out[32 * 32];
    const uint16_t *left[kItems], *right[kItems];
    const int64_t size = int64_t{x.inputs} * kRows;
    for (int start = first, count; start < last; start += count) {
      count = std::min(last - start, w.items_at_once(x.inputs));
      for (int i = 0; i < count; ++i) {
        const Columns columns = both(start + i);
        left[i] = panel(*columns.left.matrix, columns.left.group, panels() + 2 * i * size);
        right[i] = panel(*columns.right.matrix, columns.right.group, panels() + (2 * i + 1) * size);
      }
      for (int row = 0; row < x.rows; row += 32)
        for (int i = 0; i < count; ++i) {
          const int rows = std::min(32, x.rows - row);
          rows > kRows ? tile_product<true>(x.half(row), left[i], right[i], x.blocks(), out)
                       : tile_product<false>(x.half(row), left[i], right[i], x.blocks(), out);
          for (int r = 0; r < rows; ++r) {
            const auto* values = reinterpret_cast<const Vector*>(out + 32 * r);
            take(start + i, row + r, values[0], values[1]);
          }
        }
    }
  }

  Batch batch(const Layer& l, int index) const {
    uint8_t* keys = static_cast<uint8_t*>(c.pool) + 2 * index * c.half_stride;
    Batch b = {};
    b.q = w.heads, b.k = w.heads + w.mixed, b.v = w.heads + w.mixed + c.kv_heads * c.dim;
    b.keys = keys, b.values = keys + c.half_stride, b.out = w.seen;
    b.pages = c.pages, b.table = c.table, b.first = c.first, b.past = c.past;
    b.limit = c.limit, b.seen = c.seen, b.position = c.position;
    b.page_stride = c.page_stride, b.q_row = b.k_row = w.qkv;
    b.sequences = c.sequences, b.heads = c.heads, b.kv_heads = c.kv_heads, b.dim = c.dim;
    b.coded = c.coded, b.window = l.window, b.scale = l.scale, b.cap = l.cap;
    return b;
  }

  void attend(const Layer& l, const Batch& b) {
    const std::vector<Task>& tasks = w.plan.tasks;
    if (!w.plan.whole) {
      const auto [first, last] = share(c.sequences * c.kv_heads, me, w.team.size);
      for (int i = first; i < last; ++i) place(l, b, i / c.kv_heads, i % c.kv_heads);
      w.team.meet();
    }
    for (int i; (i = w.next.fetch_add(1)) < static_cast<int>(tasks.size());) {
      if (w.plan.whole) place(l, b, tasks[i].sequence, tasks[i].head);
      look<T>(b, w.plan, tasks[i]);
    }
  }

  // The new tokens of a sequence: one key head and its queries, normalised, turned and stored.
  void place(const Layer& l, const Batch& b, int sequence, int head) {
    const int group = c.heads / c.kv_heads;
    for (int r = b.first[sequence]; r < b.first[sequence + 1]; ++r) {
      T* heads = w.heads + int64_t{r} * w.qkv;
      for (int i = 0; i < group; ++i) turn(l, heads + (head * group + i) * c.dim, r, l.q_norm);
      turn(l, heads + w.mixed + head * c.dim, r, l.k_norm);
    }
    store<T>(b, sequence, head);
  }

  void turn(const Layer& l, T* head, int r, const float* norm) {
    float* x = row.data();
    for (int i = 0; i < c.dim; ++i) x[i] = widen(head[i]);
    if (norm) rms_norm(x, norm, c.dim, l.eps, x);
    if (l.table >= 0) {
      const auto [cos, sin] = table(l.table, r);
      for (int i = 0; i < c.half; ++i) {
        const float a = x[i], b = x[i + c.half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + c.half] = b * cos[i] + a * sin[i];
      }
    }
    for (int i = 0; i < c.dim; ++i) narrow(x[i], head[i]);
  }
};

template <typename T>
void run(const Call& c) {
  thread_local Plan plan;
  Work<T> work(c, plan);
  work.team.run(c.threads, [&](int me) { Worker<T>(work, me).run(); });
}

}  // namespace

extern "C" {

// Does nothing and returns 0 where a token has no embedding.
int satchel_stack(const Call* call, int bfloat16) {
  for (int r = 0; call->embeddings && r < call->rows; ++r)
    if (call->tokens[r] < 0 || call->tokens[r] >= call->embeddings->outputs) return 0;
  bfloat16 ? run<Half>(*call) : run<float>(*call);
  return 1;
}

// Bytes of scratch memory that a call takes.
int64_t satchel_stack_room(const Call* call, int bfloat16) {
  Call counted = *call;
  counted.room = nullptr;
  Plan plan;
  return bfloat16 ? Work<Half>(counted, plan).arena.used : Work<float>(counted, plan).arena.used;
}
}
