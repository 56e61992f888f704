// Adam's step, the landing of a step in a narrow parameter, and moves along random directions, in one pass over memory.
//
// An array's kind says how it is kept; a block of 256 elements is widened into the first-level cache, stepped in
// float32, and written back. Every operation is the one that the torch paths in optim/ do, in their order:
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

// A random direction of zeroth-order descent: a number for each element, none of them kept. See optim/_directions.py.
struct Direction {
  uint64_t seed, mask_seed;
  int32_t masked;  // of 2^31: the share of elements that are zero
  float radius;    // how far along it the parameter is moved to measure; 0: not at all
};

// Sums of the four bytes of a hash, standardised: nearly normal.
void draw(const Direction& d, int64_t at, int n, float* __restrict z) {
  uint32_t bits[kBlock];
  noise_of(d.seed, at, n, bits);
  for (int i = 0; i < n; ++i) {
    const uint32_t pairs = (bits[i] & 0xFF00FF) + ((bits[i] >> 8) & 0xFF00FF);
    z[i] = static_cast<float>(static_cast<int32_t>((pairs & 0xFFFF) + (pairs >> 16)) - 510) * 0.006765875086793227f;
  }
  if (d.masked == 0) return;
  noise_of(d.mask_seed, at, n, bits);
  for (int i = 0; i < n; ++i) z[i] = static_cast<int32_t>(bits[i] & 0x7FFFFFFF) < d.masked ? 0.0f : z[i];
}

// How far each bfloat16 hops to either side, in units in its last place: to its partner there, or nowhere.
void hops(const uint16_t* __restrict half, const float* __restrict z, float radius, int n, int32_t* __restrict up,
          int32_t* __restrict down) {
  for (int i = 0; i < n; ++i) {
    const int32_t exponent = (half[i] >> 7) & 0xFF, place = half[i] & 0x7F;
    const bool ordinary = exponent >= 8 && exponent < 255;
    const float units = as_float(static_cast<uint32_t>(261 - (ordinary ? exponent : 8)) << 23);
    const float wide = std::fabs(z[i]) * radius * units;
    int32_t step = static_cast<int32_t>((wide < 100.0f ? wide : 100.0f) + 0.5f);
    step = ordinary && step <= 64 ? step : 0;
    const bool odd = static_cast<int32_t>(static_cast<float>(place) / static_cast<float>(step > 1 ? step : 1)) & 1;
    const int32_t outward = place + step < 128 ? step : 0, inward = place >= step ? -step : 0;
    const int32_t first = odd ? inward : outward, second = odd ? outward : inward;
    up[i] = z[i] < 0 ? second : first;
    down[i] = z[i] < 0 ? first : second;
  }
}

void hop(uint16_t* __restrict half, const float* z, float radius, int side, int n) {
  int32_t up[kBlock], down[kBlock];
  hops(half, z, radius, n, up, down);
  for (int i = 0; i < n; ++i) half[i] = static_cast<uint16_t>(half[i] + (side > 0 ? up[i] : down[i]));
}

// Replaces z by the half of what lies between the two partners, in radii.
void between(const uint16_t* __restrict half, float* __restrict z, float radius, int n) {
  int32_t up[kBlock], down[kBlock];
  hops(half, z, radius, n, up, down);
  const float per_radius = 0.5f / radius;
  for (int i = 0; i < n; ++i) {
    const int32_t exponent = (half[i] >> 7) & 0xFF, apart = up[i] - down[i];
    const float unit = as_float(static_cast<uint32_t>((apart != 0 ? exponent : 8) - 7) << 23);
    const float size = static_cast<float>(apart) * unit * per_radius;
    z[i] = half[i] >> 15 ? -size : size;
  }
}

bool hopping(const Array& x) { return x.kind == kNearest || x.kind == kStochastic; }

// The sum of sizes[k] times direction k, as far as x moves along it.
void sum_of(const Array& x, const Direction* directions, const float* sizes, int count, int64_t at, int n,
            float* __restrict sum) {
  float z[kBlock];
  std::fill(sum, sum + n, 0.0f);
  for (int k = 0; k < count; ++k) {
    draw(directions[k], at, n, z);
    if (hopping(x) && directions[k].radius > 0)
      between(static_cast<const uint16_t*>(x.data) + at, z, directions[k].radius, n);
    for (int i = 0; i < n; ++i) sum[i] = sum[i] + z[i] * sizes[k];
  }
}

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

void satchel_perturb(const Array* x, const Direction* direction, int back, int forth, int64_t count, int threads) {
  const float distance = direction->radius * static_cast<float>(forth - back);
  each_block(count, threads, [=](int64_t at, int n) {
    Buffer b;
    draw(*direction, at, n, b.g);
    if (hopping(*x)) {
      auto* half = static_cast<uint16_t*>(x->data) + at;
      if (back != 0) hop(half, b.g, direction->radius, back, n);
      if (forth != 0) hop(half, b.g, direction->radius, forth, n);
      return;
    }
    read(*x, at, n, b.x);
    for (int i = 0; i < n; ++i) b.x[i] = b.x[i] + b.g[i] * distance;
    write(*x, at, b.x, n, b.noise, 0);
  });
}

// m = beta m + g;  x = keep x - lr m, where g is the sum of the directions; without m, x = keep x - lr g.
void satchel_descend(const Array* x, const Array* m, const Direction* directions, const float* sizes, int directed,
                     float beta, float lr, float keep, int64_t count, uint64_t seed, int threads) {
  each_block(count, threads, [=](int64_t at, int n) {
    Buffer b;
    sum_of(*x, directions, sizes, directed, at, n, b.g);
    if (m != nullptr) {
      read(*m, at, n, b.m);
      for (int i = 0; i < n; ++i) b.g[i] = b.m[i] * beta + b.g[i];
      write(*m, at, b.g, n, b.noise, 0);
    }
    read(*x, at, n, b.x);
    for (int i = 0; i < n; ++i) b.x[i] = b.x[i] * keep + b.g[i] * -lr;
    if (x->kind == kStochastic) noise_of(seed, at, n, b.noise);
    write(*x, at, b.x, n, b.noise, 0);
  });
}

void satchel_estimate(const Array* x, const Array* out, const Direction* directions, const float* sizes, int directed,
                      int64_t count, int threads) {
  each_block(count, threads, [=](int64_t at, int n) {
    Buffer b;
    sum_of(*x, directions, sizes, directed, at, n, b.g);
    write(*out, at, b.g, n, b.noise, 0);
  });
}
}
