// Attention of ragged sequences over pages of keys and values: new tokens are stored, then attended from.
//
// Scores and sums are float32 whatever the pages hold. A query's result is computed in the same order whatever else is
// in the batch, however its past arrived, and on any number of threads: keys in spans of 128 from the first on, with a
// running maximum, and chunks of these by themselves (attention_parts.h).

#pragma once

#include "attention_floats.h"
#include "attention_tiles.h"

namespace {

// A task, from queries to what they found. What is shared with other tasks is finished by the last of them.
template <typename T, typename C, typename R>
void work_on(const Batch& b, Plan& plan, const Task& task) {
  thread_local R rows;
  rows.group = b.heads / b.kv_heads;
  rows.count = task.tokens * rows.group;
  const bool shared = task.shared >= 0;
  const int64_t size = floats_of(rows.count, b.dim);
  rows.states.resize(2 * size);
  const State total = state_in(rows.states.data(), rows.count, b.dim);
  const State own = state_in(rows.states.data() + size, rows.count, b.dim);
  const auto take = [&](const State& part) {
    fold(total, part, rows.count, b.dim, [&](Vector x) { return power(x, rows); });
  };
  begin(total, rows.count, b.dim);
  gather<T>(b, task, rows);
  const Reach reach = reach_of(b, task, rows.sights);
  [[maybe_unused]] const auto tiles = rows.tiles();
  for (int chunk = shared ? task.first : reach.first(); chunk < (shared ? task.last : reach.last()); ++chunk) {
    rows.state = shared ? plan.state(task, chunk, rows.count, b.dim) : own;
    begin(rows.state, rows.count, b.dim);
    const int stop = std::min(reach.stop, (chunk + 1) * kChunk);
    for (int start = std::max(reach.oldest / kSpan * kSpan, chunk * kChunk); start < stop; start += kSpan) {
      const Span<C> span(b, task.sequence, task.head, start, reach.stop);
      const int after = start + kSpan < reach.stop ? start + kSpan : start;
      look_at(b, span, Span<C>(b, task.sequence, task.head, after, reach.stop), rows);
    }
    if (!shared) take(rows.state);
  }
  if (shared) {
    if (!plan.last(task)) return;
    for (int chunk = reach.first(); chunk < reach.last(); ++chunk) take(plan.state(task, chunk, rows.count, b.dim));
  }
  finish<T, C>(b, task, rows, total);
}

template <typename T, typename R>
void work_on(const Batch& b, Plan& plan, const Task& task) {
  b.coded ? work_on<T, Code, R>(b, plan, task) : work_on<T, T, R>(b, plan, task);
}

template <typename T>
void look(const Batch& b, Plan& plan, const Task& task) {
#if defined(SATCHEL_BF16)
  if constexpr (std::is_same_v<T, Half>)
    if (by_tiles<T>(b)) return work_on<T, TileRows>(b, plan, task);
#endif
  work_on<T, Rows>(b, plan, task);
}

template <typename T>
void make(Plan& plan, const Batch& b, int threads) {
  const int group = b.heads / b.kv_heads;
  make(plan, b, by_tiles<T>(b) ? std::max(1, kTileQueries / group) : kQueries, threads);
}

}  // namespace
