// Tokens drawn from rows of logits: weights, cuts by number (top-k), share (top-p) and least weight (min-p), and the choice itself. A row
// is one thread's, so threads do not touch its bits. As device/draws.py, in float32 where that computes in float64.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

namespace xllm {

struct Drawing {  // as in device/cpu/native/library.py
  const double* numbers;  // [count] uniform in [0, 1)
  int64_t* tokens;        // [count] what they drew
  float* weights;         // [vocabulary] what each token weighs after the cuts; or null
  int64_t row, count, most;
  double temperature, share, least;
};

// Weights lie in [0, 1], where the order of the numbers is that of their bits; two tables find any of them without sorting.
constexpr int HALF_BITS = 16, LEADING = (0x3f800000 >> HALF_BITS) + 1, FOLLOWING = 1 << HALF_BITS, BLOCK = 512;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct Tables {
  std::vector<float> weights;
  std::vector<double> reached = std::vector<double>(LEADING);
  std::vector<int32_t> equal = std::vector<int32_t>(FOLLOWING);
};

inline Tables& tables() {  // of this thread
  static thread_local Tables room;
  return room;
}

// Zero all but the greatest that together reach `enough`: of their number, or of their weight. Of equal ones the first stay.
template <bool OF_WEIGHT>
void keep(float* weights, long n, double enough, Tables& room) {
  double* amounts = room.reached.data();
  std::fill(amounts, amounts + LEADING, 0.0);
  for (long i = 0; i < n; i++)
    if (weights[i] > 0) amounts[bits_of(weights[i]) >> HALF_BITS] += OF_WEIGHT ? double(weights[i]) : 1.0;
  if (OF_WEIGHT) {
    double all_of_them = 0;
    for (int b = LEADING; b--;) all_of_them += amounts[b];
    enough *= all_of_them;
  }
  int bucket = LEADING - 1;
  double ahead = 0;
  while (bucket && ahead + amounts[bucket] < enough) ahead += amounts[bucket--];
  int32_t* equal = room.equal.data();
  std::fill(equal, equal + FOLLOWING, 0);
  for (long i = 0; i < n; i++)
    if (int(bits_of(weights[i]) >> HALF_BITS) == bucket && weights[i] > 0) equal[bits_of(weights[i]) & (FOLLOWING - 1)]++;
  float bound = 0;  // what weighs less goes
  long spare = 0;   // how many of those that weigh just that stay
  for (int low = FOLLOWING; low-- && ahead < enough;) {
    if (!equal[low]) continue;
    const uint32_t bits = uint32_t(bucket) << HALF_BITS | uint32_t(low);
    std::memcpy(&bound, &bits, sizeof bound);
    const double each = OF_WEIGHT ? double(bound) : 1.0;
    for (spare = 0; spare < equal[low] && ahead < enough; spare++) ahead += each;
  }
  for (long i = 0; i < n; i++) {
    if (weights[i] < bound || (weights[i] == bound && spare-- <= 0)) weights[i] = 0;
  }
}

inline void draw_row(const float* logits, long n, const Drawing& it, Tables& room) {
  const long blocks = (n + BLOCK - 1) / BLOCK;
  if (room.weights.size() < size_t(blocks * BLOCK)) room.weights.resize(blocks * BLOCK);
  float* weights = room.weights.data();
  std::fill(weights + n, weights + blocks * BLOCK, 0.0f);
  float peak = logits[0];
  vf peaks = all(peak);
  long i = 0;
  for (; i + W <= n; i += W) peaks = larger(load(logits + i), peaks);
  for (peak = largest(peaks); i < n; i++) peak = std::max(peak, logits[i]);
  // finite, so that the peak's own difference, nothing, stays nothing
  const vf scale = all(float(std::min(double(LOG2_E) / it.temperature, 1e30))), top = all(peak);
  for (i = 0; i < n; i += W) {
    const int some = int(std::min<long>(W, n - i));
    vf x = some == W ? load(logits + i) : load(logits + i, some);
    // nothing weighs more than 1, whatever exp2_ rounds
    vf weight = smaller(all(1.0f), exp2_(mul(sub(x, top), scale)));
    weight = zero_below(weight, float(it.least), weight);
    if (some == W) store(weights + i, weight);
    else store(weights + i, weight, some);
  }
  if (it.most < n) keep<false>(weights, n, double(it.most), room);
  if (it.share < 1) keep<true>(weights, n, it.share, room);
  if (it.weights) std::copy(weights, weights + n, it.weights);

  std::vector<double>& reached = room.reached;
  if (reached.size() < size_t(blocks)) reached.resize(blocks);
  double whole = 0;
  for (long b = 0; b < blocks; b++) {
    vf sums = zero();
    for (long j = b * BLOCK; j < (b + 1) * BLOCK; j += W) sums = add(sums, load(weights + j));
    reached[b] = whole += double(sum(sums));
  }
  // here and below: rounding could point past the last one with weight; it is the last step of the ladder
  const long last = std::lower_bound(reached.begin(), reached.begin() + blocks, whole) - reached.begin();
  for (long d = 0; d < it.count; d++) {
    const double wanted = it.numbers[d] * whole;
    long b = std::upper_bound(reached.begin(), reached.begin() + blocks, wanted) - reached.begin();
    b = std::min(b, last);
    double below = b ? reached[b - 1] : 0.0;
    long token = b * BLOCK;
    for (long j = b * BLOCK; j < (b + 1) * BLOCK; j++) {
      if (weights[j] == 0) continue;
      token = j;
      below += double(weights[j]);
      if (below > wanted) break;
    }
    it.tokens[d] = token;
  }
}

inline void draw(const float* logits, const Drawing* wanted, long count, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (long i = 0; i < count; i++) draw_row(logits + wanted[i].row * n, n, wanted[i], tables());
}

}  // namespace xllm
