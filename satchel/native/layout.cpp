// Rows of blocks as a file holds them, laid in tiles of 16 rows (matrix.h), in one pass. Blocks of formats that nothing
// multiplies by become Q8_0 on the way: the numbers and the codes are those of model/encodings.py and model/tiles.py, bit
// for bit.

#include <cmath>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace {

constexpr int kRows = kLanes;           // of a tile
constexpr int kBlock = 32;              // numbers that share a scale in Q8_0
constexpr int kMost = 256;              // numbers of the largest block
constexpr int kQ8 = 34;                 // bytes of a block in Q8_0
constexpr int64_t kPiece = 1 << 17;     // bytes that a thread takes at once

struct Rows {
  const uint8_t* from;  // [outputs, blocks * nbytes]
  uint8_t* tiles;       // of all groups of 16 rows; rows that are missing become zeros
  int64_t outputs, blocks;
  int32_t nbytes, halves;  // bytes of a block, fields of 2 bytes in front of those of 4
};

// A step reads all tiles once; with pages of 2 MiB it looks up 512 times fewer addresses. Only where these lie within the
// tiles as a whole, so that nothing beside them takes memory; a system that has none does nothing.
inline void in_large_pages(uint8_t* tiles, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  const auto from = reinterpret_cast<uintptr_t>(tiles);
  const uintptr_t first = (from + kLarge - 1) / kLarge * kLarge, last = (from + bytes) / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// One block of each of 16 rows as a tile.
inline void lay(const uint8_t* const* block, int nbytes, int halves, uint8_t* tile) {
  for (int f = 0; f < halves; ++f)
    for (int r = 0; r < kRows; ++r) std::memcpy(tile + 2 * (kRows * f + r), block[r] + 2 * f, 2);
  uint8_t* fours = tile + 2 * kRows * halves;
  for (int r = 0; r < kRows; ++r)
    for (int f = 0; 4 * f < nbytes - 2 * halves; ++f)
      std::memcpy(fours + 4 * (kRows * f + r), block[r] + 2 * halves + 4 * f, 4);
}

// Calls make(blocks of 16 rows, index of the block, group) for every tile of one group; missing rows are zeros.
template <typename Make>
void blocks_of(const Rows& rows, int64_t group, Make make) {
  static constexpr uint8_t kZeros[4 * kMost] = {};
  for (int64_t m = 0; m < rows.blocks; ++m) {
    const uint8_t* block[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = group * kRows + r;
      block[r] = row < rows.outputs ? rows.from + (row * rows.blocks + m) * rows.nbytes : kZeros;
    }
    make(block, m);
  }
}

// Calls group(g) for every 16 rows, whose tiles take `bytes` each.
template <typename Group>
void by_groups(const Rows& rows, int64_t bytes, int threads, Group group) {
  const int64_t groups = (rows.outputs + kRows - 1) / kRows;
  in_large_pages(rows.tiles, groups * bytes);
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, kRows * rows.blocks * rows.nbytes));
  each((groups + step - 1) / step, threads, [&](int64_t piece) {
    for (int64_t g = piece * step; g < std::min(groups, (piece + 1) * step); ++g) group(g);
  });
}

// A finite float16 as a float: exact, subnormal numbers too.
inline float half(const uint8_t* from) {
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return std::bit_cast<float>((bits & 0x7FFFu) << 13) * 0x1p112f * (bits & 0x8000 ? -1.0f : 1.0f);
}

// The nearest float16 of x >= 0, of two the even one.
inline uint16_t to_half(float x) {
  if (!(x < 65520.0f)) return x == x ? 0x7C00 : 0x7E00;
  if (x < 0x1p-14f) return static_cast<uint16_t>(std::bit_cast<uint32_t>(x + 0.5f) - std::bit_cast<uint32_t>(0.5f));
  const uint32_t bits = std::bit_cast<uint32_t>(x) - (112u << 23);
  return static_cast<uint16_t>((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}

// Each format has the numbers and the bytes of a block, and `decode`, which writes the numbers.

struct Q5_0 {
  static constexpr int kNumbers = 32, kBytes = 22;
  static void decode(const uint8_t* block, float* out) {
    integers(block + 6, block + 2, out);
    const float scale = half(block);
    for (int i = 0; i < kNumbers; ++i) out[i] = (out[i] - 16) * scale;
  }
  // Low nibbles are numbers 0-15, high ones 16-31; the fifth bits lie in four bytes.
  static void integers(const uint8_t* nibbles, const uint8_t* fifths, float* out) {
    uint32_t fifth;
    std::memcpy(&fifth, fifths, sizeof fifth);
    for (int i = 0; i < 16; ++i) {
      out[i] = static_cast<float>((nibbles[i] & 15) | (fifth >> i & 1) << 4);
      out[i + 16] = static_cast<float>((nibbles[i] >> 4) | (fifth >> (i + 16) & 1) << 4);
    }
  }
};

struct Q5_1 {
  static constexpr int kNumbers = 32, kBytes = 24;
  static void decode(const uint8_t* block, float* out) {
    Q5_0::integers(block + 8, block + 4, out);
    const float scale = half(block), offset = half(block + 2);
    for (int i = 0; i < kNumbers; ++i) out[i] = out[i] * scale + offset;
  }
};

struct Q5_K {
  static constexpr int kNumbers = 256, kBytes = 176;
  static void decode(const uint8_t* block, float* out) {
    const uint8_t *a = block + 4, *b = block + 8, *low = block + 12, *fifths = block + 16, *nibbles = block + 48;
    for (int i = 0; i < 8; ++i) {  // scale and offset are multiples of 6 bits: see `_k_scales` in model/encodings.py
      const int j = i & 3;
      const int scales = i < 4 ? a[j] & 63 : (low[j] & 15) | (a[j] >> 2 & 48);
      const int offsets = i < 4 ? b[j] & 63 : low[j] >> 4 | (b[j] >> 2 & 48);
      const float scale = static_cast<float>(scales) * half(block);
      const float offset = static_cast<float>(offsets) * half(block + 2);
      for (int k = 0; k < kBlock; ++k) {
        const int q = (nibbles[kBlock * (i / 2) + k] >> 4 * (i & 1) & 15) | (fifths[k] >> i & 1) << 4;
        out[kBlock * i + k] = static_cast<float>(q) * scale - offset;
      }
    }
  }
};

struct Q6_K {
  static constexpr int kNumbers = 256, kBytes = 210;
  static void decode(const uint8_t* block, float* out) {
    const float whole = half(block + 208);
    for (int side = 0; side < 2; ++side, out += 128) {
      const uint8_t *low = block + 64 * side, *high = block + 128 + 32 * side;
      for (int i = 0; i < 128; ++i) {
        const int q = (low[i & 63] >> 4 * (i / 64) & 15) | (high[i & 31] >> 2 * (i / 32) & 3) << 4;
        const float scale = static_cast<float>(static_cast<int8_t>(block[192 + 8 * side + i / 16])) * whole;
        out[i] = static_cast<float>(q - 32) * scale;
      }
    }
  }
};

struct F16 {
  static constexpr int kNumbers = 32, kBytes = 64;
  static void decode(const uint8_t* block, float* out) {
    for (int i = 0; i < kNumbers; ++i) out[i] = half(block + 2 * i);
  }
};

struct BF16 {
  static constexpr int kNumbers = 32, kBytes = 64;
  static void decode(const uint8_t* block, float* out) {
    for (int i = 0; i < kNumbers; ++i) {
      Half number;
      std::memcpy(&number, block + 2 * i, sizeof number);
      out[i] = widen(number);
    }
  }
};

struct F32 {
  static constexpr int kNumbers = 32, kBytes = 128;
  static void decode(const uint8_t* block, float* out) { std::memcpy(out, block, kBytes); }
};

// 32 finite numbers in Q8_0: scale = max |x| / 127 as a float16.
inline void encode(const float* x, uint8_t* block) {
  const Vector a = widen16(x), b = widen16(x + kLanes);
  Vector top = a < Vector{} ? -a : a;
  const Vector other = b < Vector{} ? -b : b;
  top = other > top ? other : top;
  float most = 0;
  for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
  const uint16_t scale = to_half(most / 127.0f);
  std::memcpy(block, &scale, sizeof scale);
  const float inverse = scale == 0 ? 0.0f : 1.0f / half(block);
  const auto code = [&](Vector v) {
    v *= inverse;
    v = v > Vector{} + 127.0f ? Vector{} + 127.0f : v;
    v = v < Vector{} - 127.0f ? Vector{} - 127.0f : v;
    // adding 1.5 * 2^23 rounds to the nearest integer, halves to even, which is then in the low bits
    const Words bits = reinterpret_cast<Words>(v + 0x1.8p23f);
    using Bytes = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
    return __builtin_convertvector(bits, Bytes);
  };
  const auto low = code(a), high = code(b);
  std::memcpy(block + 2, &low, sizeof low);
  std::memcpy(block + 2 + kLanes, &high, sizeof high);
}

template <typename Format>
void lay_as_q8(Rows rows, int threads) {
  constexpr int kBlocks = Format::kNumbers / kBlock;
  rows.nbytes = Format::kBytes;
  by_groups(rows, rows.blocks * kBlocks * kQ8 * kRows, threads, [&](int64_t group) {
    blocks_of(rows, group, [&](const uint8_t* const* block, int64_t m) {
      uint8_t made[kRows][kBlocks][kQ8];
      for (int r = 0; r < kRows; ++r) {
        float numbers[Format::kNumbers];
        Format::decode(block[r], numbers);
        for (int i = 0; i < kBlocks; ++i) encode(numbers + kBlock * i, made[r][i]);
      }
      for (int i = 0; i < kBlocks; ++i) {
        const uint8_t* each[kRows];
        for (int r = 0; r < kRows; ++r) each[r] = made[r][i];
        lay(each, kQ8, 1, rows.tiles + ((group * rows.blocks + m) * kBlocks + i) * kQ8 * kRows);
      }
    });
  });
}

using Lay = void (*)(Rows, int);
constexpr Lay kFormats[] = {lay_as_q8<Q5_0>, lay_as_q8<Q5_1>, lay_as_q8<Q5_K>, lay_as_q8<Q6_K>,
                            lay_as_q8<F16>,  lay_as_q8<BF16>, lay_as_q8<F32>};

}  // namespace

extern "C" {

// Rows of `blocks` blocks as they are.
void satchel_tiles(const uint8_t* from, uint8_t* tiles, int64_t outputs, int64_t blocks, int nbytes, int halves,
                   int threads) {
  const Rows rows = {from, tiles, outputs, blocks, nbytes, halves};
  by_groups(rows, blocks * nbytes * kRows, threads, [&](int64_t group) {
    blocks_of(rows, group, [&](const uint8_t* const* block, int64_t m) {
      lay(block, nbytes, halves, tiles + (group * blocks + m) * nbytes * kRows);
    });
  });
}

// Rows of blocks of format `kind` of CONVERTED in layout.py, as Q8_0.
void satchel_tiles_q8(const uint8_t* from, uint8_t* tiles, int64_t outputs, int64_t blocks, int kind, int threads) {
  kFormats[kind]({from, tiles, outputs, blocks, 0, 0}, threads);
}
}
