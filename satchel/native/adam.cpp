// Adam's step, and the landing of a step in a narrow parameter, in one pass over memory.
//
// An array's kind says how it is kept; a block of 256 elements is widened into the first-level cache, stepped in
// float32, and written back. Every operation is the one that the torch path in optim/_shared.py does, in its order:
// moments agree bit for bit, parameters but for the last bit of MKL's square root. The noise of stochastic rounding is
// a hash of (seed, index of the element), so that it does not matter which thread takes which block.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kBlock = 256;         // elements that share a scale in 8 bits
constexpr int64_t kChunk = 1 << 16;  // elements that a thread takes at once

enum Kind : int32_t { kFloat, kNearest, kStochastic, kSplit, kCodes };  // kNearest to kSplit hold bfloat16

struct Array {
  void* data;
  int16_t* low;          // kSplit: the float32 master's bits minus those of the bfloat16
  float* scale;          // kCodes: one a block
  const float* value;    // kCodes: what the 256 codes stand for, ascending
  const uint32_t* cell;  // kCodes: by the upper 16 bits of a value: lower code, and bits above which the next is nearer
  int32_t kind;
};

struct Rates {
  float grow1, beta2, grow2, eps, step_size, keep;  // grow is 1 - beta
};

float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }

void noise_of(uint64_t seed, int64_t at, int n, uint32_t* out) {
  const uint32_t base = static_cast<uint32_t>(seed) + static_cast<uint32_t>(at);
  const uint32_t key = static_cast<uint32_t>(seed) * 0x9E3779B9u;
  for (int i = 0; i < n; ++i) {
    uint32_t x = base + i;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = ((x ^ (x >> 15)) + key) * 0x846CA68Bu;
    out[i] = x ^ (x >> 16);
  }
}

void read(const Array& from, int64_t at, int n, float* __restrict out) {
  const auto* half = static_cast<const uint16_t*>(from.data) + at;
  switch (from.kind) {
    case kFloat:
      std::memcpy(out, static_cast<const float*>(from.data) + at, n * sizeof(float));
      break;
    case kNearest:
    case kStochastic:
      for (int i = 0; i < n; ++i) out[i] = as_float(static_cast<uint32_t>(half[i]) << 16);
      break;
    case kSplit:
      for (int i = 0; i < n; ++i) out[i] = as_float((static_cast<uint32_t>(half[i]) << 16) + from.low[at + i]);
      break;
    case kCodes: {
      const auto* code = static_cast<const uint8_t*>(from.data) + at;
      const float *value = from.value, scale = from.scale[at / kBlock];
      for (int i = 0; i < n; ++i) out[i] = value[code[i]] * scale;
    }
  }
}

void write_nearest(const float* __restrict in, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(in[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);  // a NaN stays one
  }
}

void encode(const float* __restrict in, float divisor, const uint32_t* __restrict cell, int n, uint8_t* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(in[i] / divisor);
    const uint32_t entry = cell[bits >> 16];
    const uint32_t rest = (bits ^ (0u - (bits >> 31))) & 0xFFFF;  // of a negative value, falls as its magnitude grows
    out[i] = static_cast<uint8_t>((entry & 0xFF) + (rest > entry >> 16));
  }
}

void write_codes(const Array& to, int64_t at, const float* __restrict in, int n) {
  uint32_t largest = 0;  // as bits, which order like magnitudes, NaN above all
  for (int i = 0; i < n; ++i) largest = std::max(largest, as_bits(in[i]) & 0x7FFFFFFF);
  const float scale = as_float(largest);
  encode(in, scale < 0x1p-126f ? 0x1p-126f : scale, to.cell, n, static_cast<uint8_t*>(to.data) + at);
  to.scale[at / kBlock] = scale;
}

// `noise` holds at most 16 bits an element, shifted left by `shift`.
void write(const Array& to, int64_t at, const float* __restrict in, int n, const uint32_t* noise, int shift) {
  auto* half = static_cast<uint16_t*>(to.data) + at;
  switch (to.kind) {
    case kFloat:
      std::memcpy(static_cast<float*>(to.data) + at, in, n * sizeof(float));
      break;
    case kNearest:
      write_nearest(in, n, half);
      break;
    case kStochastic:
      for (int i = 0; i < n; ++i)
        half[i] = static_cast<uint16_t>((as_bits(in[i]) + ((noise[i] >> shift) & 0xFFFF)) >> 16);
      break;
    case kSplit:
      for (int i = 0; i < n; ++i) {
        const uint32_t bits = as_bits(in[i]), high = (bits + 0x8000) >> 16;
        half[i] = static_cast<uint16_t>(high);
        to.low[at + i] = static_cast<int16_t>(bits - (high << 16));
      }
      break;
    case kCodes:
      write_codes(to, at, in, n);
  }
}

void adam(const Rates& r, const float* __restrict g, float* __restrict x, float* __restrict m, float* __restrict v,
          int n) {
  const bool near = r.grow1 < 0.5f;  // which end torch's lerp starts from
  const float weight = near ? r.grow1 : r.grow1 - 1;
  for (int i = 0; i < n; ++i) {
    m[i] = std::fma(weight, g[i] - m[i], near ? m[i] : g[i]);
    v[i] = std::fma(r.grow2 * g[i], g[i], v[i] * r.beta2);
    x[i] = x[i] * r.keep + -r.step_size * m[i] / (std::sqrt(v[i]) + r.eps);
  }
}

// Calls block(start, elements) for every block of `count` elements, on up to `threads` threads, this one included.
template <typename Block>
void each_block(int64_t count, int threads, Block block) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t start; (start = next.fetch_add(kChunk)) < count;) {
      const int64_t end = std::min(count, start + kChunk);
      for (int64_t at = start; at < end; at += kBlock) block(at, static_cast<int>(std::min<int64_t>(kBlock, end - at)));
    }
  };
  std::vector<std::thread> others;
  const int64_t useful = std::min<int64_t>(threads, (count + kChunk - 1) / kChunk);
  try {
    while (static_cast<int64_t>(others.size()) + 1 < useful) others.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that there are do all of it
  }
  work();
  for (auto& other : others) other.join();
}

struct alignas(64) Buffer {
  float x[kBlock], g[kBlock], m[kBlock], v[kBlock];
  uint32_t noise[kBlock];
};

}  // namespace

extern "C" {

void satchel_adam(const Array* x, const Array* g, const Array* m, const Array* v, const Rates* rates, int64_t count,
                  uint64_t seed, int threads) {
  const bool noisy = x->kind == kStochastic || v->kind == kStochastic;
  each_block(count, threads, [=](int64_t at, int n) {
    Buffer b;
    read(*x, at, n, b.x);
    read(*g, at, n, b.g);
    read(*m, at, n, b.m);
    read(*v, at, n, b.v);
    adam(*rates, b.g, b.x, b.m, b.v, n);
    if (noisy) noise_of(seed, at, n, b.noise);
    write(*x, at, b.x, n, b.noise, 0);
    write(*m, at, b.m, n, b.noise, 0);
    write(*v, at, b.v, n, b.noise, 16);
  });
}

void satchel_move(const Array* x, const Array* step, float keep, int64_t count, uint64_t seed, int threads) {
  each_block(count, threads, [=](int64_t at, int n) {
    Buffer b;
    read(*x, at, n, b.x);
    read(*step, at, n, b.g);
    for (int i = 0; i < n; ++i) b.x[i] = b.x[i] * keep + b.g[i];
    if (x->kind == kStochastic) noise_of(seed, at, n, b.noise);
    write(*x, at, b.x, n, b.noise, 0);
  });
}
}
