// Blocks of the KV cache to and from one piece of memory, and their checksum in the same pass.
//
// The checksum is XXH3-64 with seed 0 (Collet, xxHash; the form for long inputs): 16 stripes of 64 bytes are added to eight sums, which
// are then mixed. Only for blocks of whole rounds of 1,024 bytes: then no stripe crosses from one block into the next.
#pragma once
#include "simd.h"

namespace xllm {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "XXH3 reads its input as little-endian numbers");

constexpr long STRIPE = 64, ROUND = 1024;
constexpr int STRIPES = ROUND / STRIPE, LAST_KEY = 121, MERGE_KEY = 11;
constexpr uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u;
constexpr uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u, PRIME_MX = 0x165667919E3779F9u;

// The algorithm's default key.
alignas(64) constexpr uint8_t KEY[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint64_t number(const void* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}

// AROUND: past the processor's cache, where what is written is not read soon; `to` is a multiple of 64 then.
#if defined(__AVX512F__) && defined(__AVX512DQ__)

struct Sums {
  __m512i at;
  void set(const uint64_t* from) { at = _mm512_loadu_si512(from); }
  void get(uint64_t* to) const { _mm512_storeu_si512(to, at); }
  template <bool AROUND>
  void add(const char* from, char* to, const uint8_t* key) {
    __m512i data = _mm512_loadu_si512(from);
    if (AROUND) _mm512_stream_si512((__m512i*)to, data);
    else _mm512_storeu_si512(to, data);
    __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(key));
    __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_ENUM(0x4e));
    at = _mm512_add_epi64(at, _mm512_add_epi64(product, swapped));
  }
  void mix() {
    at = _mm512_xor_si512(_mm512_xor_si512(at, _mm512_srli_epi64(at, 47)), _mm512_loadu_si512(KEY + 128));
    at = _mm512_mullo_epi64(at, _mm512_set1_epi64(PRIME32_1));
  }
};

#elif defined(__AVX2__)

struct Sums {
  __m256i at[2];
  void set(const uint64_t* from) {
    for (int i = 0; i < 2; i++) at[i] = _mm256_loadu_si256((const __m256i*)(from + 4 * i));
  }
  void get(uint64_t* to) const {
    for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i*)(to + 4 * i), at[i]);
  }
  template <bool AROUND>
  void add(const char* from, char* to, const uint8_t* key) {
    for (int i = 0; i < 2; i++) {
      __m256i data = _mm256_loadu_si256((const __m256i*)(from + 32 * i));
      if (AROUND) _mm256_stream_si256((__m256i*)(to + 32 * i), data);
      else _mm256_storeu_si256((__m256i*)(to + 32 * i), data);
      __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i*)(key + 32 * i)));
      __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
      at[i] = _mm256_add_epi64(at[i], _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4e)));
    }
  }
  void mix() {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    for (int i = 0; i < 2; i++) {
      __m256i key = _mm256_loadu_si256((const __m256i*)(KEY + 128 + 32 * i));
      __m256i x = _mm256_xor_si256(_mm256_xor_si256(at[i], _mm256_srli_epi64(at[i], 47)), key);
      __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime), 32);
      at[i] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), high);
    }
  }
};

#else

struct Sums {
  uint64_t at[8];
  void set(const uint64_t* from) { std::memcpy(at, from, sizeof at); }
  void get(uint64_t* to) const { std::memcpy(to, at, sizeof at); }
  template <bool AROUND>
  void add(const char* from, char* to, const uint8_t* key) {
    uint64_t data[8], keys[8];
    std::memcpy(data, from, STRIPE);
    std::memcpy(to, data, STRIPE);
    std::memcpy(keys, key, STRIPE);
    for (int i = 0; i < 8; i++) {
      uint64_t keyed = data[i] ^ keys[i];
      at[i] += data[i ^ 1] + uint64_t(uint32_t(keyed)) * (keyed >> 32);
    }
  }
  void mix() {
    for (int i = 0; i < 8; i++) at[i] = (at[i] ^ (at[i] >> 47) ^ number(KEY + 128 + 8 * i)) * PRIME32_1;
  }
};

#endif

inline uint64_t folded(uint64_t a, uint64_t b) {
  unsigned __int128 product = (unsigned __int128)a * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

inline uint64_t finish(const Sums& sums, uint64_t bytes) {
  uint64_t at[8], x = bytes * PRIME64_1;
  sums.get(at);
  for (int i = 0; i < 4; i++) {
    const uint8_t* key = KEY + MERGE_KEY + 16 * i;
    x += folded(at[2 * i] ^ number(key), at[2 * i + 1] ^ number(key + 8));
  }
  x = (x ^ (x >> 37)) * PRIME_MX;
  return x ^ (x >> 32);
}

// One block. `next`: what is copied after it, when that lies elsewhere and the processor will not look ahead by itself.
template <bool AROUND>
void carry_block(Sums& sums, const char* from, char* to, const char* next, int64_t size, bool is_last) {
  for (int64_t at = 0; at < size; at += ROUND) {
    const bool ends = is_last && at + ROUND == size;
    if (next)
      for (int i = 0; i < STRIPES; i++) __builtin_prefetch(next + at + i * STRIPE);
    for (int i = 0; i < STRIPES - ends; i++)
      sums.add<AROUND>(from + at + i * STRIPE, to + at + i * STRIPE, KEY + 8 * i);
    if (ends) sums.add<AROUND>(from + size - STRIPE, to + size - STRIPE, KEY + LAST_KEY);
    else sums.mix();
  }
}

// `count` blocks of `size` bytes, size a multiple of ROUND: to `flat` from the region's, or from it into them. Returns their XXH3-64.
template <bool INTO>
uint64_t carry(char* region, const int64_t* blocks, char* flat, int64_t count, int64_t size) {
  const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
  const bool around = INTO && uintptr_t(region) % STRIPE == 0;  // what comes in is read when all of it is there
  Sums sums;
  sums.set(start);
  for (int64_t i = 0; i < count; i++, flat += size) {
    const bool is_last = i + 1 == count;
    char* block = region + blocks[i] * size;
    if (INTO) {
      if (around) carry_block<true>(sums, flat, block, nullptr, size, is_last);
      else carry_block<false>(sums, flat, block, nullptr, size, is_last);
    } else {
      const bool apart = !is_last && blocks[i + 1] != blocks[i] + 1;
      carry_block<false>(sums, block, flat, apart ? region + blocks[i + 1] * size : nullptr, size, is_last);
    }
  }
#if defined(__AVX2__)
  if (around) _mm_sfence();
#endif
  return finish(sums, uint64_t(count) * size);
}

}  // namespace xllm
