// What this machine can do at most, for bench/decode: bytes read from memory and multiplications, a second.

#include <chrono>
#include <cstddef>

#include "vectors.h"

#if defined(__AMX_BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int64_t read_all(const char* from, size_t bytes) {
  using Line = int64_t __attribute__((vector_size(64)));
  Line sums[4] = {};
  const auto* line = reinterpret_cast<const Line*>(from);
  for (size_t i = 0; i + 4 <= bytes / sizeof(Line); i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += line[i + k];
  const Line sum = sums[0] + sums[1] + sums[2] + sums[3];
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

constexpr int kTurns = 1 << 14;

// The compiler would compute sums that it knows to be equal only once.
template <typename Sum, int N>
void apart(Sum (&sums)[N]) {
  for (Sum& sum : sums) {
    sum = Sum{};
    __asm__ volatile("" : "+m"(sum));
  }
}

#ifdef __AMX_BF16__

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Products of 32 x 32 by 32, both sides from the nearest cache; operations done.
double multiply() {
  static Tiles tiles;
  alignas(64) static thread_local uint16_t near[4][512];
  __asm__ volatile("" : : "r"(&tiles) : "memory");  // GCC 12 drops the stores without it
  _tile_loadconfig(&tiles);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int i = 0; i < kTurns; ++i) {
    _tile_loadd(4, near[0], 64);
    _tile_loadd(5, near[1], 64);
    _tile_loadd(6, near[2], 64);
    _tile_loadd(7, near[3], 64);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 32 * 32 * 32 * kTurns;
}

bool begin() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

#elif defined(__AVX512VNNI__)

// 64 products of 8 bits at once, both sides from registers; operations done.
double multiply() {
  constexpr int kSums = 16;
  __m512i sums[kSums], factor = _mm512_set1_epi8(1);
  apart(sums);
  for (int i = 0; i < kTurns; ++i) {
    for (int k = 0; k < kSums; ++k) sums[k] = _mm512_dpbusd_epi32(sums[k], factor, factor);
    __asm__ volatile("" : "+v"(factor));
  }
  for (int k = 0; k < kSums; ++k) __asm__ volatile("" : : "v"(sums[k]));
  return 2.0 * kSums * 64 * kTurns;
}

bool begin() { return true; }

#else

double multiply() {
  constexpr int kSums = 8;
  Vector sums[kSums], factor = Vector{} + 1.0f;
  apart(sums);
  for (int i = 0; i < kTurns; ++i) {
    for (int k = 0; k < kSums; ++k) sums[k] += sums[k] * factor;
    __asm__ volatile("" : "+m"(factor));
  }
  __asm__ volatile("" : : "m"(sums));
  return 2.0 * kSums * kLanes * kTurns;
}

bool begin() { return true; }

#endif

}  // namespace

extern "C" {

// Bytes a second, `threads` threads reading a part each.
double satchel_read_rate(const char* from, size_t bytes, int threads) {
  std::atomic<int64_t> sum{0};
  const size_t part = bytes / threads / 256 * 256;
  const double start = now();
  each(threads, threads, [&](int64_t i) { sum += read_all(from + i * part, part); });
  const double took = now() - start;
  return sum == 42 ? 0 : part * threads / took;
}

// Operations a second: of bfloat16 in tiles where there are tiles, of 8 bits where there are dot products of these, else
// of float32; 0 if the system refuses tiles.
double satchel_product_rate(int threads, int turns) {
  if (!begin()) return 0;
  std::atomic<int64_t> done{0};
  const double start = now();
  each(int64_t{threads} * turns, threads, [&](int64_t) { done += static_cast<int64_t>(multiply()); });
  return done / (now() - start);
}
}
