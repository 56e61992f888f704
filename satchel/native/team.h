// Threads that work on one thing together and wait for each other in between, this one included.
//
// They live for one call: nothing spins or sleeps behind torch's own threads afterwards, and a process may fork.

#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  int size = 0;

  // Waits until all have come here. Spins, since the others are a few microseconds away at most; but where they share
  // a core with somebody, gives it to them.
  void meet() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait(round_, round);
    }
  }

  template <typename Work>
  void run(int threads, Work work) {
    std::vector<std::thread> others;
    try {
      while (static_cast<int>(others.size()) + 1 < threads)
        others.emplace_back([this, work, me = static_cast<int>(others.size()) + 1] {
          wait(begun_, 0);
          work(me);
        });
    } catch (const std::system_error&) {
      // no more threads to be had: those that there are do all of it
    }
    size = static_cast<int>(others.size()) + 1;
    begun_.store(1, std::memory_order_release);
    work(0);
    for (auto& other : others) other.join();
  }

 private:
  static constexpr int kSpins = 1 << 12;
  std::atomic<int> arrived_{0}, round_{0}, begun_{0};

  static void wait(const std::atomic<int>& value, int old) {
    for (int spin = 0; value.load(std::memory_order_acquire) == old; ++spin) {
      if (spin >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
};

// The part of `count` things that thread `me` of `size` takes: [first, second).
inline std::pair<int, int> share(int count, int me, int size) {
  return {static_cast<int>(int64_t{count} * me / size), static_cast<int>(int64_t{count} * (me + 1) / size)};
}

}  // namespace
