// The work of attention in tasks, and what tasks found put together.
//
// Keys are looked at in chunks of 512, each from nothing, and what was found in these is folded one after the other: so
// threads may share the chunks of a few long sequences, and a query's result is the same if one thread does them all.

#pragma once

#include <atomic>

#include "pages.h"

namespace {

constexpr int kChunk = 4 * kSpan;
constexpr int kTasksPerThread = 4;  // where there is more than one chunk for each

// What some rows found: sums of values, [R][E], the highest scores, sums of shares, [R]. R: a multiple of 16.
struct State {
  float *out, *top, *sum;
};

inline int padded(int rows) { return (rows + kLanes - 1) / kLanes * kLanes; }
inline int64_t floats_of(int rows, int dim) { return int64_t{padded(rows)} * (dim + 2); }

inline State state_in(float* room, int rows, int dim) {
  float* top = room + int64_t{padded(rows)} * dim;
  return {room, top, top + padded(rows)};
}

inline void begin(const State& state, int rows, int dim) {
  std::fill_n(state.out, int64_t{padded(rows)} * dim, 0.0f);
  std::fill_n(state.top, padded(rows), kNever);
  std::fill_n(state.sum, padded(rows), 0.0f);
}

// The total takes a part in. power(x): shares of scores that are x <= 0 above the highest.
template <typename Power>
void fold(const State& total, const State& part, int rows, int dim, Power power) {
  for (int first = 0; first < rows; first += kLanes) {
    auto &top = reinterpret_cast<Vector&>(total.top[first]), &sum = reinterpret_cast<Vector&>(total.sum[first]);
    const Vector other = reinterpret_cast<const Vector&>(part.top[first]), highest = top > other ? top : other;
    const Vector keep = power(top - highest), take = power(other - highest);
    top = highest;
    sum = sum * keep + reinterpret_cast<const Vector&>(part.sum[first]) * take;
    for (int r = first; r < std::min(rows, first + kLanes); ++r)
      for (int e = 0; e < dim; ++e) {
        float& out = total.out[int64_t{r} * dim + e];
        out = out * keep[r - first] + part.out[int64_t{r} * dim + e] * take[r - first];
      }
  }
}

// Queries of some tokens of a sequence that read one key head, and the chunks of keys that they look at.
struct Task {
  int sequence, head, row, tokens;
  int64_t cost;
  int shared = -1;  // which of the plan's shared ones it is a part of; -1: it has all chunks
  int first = 0, last = 0;
};

// The keys that the tokens of a task see lie in [oldest, stop).
struct Reach {
  int oldest, stop;
  int first() const { return oldest / kChunk; }
  int last() const { return (stop - 1) / kChunk + 1; }
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

// What several tasks look for together: whoever comes last puts it together.
struct Shared {
  int first, last;  // chunks
  int64_t at, size;  // where their states lie, and floats of one
  int left;          // tasks that are not through
};

struct Plan {
  std::vector<Task> tasks;  // the longest come first
  std::vector<Shared> shared;
  std::vector<float> states;  // only grow: a long past has millions, and fresh memory for each layer would cost more
  bool whole;                 // whether a task has all new tokens of its sequence, and all of the keys

  State state(const Task& task, int chunk, int rows, int dim) {
    const Shared& s = shared[task.shared];
    return state_in(states.data() + s.at + (chunk - s.first) * s.size, rows, dim);
  }
  bool last(const Task& task) {
    return std::atomic_ref(shared[task.shared].left).fetch_sub(1, std::memory_order_acq_rel) == 1;
  }
};

// Tasks of up to `most` tokens; too few for the threads are cut into chunks.
inline void make(Plan& plan, const Batch& b, int most, int threads) {
  const int group = b.heads / b.kv_heads;
  plan.tasks.clear();
  plan.shared.clear();
  plan.whole = true;
  std::vector<Task> whole;
  for (int s = 0; s < b.sequences; ++s)
    for (int h = 0; h < b.kv_heads; ++h)
      for (int row = b.first[s]; row < b.first[s + 1]; row += most) {
        const int tokens = std::min(most, b.first[s + 1] - row);
        if (tokens < b.first[s + 1] - b.first[s]) plan.whole = false;
        const int64_t keys = b.past[s] + row - b.first[s] + tokens;
        whole.push_back({s, h, row, tokens, keys * tokens * group * b.dim});
      }
  const int count = static_cast<int>(whole.size());
  const int wanted = threads > 1 && count ? std::max(1, threads * kTasksPerThread / count) : 1;  // parts of a task
  int64_t floats = 0;
  std::vector<Sight> sights;
  for (Task& task : whole) {
    const Reach reach = wanted > 1 ? reach_of(b, task, sights) : Reach{0, 1};
    const int chunks = reach.last() - reach.first(), parts = std::min(wanted, chunks);
    if (parts > 1) {
      plan.whole = false;
      const int64_t size = floats_of(task.tokens * group, b.dim);
      task.shared = static_cast<int>(plan.shared.size());
      plan.shared.push_back({reach.first(), reach.last(), floats, size, parts});
      floats += chunks * size;
      task.cost /= parts;
    }
    for (int part = 0; part < parts; ++part) {
      const auto [first, last] = share(chunks, part, parts);
      task.first = reach.first() + first, task.last = reach.first() + last;
      plan.tasks.push_back(task);
    }
  }
  if (static_cast<int64_t>(plan.states.size()) < floats) plan.states.resize(floats);
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& a, const Task& c) { return a.cost > c.cost; });
}

}  // namespace
