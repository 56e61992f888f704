// Chooses a token from a row of logits, as model/sampling.py does: top_k, then top_p, then min_p, then the largest of
//
//     logit / temperature + G(key, token),   G standard Gumbel noise by a hash
//
// Where the last bits of a logarithm or of a sum could decide, it says so instead of choosing, and the caller does the
// sums as they are defined. So nothing here has to round as torch does, and little is computed: noise is bounded, so a
// token far below the best can neither win nor be near to it.

#include <cmath>
#include <limits>

#include "functions.h"

namespace {

constexpr int64_t kUndecided = -1;
constexpr int kBits = 23;               // of the uniform numbers; as in model/sampling.py
constexpr float kMostNoise = 16.7f;     // -log(-log(1 - 2^-24)), and a little
constexpr size_t kMostCandidates = 1 << 16;  // more are left to torch

using Longs = uint64_t __attribute__((vector_size(64)));

struct How {
  float temperature;
  int32_t top_k;       // 0: all
  float top_p;         // 1: all
  float log_min_p;     // logarithm of min_p; -inf: all
  uint64_t key;
};

struct Candidate {
  float logit;  // over temperature
  int64_t token;
};

// Noise of 8 tokens, as bits of a uniform number.
Longs mixed(uint64_t key, Longs token) {
  Longs z = token * 0x9E3779B97F4A7C15u + key;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return (z ^ z >> 31) >> (64 - kBits);
}

Vector noise(uint64_t key, Longs low, Longs high) {
  const Longs halves[2] = {mixed(key, low), mixed(key, high)};
  Vector uniform;
  for (int i = 0; i < kLanes; ++i) uniform[i] = static_cast<float>(static_cast<int32_t>(halves[i / 8][i % 8]));
  uniform = (uniform + 0.5f) * (1.0f / (1 << kBits));
  return -logarithm(-logarithm(uniform));
}

// The best score so far and the one behind it.
struct Race {
  float best = -std::numeric_limits<float>::infinity(), second = best;
  int64_t winner = kUndecided;

  void enter(float score, int64_t token) {
    if (score > best) {
      second = best;
      best = score;
      winner = token;
    } else if (score > second) {
      second = score;
    }
  }
  float margin() const { return 1e-4f + 2e-6f * std::fabs(best); }
  int64_t result() const { return best - second > margin() ? winner : kUndecided; }
};

bool any(Ints where) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= where[i];
  return found;
}

Vector load(const float* from, int64_t count) {  // -inf past the end
  if (count >= kLanes) return widen16(from);
  Vector out = all(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; ++i) out[i] = from[i];
  return out;
}

float top_of(const float* logits, int64_t count) {
  Vector top = all(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector v = load(logits + i, count - i);
    top = v > top ? v : top;
  }
  float out = top[0];
  for (int i = 1; i < kLanes; ++i) out = std::max(out, top[i]);
  return out;
}

// Among all tokens whose logit over temperature is at least `lowest`; `top` is the highest of these.
int64_t race_all(const float* logits, int64_t count, const How& how, float top, float lowest) {
  Race race;
  const Longs eight = {0, 1, 2, 3, 4, 5, 6, 7};
  float worth = std::max(lowest, top - 2 * kMostNoise);  // noise is above -kMostNoise
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector logit = load(logits + i, count - i) / how.temperature;
    if (!any(logit >= worth)) continue;
    const Vector score = logit + noise(how.key, eight + i, eight + (i + 8));
    for (int lane = 0; lane < kLanes; ++lane)
      if (logit[lane] >= worth) race.enter(score[lane], i + lane);
    worth = std::max(worth, race.best - race.margin() - kMostNoise);
  }
  return race.result();
}

double mass(const float* logits, int64_t count, float temperature, float top) {
  double sum = 0;
  for (int64_t i = 0; i < count; i += kLanes) sum += total(exponential(load(logits + i, count - i) / temperature - top));
  return sum;
}

// Tokens of at least `lowest` into `out`; their mass relative to the top.
double gather(const float* logits, int64_t count, float temperature, float lowest, float top,
              std::vector<Candidate>& out) {
  double sum = 0;
  out.clear();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector logit = load(logits + i, count - i) / temperature;
    const Ints held = logit >= lowest;
    if (!any(held)) continue;
    sum += total(held ? exponential(logit - top) : Vector{});
    for (int lane = 0; lane < kLanes; ++lane)
      if (held[lane]) out.push_back({logit[lane], i + lane});
  }
  return sum;
}

// How many of the falling candidates are left: surely, and at most. Between lie those of which the last bits of a sum
// tell, or how equals are sorted.
struct Left {
  size_t sure, possible;
};

Left widened(const std::vector<Candidate>& falling, Left left) {
  const auto equal = [&](size_t at) {
    return at > 0 && at < falling.size() && falling[at].logit == falling[at - 1].logit;
  };
  while (equal(left.sure)) --left.sure;
  while (equal(left.possible)) ++left.possible;
  return left;
}

// What top_p leaves of a whole of this mass.
Left nucleus(const std::vector<Candidate>& falling, Left left, float top, double whole, float top_p) {
  const double slack = 2e-6 + 2e-7 * std::fabs(std::log(whole) + top);
  double before = 0;
  size_t sure = 0, possible = 0;
  for (; possible < left.possible && (possible == 0 || before < top_p + slack); ++possible) {
    if (possible == 0 || before < top_p - slack) sure = possible + 1;
    before += std::exp(falling[possible].logit - top) / whole;
  }
  const Left found = widened(falling, {sure, possible});
  return {std::min(left.sure, found.sure), std::min(left.possible, found.possible)};
}

// The winner among what is left, if it is the same one whoever is left.
int64_t race_some(const std::vector<Candidate>& falling, Left left, const How& how, float lowest) {
  Race race;
  for (size_t i = 0; i < left.possible; i += kLanes) {
    const size_t here = std::min<size_t>(kLanes, left.possible - i);
    Longs tokens[2] = {};
    for (size_t lane = 0; lane < here; ++lane) tokens[lane / 8][lane % 8] = falling[i + lane].token;
    const Vector drawn = noise(how.key, tokens[0], tokens[1]);
    for (size_t lane = 0; lane < here; ++lane)
      if (falling[i + lane].logit >= lowest) race.enter(falling[i + lane].logit + drawn[lane], i + lane);
  }
  const int64_t winner = race.result();
  return winner == kUndecided || winner >= static_cast<int64_t>(left.sure) ? kUndecided : falling[winner].token;
}

int64_t choose(const float* logits, int64_t count, const How& how) {
  const float top = top_of(logits, count) / how.temperature, lowest = top + how.log_min_p;
  if (!std::isfinite(top)) return kUndecided;
  const size_t top_k = how.top_k < count ? how.top_k : 0;
  if (top_k == 0 && how.top_p >= 1) return race_all(logits, count, how, top, lowest);
  thread_local std::vector<Candidate> falling;
  double whole = top_k ? 0 : mass(logits, count, how.temperature, top);
  for (float depth = 4;; depth *= 1.5f) {
    const double held = gather(logits, count, how.temperature, top - depth, top, falling);
    if (falling.size() > kMostCandidates || depth > 1e4f) return kUndecided;
    if (top_k ? falling.size() > top_k : held > (how.top_p + 2e-5) * whole) break;
    if (falling.size() == static_cast<size_t>(count)) break;
  }
  std::sort(falling.begin(), falling.end(), [](const auto& a, const auto& b) { return a.logit > b.logit; });
  const size_t all = top_k ? top_k : falling.size();
  for (size_t i = 0; top_k && i < top_k; ++i) whole += std::exp(falling[i].logit - top);
  Left left = widened(falling, {all, all});
  if (how.top_p < 1) left = nucleus(falling, left, top, whole, how.top_p);
  return race_some(falling, left, how, lowest);
}

}  // namespace

extern "C" {

int64_t satchel_sample(const float* logits, int64_t count, float temperature, int top_k, float top_p, float log_min_p,
                       uint64_t key) {
  return choose(logits, count, {temperature, top_k, top_p, log_min_p, key});
}
}
