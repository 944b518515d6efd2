// The C interface of the cpu device's kernels. Sizes in numbers, not bytes; dtype 0: float32, 1: bfloat16, 2: 8-bit integers. Called by device/cpu/native/library.py.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "attention.h"
#include "carry.h"
#include "draw.h"
#include "linear.h"
#include "rowwise.h"
#include "tiles.h"

using namespace xllm;

extern "C" {

// This process may use all that the file was compiled for.
int xllm_allowed() { return MatrixUnit::allowed(); }

// Numbers in a packed weight [n][k].
int64_t xllm_packed_size(int64_t n, int64_t k, int gated, int dtype) {
  if (dtype == 2) return Linear<OfInt8>::panels_of(n, gated) * Linear<OfInt8>::steps_of(k) * PANEL * 4;
  if (dtype) return Linear<OfBf16>::panels_of(n, gated) * Linear<OfBf16>::steps_of(k) * PANEL * 2;
  return Linear<OfFloat>::panels_of(n, gated) * Linear<OfFloat>::steps_of(k) * PANEL;
}

// Which row of the weight stands in each of the packed columns, -1 for none.
void xllm_columns(int64_t* rows, int64_t n, int gated) {
  long panels = Linear<OfFloat>::panels_of(n, gated);
  for (long i = 0; i < panels * PANEL; i++) rows[i] = Linear<OfFloat>::row_of(i / PANEL, i % PANEL, n, gated);
}
int64_t xllm_num_columns(int64_t n, int gated) { return Linear<OfFloat>::panels_of(n, gated) * PANEL; }

void xllm_pack(const void* weight, void* packed, int64_t n, int64_t k, int gated, int dtype, int threads) {
  if (dtype == 2) Linear<OfInt8>::pack((const int8_t*)weight, (int8_t*)packed, n, k, gated, threads);
  else if (dtype) Linear<OfBf16>::pack((const bf16*)weight, (bf16*)packed, n, k, gated, threads);
  else Linear<OfFloat>::pack((const float*)weight, (float*)packed, n, k, gated, threads);
}

int xllm_rows(const void* packed, const int64_t* ids, void* out, int64_t count, int64_t k, int64_t n, int dtype,
              int threads) {
  if (dtype) return Linear<OfBf16>::rows((const bf16*)packed, ids, (bf16*)out, count, k, n, threads);
  return Linear<OfFloat>::rows((const float*)packed, ids, (float*)out, count, k, n, threads);
}

// The largest head that the kernels have room for.
int64_t xllm_most_head_dim() { return MOST_HEAD_DIM; }

// out: float32 when wide, else in the dtype of x.
void xllm_linear(const void* x, const void* packed, const float* bias, const void* more, void* out, int64_t m,
                 int64_t k, int64_t n, int after, int wide, int dtype, int threads) {
  After then = After(after);
  if (!dtype)
    Linear<OfFloat>::run((const float*)x, (const float*)packed, bias, then, (const float*)more, (float*)out, m, k,
                         n, threads);
  else if (wide)
    Linear<OfBf16>::run((const bf16*)x, (const bf16*)packed, bias, then, (const float*)more, (float*)out, m, k, n,
                        threads);
  else
    Linear<OfBf16>::run((const bf16*)x, (const bf16*)packed, bias, then, (const bf16*)more, (bf16*)out, m, k, n,
                        threads);
}

// A weight of 8-bit integers, packed with dtype 2; its columns' scales and totals. x and out in dtype.
void xllm_linear8(const void* x, const void* packed, const float* scales, const int32_t* totals, const float* bias,
                  const void* more, void* out, int64_t m, int64_t k, int64_t n, int after, int dtype, int threads) {
  if (dtype)
    Linear8<bf16>::run((const bf16*)x, (const int8_t*)packed, scales, totals, bias, After(after), (const bf16*)more,
                       (bf16*)out, m, k, n, threads);
  else
    Linear8<float>::run((const float*)x, (const int8_t*)packed, scales, totals, bias, After(after),
                        (const float*)more, (float*)out, m, k, n, threads);
}

void xllm_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t n, float eps, int dtype,
               int threads) {
  if (dtype) norm((const bf16*)x, (const bf16*)weight, (bf16*)out, rows, n, eps, threads);
  else norm((const float*)x, (const float*)weight, (float*)out, rows, n, eps, threads);
}

void xllm_rotate(const Rotation* it, int dtype, int threads) {
  if (dtype) rotate_and_store<bf16>(*it, threads);
  else rotate_and_store<float>(*it, threads);
}

void xllm_best(const float* x, int64_t* found, int64_t rows, int64_t n, int threads) {
  best(x, found, rows, n, threads);
}

void xllm_draw(const float* x, const Drawing* wanted, int64_t count, int64_t n, int threads) {
  draw(x, wanted, count, n, threads);
}

void xllm_attend(const Attention* it, int dtype, int threads) {
  if (dtype) attend<OfBf16>(*it, threads);
  else attend<OfFloat>(*it, threads);
}

// Blocks of a region to `flat`, or from there into them; see carry.h.
uint32_t xllm_gather(char* region, const int64_t* blocks, char* flat, int64_t count, int64_t size) {
  return uint32_t(carry<false>(region, blocks, flat, count, size));
}
uint32_t xllm_scatter(char* region, const int64_t* blocks, char* flat, int64_t count, int64_t size) {
  return uint32_t(carry<true>(region, blocks, flat, count, size));
}

// Ask for huge pages behind the whole ones of this memory; without them it works as well, slower.
void xllm_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t size = 2 << 20, from = (uintptr_t(memory) + size - 1) / size * size;
  const uintptr_t end = (uintptr_t(memory) + bytes) / size * size;
  if (end > from) madvise((void*)from, end - from, MADV_HUGEPAGE);
#endif
}

}  // extern "C"
