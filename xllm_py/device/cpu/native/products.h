// Products of rows with packed columns, of floats, bfloat16 and 8-bit integers. Every number is summed over k in ascending order, so that
// it depends on its row and its column alone.
#pragma once
#include "simd.h"

namespace xllm {

constexpr long LINE = 64;  // bytes that the memory gives at once

// What a product of A rows with packed B columns is made of: PER numbers along k are one step.
// B in panels: [steps][columns of the panel][PER]. A: [rows][k], float where the machine cannot multiply bfloat16.
struct OfFloat {
  using Sum = float;
  using Acc = vf;
  using B = float;
  using A = float;
  using Bv = vf;
  using Av = vf;
  static constexpr int PER = 1;
  static Bv load_b(const B* p) { return load(p); }
  static Av load_a(const A* p) { return all(*p); }
  static vf dot(vf acc, Av a, Bv b) { return fma(a, b, acc); }
};

struct OfBf16 {
  using Sum = float;
  using Acc = vf;
  using B = bf16;
  static constexpr int PER = 2;
#if defined(__AVX512BF16__)
  using A = bf16;
  using Bv = __m512i;
  using Av = __m512i;
  static Bv load_b(const B* p) { return _mm512_loadu_si512(p); }
  static Av load_a(const A* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static vf dot(vf acc, Av a, Bv b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
#else
  using A = float;
  struct Bv {
    vf even, odd;
  };
  struct Av {
    vf even, odd;
  };
  static Av load_a(const A* p) { return {all(p[0]), all(p[1])}; }
  static vf dot(vf acc, Av a, Bv b) { return fma(a.odd, b.odd, fma(a.even, b.even, acc)); }
#if defined(__AVX512F__)
  static Bv load_b(const B* p) {
    __m512i both = _mm512_loadu_si512(p);
    __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
  }
#elif defined(__AVX2__)
  static Bv load_b(const B* p) {
    __m256i both = _mm256_loadu_si256((const __m256i*)p);
    __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), _mm256_castsi256_ps(odd)};
  }
#else
  static Bv load_b(const B* p) {
    Bv b;
    for (int i = 0; i < W; i++) b.even.at[i] = widen(p[2 * i]), b.odd.at[i] = widen(p[2 * i + 1]);
    return b;
  }
#endif
#endif
};

// Products of 8-bit integers, summed in 32 bits: rows from 1 to 255 (128 is zero), columns from -127 to 127. Exact in any order.
struct OfInt8 {
  using Sum = int32_t;
  using Acc = vi;
  using B = int8_t;
  using A = uint8_t;
  static constexpr int PER = 4;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  using Av = __m512i;
  using Bv = __m512i;
  static Bv load_b(const B* p) { return _mm512_loadu_si512(p); }
  static Av load_a(const A* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
#if defined(__AVX512VNNI__)
  static Acc dot(Acc acc, Av a, Bv b) { return _mm512_dpbusd_epi32(acc, a, b); }
#else
  static Acc dot(Acc acc, Av a, Bv b) {
    __m512i low = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                    _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    __m512i high = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(low, high));
  }
#endif
#elif defined(__AVX2__)
  using Av = __m256i;
  using Bv = __m256i;
  static Bv load_b(const B* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Av load_a(const A* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  static Acc dot(Acc acc, Av a, Bv b) {
    __m256i low = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                    _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    __m256i high = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(low, high));
  }
#else
  using Av = const A*;
  using Bv = const B*;
  static Bv load_b(const B* p) { return p; }
  static Av load_a(const A* p) { return p; }
  static Acc dot(Acc acc, Av a, Bv b) {
    for (int i = 0; i < W; i++)
      for (int j = 0; j < PER; j++) acc.at[i] += int32_t(a[j]) * b[i * PER + j];
    return acc;
  }
#endif
};

// c[M][N vectors] (+)= a[M][steps] * b[steps][N vectors], each number summed over the steps in their order and in nothing else.
// ldb: numbers from one step of b to the next. In each step `lines` lines of what is to be read soon are asked for, from `soon` on.
template <class T, int M, int N>
inline void micro(const typename T::A* a, long lda, const typename T::B* b, long ldb, long steps,
                  typename T::Sum* c, long ldc, bool fresh, const char* soon, long lines) {
  typename T::Acc acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[m][n] = fresh ? typename T::Acc{} : load(c + m * ldc + n * W);
  for (long s = 0; s < steps; s++, b += ldb) {
#pragma GCC unroll 1
    for (long line = 0; line < lines; line++, soon += LINE) __builtin_prefetch(soon);
    typename T::Bv bv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) bv[n] = T::load_b(b + n * W * T::PER);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      typename T::Av av = T::load_a(a + m * lda + s * T::PER);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] = T::dot(acc[m][n], av, bv[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(c + m * ldc + n * W, acc[m][n]);
}

template <class T, int N>
inline void micro_rows(int rows, const typename T::A* a, long lda, const typename T::B* b, long ldb, long steps,
                       typename T::Sum* c, long ldc, bool fresh, const char* soon = nullptr, long lines = 0) {
  switch (rows) {
    case 1: return micro<T, 1, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
    case 2: return micro<T, 2, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
    case 3: return micro<T, 3, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
    case 4: return micro<T, 4, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
    case 5: return micro<T, 5, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
    default: return micro<T, 6, N>(a, lda, b, ldb, steps, c, ldc, fresh, soon, lines);
  }
}

// Rows of the next tile when so many are left: even tiles, none with a single row beside full ones.
inline int tile_of(long left) {
  if (left <= TILE_M) return int(left);
  if (left < 2 * TILE_M) return int((left + 1) / 2);
  return TILE_M;
}

}  // namespace xllm
