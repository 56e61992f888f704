// Threads that work on one thing together and wait for each other in between, the calling one included.
//
// One crew a process serves the operators of all libraries. Its threads sleep between calls, after a moment in which the
// next operator of a step mostly comes, so that torch's own threads find the cores free. Who finds the crew at work for
// another caller does everything alone. The child of a fork has no crew, and hires one when it needs it.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <system_error>
#include <thread>
#include <utility>

namespace satchel {

enum State : int32_t { kIdle, kCalled, kWorking };

struct alignas(64) Seat {
  std::atomic<int32_t> state{kIdle};
};

constexpr int kSeats = 255;

// A symbol that GCC makes one for the whole process, whichever libraries hold it; where a compiler does not, each library
// has a crew of its own. Nothing to destroy: threads may still sleep here when the process ends.
struct Crew {
  std::atomic<bool> taken{false};
  bool watches_forks = false;
  int hired = 0;
  void (*work)(void* job, int me) = nullptr;
  void* job = nullptr;
  Seat seats[kSeats];
};
inline constinit Crew crew;

}  // namespace satchel

namespace {

using satchel::crew;

inline void breathe() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until `gone` holds. Spins, since the others are a few microseconds away at most; but where they share a core with
// somebody, gives it to them.
template <typename Gone>
void wait_until(Gone gone) {
  constexpr int kSpins = 1 << 9;
  for (int spin = 0; !gone(); ++spin) spin < kSpins ? breathe() : std::this_thread::yield();
}

// Looks out for a call for a moment, then sleeps until there is one.
inline void rest(std::atomic<int32_t>& state) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kMoment = std::chrono::microseconds(50);
  const auto until = Clock::now() + kMoment;
  do {
    for (int spin = 0; spin < 16; ++spin) {
      if (state.load(std::memory_order_relaxed) != satchel::kIdle) return;
      breathe();
    }
  } while (Clock::now() < until);
  state.wait(satchel::kIdle, std::memory_order_relaxed);
}

// The life of a hired thread.
inline void serve(int seat) {
  auto& state = crew.seats[seat].state;
  for (;;) {
    rest(state);
    int32_t called = satchel::kCalled;
    if (!state.compare_exchange_strong(called, satchel::kWorking, std::memory_order_acquire)) continue;
    crew.work(crew.job, seat + 1);
    state.store(satchel::kIdle, std::memory_order_release);
  }
}

inline void forget() {
  for (int seat = 0; seat < crew.hired; ++seat) crew.seats[seat].state.store(satchel::kIdle);
  crew.hired = 0;
  crew.taken.store(false);
}

// As many threads as there are of `wanted`, hired now where they are missing.
inline int hire(int wanted) {
  if (!crew.watches_forks) crew.watches_forks = pthread_atfork(nullptr, nullptr, forget) == 0;
  wanted = std::min(wanted, satchel::kSeats);
  try {
    while (crew.hired < wanted) {
      std::thread(serve, crew.hired).detach();
      ++crew.hired;
    }
  } catch (const std::system_error&) {
    // no more threads to be had: those that there are do all of it
  }
  return std::min(wanted, crew.hired);
}

class Team {
 public:
  int size = 1;

  // Waits until all have come here.
  void meet() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
    }
  }

  // Calls work(me) for me < size, which is `threads` if they are free. One that has not come yet when this thread is
  // through with its part is not waited for: so either `work` meets, or the part of one alone is everything.
  template <typename Work>
  void run(int threads, Work work) {
    if (threads < 2 || crew.taken.exchange(true, std::memory_order_acquire)) return work(0);
    const int others = hire(threads - 1);
    size = others + 1;
    crew.work = [](void* job, int me) { (*static_cast<Work*>(job))(me); };
    crew.job = &work;
    for (int seat = 0; seat < others; ++seat) call(crew.seats[seat].state);
    work(0);
    for (int seat = 0; seat < others; ++seat) dismiss(crew.seats[seat].state);
    crew.taken.store(false, std::memory_order_release);
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};

  static void call(std::atomic<int32_t>& state) {
    state.store(satchel::kCalled, std::memory_order_release);
    state.notify_one();
  }

  static void dismiss(std::atomic<int32_t>& state) {
    int32_t called = satchel::kCalled;
    if (state.compare_exchange_strong(called, satchel::kIdle, std::memory_order_relaxed)) return;
    wait_until([&] { return state.load(std::memory_order_acquire) == satchel::kIdle; });
  }
};

// The part of `count` things that thread `me` of `size` takes: [first, second).
inline std::pair<int, int> share(int count, int me, int size) {
  return {static_cast<int>(int64_t{count} * me / size), static_cast<int>(int64_t{count} * (me + 1) / size)};
}

// Calls piece(i) for i < count on up to `threads` threads.
template <typename Piece>
void each(int64_t count, int threads, Piece piece) {
  std::atomic<int64_t> next{0};
  Team().run(static_cast<int>(std::min<int64_t>(threads, count)), [&](int) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) piece(i);
  });
}

}  // namespace
