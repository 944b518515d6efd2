// Vectors of floats and of integers for one instruction set: the one this file is compiled for.
//
// AVX-512 with or without bfloat16 products, AVX2, or plain C++ that the compiler turns into what the machine has (NEON on arm64).
// Every operation has a fixed order, so that a result depends on its operands alone. No operation is contracted by the compiler
// (-ffp-contract=off): a fused multiply-add stands where fma() stands.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xllm {

using bf16 = uint16_t;  // the upper half of a float

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen(float x) { return x; }

inline bf16 narrow(float f) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr int W = 16;       // floats of a vector
constexpr int PANEL_V = 4;  // vectors side by side in a packed panel
constexpr int TILE_M = 6;   // rows at once
using vf = __m512;
inline vf zero() { return _mm512_setzero_ps(); }
inline vf all(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf larger(vf a, vf b) { return _mm512_max_ps(a, b); }  // b when one is NaN
inline vf smaller(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf zero_below(vf x, float least, vf y) {  // y, or 0 where x < least
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(least), _CMP_NLT_UQ), y);
}
inline vf round_near(vf x) { return _mm512_roundscale_ps(x, 8); }
inline vf times_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }
inline vf load(const bf16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  near = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
#endif
}

using vi = __m512i;
inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline void store_offset(uint8_t* p, vf x) {  // integers from -127 to 127, plus 128
  __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(n));
}
inline vf magnitude(vf x) { return _mm512_abs_ps(x); }

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int W = 8;
constexpr int PANEL_V = 2;
constexpr int TILE_M = 4;
using vf = __m256;
inline vf zero() { return _mm256_setzero_ps(); }
inline vf all(float x) { return _mm256_set1_ps(x); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf larger(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf smaller(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf zero_below(vf x, float least, vf y) {
  return _mm256_and_ps(_mm256_cmp_ps(x, all(least), _CMP_NLT_UQ), y);
}
inline vf round_near(vf x) { return _mm256_round_ps(x, 8); }
inline vf times_power(vf x, vf n) {
  __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
inline vf load(const bf16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(bf16* p, vf x) {
  __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  near = _mm256_blendv_epi8(near, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  near = _mm256_srli_epi32(near, 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(near, near), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

using vi = __m256i;
inline vi load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store(int32_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
inline vf to_float(vi x) { return _mm256_cvtepi32_ps(x); }
inline void store_offset(uint8_t* p, vf x) {
  int32_t whole[W];
  store(whole, _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(128)));
  for (int i = 0; i < W; i++) p[i] = uint8_t(whole[i]);
}
inline vf magnitude(vf x) { return _mm256_andnot_ps(all(-0.0f), x); }

#else

constexpr int W = 8;
constexpr int PANEL_V = 2;
constexpr int TILE_M = 4;
struct vf {
  float at[W];
};
#define XLLM_LANES(expression)                  \
  vf r;                                         \
  for (int i = 0; i < W; i++) r.at[i] = (expression); \
  return r;
inline vf all(float x) { XLLM_LANES(x) }
inline vf zero() { return all(0.0f); }
inline vf load(const float* p) { XLLM_LANES(p[i]) }
inline vf load(const bf16* p) { XLLM_LANES(widen(p[i])) }
inline void store(float* p, vf x) { std::memcpy(p, x.at, sizeof x.at); }
inline void store(bf16* p, vf x) {
  for (int i = 0; i < W; i++) p[i] = narrow(x.at[i]);
}
inline vf add(vf a, vf b) { XLLM_LANES(a.at[i] + b.at[i]) }
inline vf sub(vf a, vf b) { XLLM_LANES(a.at[i] - b.at[i]) }
inline vf mul(vf a, vf b) { XLLM_LANES(a.at[i] * b.at[i]) }
inline vf div(vf a, vf b) { XLLM_LANES(a.at[i] / b.at[i]) }
#if defined(__FMA__) || defined(__aarch64__)
inline vf fma(vf a, vf b, vf c) { XLLM_LANES(__builtin_fmaf(a.at[i], b.at[i], c.at[i])) }
#else  // without the instruction it would be a call for each number
inline vf fma(vf a, vf b, vf c) { XLLM_LANES(a.at[i] * b.at[i] + c.at[i]) }
#endif
inline vf larger(vf a, vf b) { XLLM_LANES(a.at[i] > b.at[i] ? a.at[i] : b.at[i]) }
inline vf smaller(vf a, vf b) { XLLM_LANES(a.at[i] < b.at[i] ? a.at[i] : b.at[i]) }
inline vf zero_below(vf x, float least, vf y) { XLLM_LANES(x.at[i] < least ? 0.0f : y.at[i]) }
inline vf round_near(vf x) { XLLM_LANES(__builtin_rintf(x.at[i])) }
inline vf times_power(vf x, vf n) {
  vf r;
  for (int i = 0; i < W; i++) {
    uint32_t bits = uint32_t(int32_t(n.at[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    r.at[i] = x.at[i] * power;
  }
  return r;
}
inline vf magnitude(vf x) { XLLM_LANES(__builtin_fabsf(x.at[i])) }
#undef XLLM_LANES
struct vi {
  int32_t at[W];
};
inline vi load(const int32_t* p) {
  vi r;
  std::memcpy(r.at, p, sizeof r.at);
  return r;
}
inline void store(int32_t* p, vi x) { std::memcpy(p, x.at, sizeof x.at); }
inline vf to_float(vi x) {
  vf r;
  for (int i = 0; i < W; i++) r.at[i] = float(x.at[i]);
  return r;
}
inline void store_offset(uint8_t* p, vf x) {
  for (int i = 0; i < W; i++) p[i] = uint8_t(int32_t(__builtin_rintf(x.at[i])) + 128);
}

#endif

constexpr int MOST_HEAD_DIM = 1024;
constexpr int PANEL = W * PANEL_V;  // columns of a packed panel

inline vf load(const float* p, int n) {  // the first n, then zeros
  float whole[W] = {};
  std::memcpy(whole, p, n * sizeof(float));
  return load(whole);
}
inline vf load(const bf16* p, int n) {
  bf16 whole[W] = {};
  std::memcpy(whole, p, n * sizeof(bf16));
  return load(whole);
}
template <class T>
inline void store(T* p, vf x, int n) {
  T whole[W];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}

// Sum and maximum of the lanes: halves onto halves.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
inline float sum(vf x) {
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest(vf x) {
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#else
inline float sum(vf x) {
  float at[W];
  store(at, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) at[i] += at[i + half];
  return at[0];
}
inline float largest(vf x) {
  float at[W];
  store(at, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) at[i] = at[i] > at[i + half] ? at[i] : at[i + half];
  return at[0];
}
#endif

// 2^x: exactly 0 below -126, 2^126 from there on, NaN for NaN. Relative error under 3e-7.
// Polynomial: Cephes exp2f, on [-0.5, 0.5].
inline vf exp2_(vf x) {
  vf bounded = smaller(all(126.0f), larger(all(-126.0f), x));
  vf n = round_near(bounded);
  vf r = sub(bounded, n);
  vf y = all(1.535336188319500e-4f);
  y = fma(y, r, all(1.339887440266574e-3f));
  y = fma(y, r, all(9.618437357674640e-3f));
  y = fma(y, r, all(5.550332471162809e-2f));
  y = fma(y, r, all(2.402264791363012e-1f));
  y = fma(y, r, all(6.931472028550421e-1f));
  y = fma(y, r, all(1.0f));
  return zero_below(x, -126.0f, times_power(y, n));
}
constexpr float LOG2_E = 1.4426950408889634f;

}  // namespace xllm
