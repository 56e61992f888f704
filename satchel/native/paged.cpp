// Attention over pages in one pass, from Python: see attention.h.

#include "attention.h"

namespace {

template <typename T>
void run(const Batch& b, int threads) {
  for (int s = 0; s < b.sequences; ++s)
    for (int h = 0; h < b.kv_heads; ++h) store<T>(b, s, h);
  thread_local Plan own;
  Plan& plan = own;  // of this thread, whichever thread looks
  make<T>(plan, b, threads);
  int64_t cost = 0;
  for (const Task& task : plan.tasks) cost += task.cost;
  each(plan.tasks.size(), cost < kWorthThreads ? 1 : threads, [&](int64_t i) { look<T>(b, plan, plan.tasks[i]); });
}

}  // namespace

extern "C" {

void satchel_paged_attention(const Batch* batch, int bfloat16, int threads) {
  if (bfloat16)
    run<Half>(*batch, threads);
  else
    run<float>(*batch, threads);
}
}
