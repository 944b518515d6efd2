// What is computed row by row: norms, the rotation of queries and keys with the writing of the cache, and the best of each row.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace xllm {

// y = x / sqrt(mean(x^2) + eps) * weight, in float32; the scaled x is rounded to its dtype before the weight, as the checkpoints' own
// code does. Source: Zhang and Sennrich 2019.
template <class B>
inline void norm_row(const B* x, const B* weight, B* out, long n, float eps) {
  vf squares = zero();
  long i = 0;
  for (; i + W <= n; i += W) squares = fma(load(x + i), load(x + i), squares);
  if (i < n) {
    vf rest = load(x + i, int(n - i));
    squares = fma(rest, rest, squares);
  }
  vf scale = all(1.0f / std::sqrt(sum(squares) / float(n) + eps));
  for (i = 0; i < n; i += W) {
    int some = int(std::min<long>(W, n - i));
    B scaled[W];
    if (some == W) {
      store(scaled, mul(load(x + i), scale));
      store(out + i, mul(load(weight + i), load(scaled)));
    } else {
      store(scaled, mul(load(x + i, some), scale));
      store(out + i, mul(load(weight + i, some), load(scaled)), some);
    }
  }
}

template <class B>
void norm(const B* x, const B* weight, B* out, long rows, long n, float eps, int threads) {
  if (rows * n < 1 << 15) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long r = 0; r < rows; r++) norm_row(x + r * n, weight, out + r * n, n, eps);
}

struct Rotation {  // as in device/cpu/native/library.py
  const void* mixed;  // [tokens][heads + 2 KV heads][head_dim]: queries, keys, values
  const void *cos, *sin;           // [positions][head_dim]
  const int64_t *positions, *slots;  // [tokens]; the first `real` slots
  const void* head_norms;          // [heads + KV heads][head_dim] or null
  void *queries, *keys, *values;   // [tokens][heads][head_dim]; the cache
  int64_t tokens, real, heads, kv_heads, head_dim;
  double eps;
};

// x cos + (-right, left) sin, halves: `some` numbers of each, in which SOME says that they are fewer than a vector's. Source: Su et al. 2021, RoFormer.
template <bool SOME, class B>
inline void rotate_vector(const B* x, const B* cos, const B* sin, B* out, long half, int some) {
  auto take = [some](const B* p) { return SOME ? load(p, some) : load(p); };
  const vf left = take(x), right = take(x + half);
  const vf turned_left = fma(left, take(cos), mul(sub(zero(), right), take(sin)));
  const vf turned_right = fma(right, take(cos + half), mul(left, take(sin + half)));
  if constexpr (SOME) store(out, turned_left, some), store(out + half, turned_right, some);
  else store(out, turned_left), store(out + half, turned_right);
}

template <class B>
inline void rotate(const B* x, const B* cos, const B* sin, B* out, long dim) {
  const long half = dim / 2;
  long i = 0;
  for (; i + W <= half; i += W) rotate_vector<false>(x + i, cos + i, sin + i, out + i, half, W);
  if (i < half) rotate_vector<true>(x + i, cos + i, sin + i, out + i, half, int(half - i));
}

template <class B>
void rotate_and_store(const Rotation& it, int threads) {
  const long dim = it.head_dim, all_heads = it.heads + 2 * it.kv_heads;
  if (it.tokens * all_heads * dim < 1 << 15) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < it.tokens; t++) {
    const B* row = (const B*)it.mixed + t * all_heads * dim;
    const B* cos = (const B*)it.cos + it.positions[t] * dim;
    const B* sin = (const B*)it.sin + it.positions[t] * dim;
    const bool kept = t < it.real;
    B* keys = kept ? (B*)it.keys + it.slots[t] * it.kv_heads * dim : nullptr;
    for (long h = 0; h < it.heads + it.kv_heads; h++) {
      B* to = h < it.heads ? (B*)it.queries + (t * it.heads + h) * dim : keys + (h - it.heads) * dim;
      if (h >= it.heads && !kept) break;
      const B* from = row + h * dim;
      B normed[MOST_HEAD_DIM];
      if (it.head_norms) {
        norm_row(from, (const B*)it.head_norms + h * dim, normed, dim, float(it.eps));
        from = normed;
      }
      rotate(from, cos, sin, to, dim);
    }
    if (kept)
      std::memcpy((B*)it.values + it.slots[t] * it.kv_heads * dim, row + (it.heads + it.kv_heads) * dim,
                  it.kv_heads * dim * sizeof(B));
  }
}

// Of each row: the index of its highest number, the lowest of equal ones, and whether all are finite, side by side. Pieces are fixed, so that few rows
// use all threads too.
inline void best(const float* x, int64_t* best, long rows, long n, int threads) {
  constexpr long PIECE = 1 << 14;
  const long pieces = (n + PIECE - 1) / PIECE;
  static thread_local std::vector<int64_t> kept;
  if (kept.size() < size_t(rows * pieces)) kept.resize(rows * pieces);
  int64_t* found = kept.data();  // of each piece; -1: one is not finite
  if (rows * n < 1 << 15) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long task = 0; task < rows * pieces; task++) {
    const long begin = task % pieces * PIECE, end = std::min(n, begin + PIECE);
    const float* row = x + task / pieces * n;
    vf most = all(row[begin]), poison = zero();
    long i = begin;
    for (; i + W <= end; i += W) {
      most = larger(load(row + i), most);
      poison = fma(load(row + i), zero(), poison);
    }
    float peak = largest(most), bad = sum(poison);
    for (; i < end; i++) peak = std::max(peak, row[i]), bad += row[i] * 0.0f;
    if (bad != 0.0f) {  // NaN
      found[task] = -1;
      continue;
    }
    for (i = begin; i < end && row[i] != peak; i++) {
    }
    found[task] = i;
  }
  for (long r = 0; r < rows; r++) {
    int64_t &highest = best[2 * r], &finite = best[2 * r + 1];
    highest = 0, finite = 1;
    float peak = -std::numeric_limits<float>::infinity();
    for (long p = 0; p < pieces; p++) {
      const int64_t at = found[r * pieces + p];
      if (at < 0) finite = 0;
      else if (x[r * n + at] > peak) peak = x[r * n + at], highest = at;
    }
  }
}

}  // namespace xllm
