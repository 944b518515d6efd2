// Linears over weights packed once: y = x W^T + b, and what commonly follows it, for any number of rows with the same bits.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "tiles.h"

namespace xllm {

// What becomes of a sum.
enum After { PLAIN = 0, ADD = 1, GATE = 2 };

template <class T>
struct Linear {
  static_assert(T::PER * sizeof(typename T::B) == 4, "a step of a column is a word");
  static constexpr long STEP = PANEL * T::PER;       // numbers of a panel in one step
  static constexpr long LINES = PANEL * 4 / LINE;    // of one step
  static constexpr long DEPTH = 128, AHEAD = 4096;   // steps at once: such a piece of a panel stays in the L1 cache; bytes

  static long steps_of(long k) {
    const long steps = (k + T::PER - 1) / T::PER;
    if constexpr (ON_TILES<T>) return (steps + TILE - 1) / TILE * TILE;
    return steps;
  }
  static long panels_of(long n, bool gated) {
    return gated ? (n / 2 + PANEL / 2 - 1) / (PANEL / 2) : (n + PANEL - 1) / PANEL;
  }
  // Which row of the weight stands in a column of a panel; -1: none. Gated: gate rows in the left half, their up rows in the right.
  static long row_of(long panel, long column, long n, bool gated) {
    if (!gated) {
      long row = panel * PANEL + column;
      return row < n ? row : -1;
    }
    long half = PANEL / 2, row = panel * half + column % half;
    if (row >= n / 2) return -1;
    return column < half ? row : n / 2 + row;
  }

  // weight [n][k] -> packed [panels][steps][PANEL][PER]. A step of a column is four bytes in every type, so words are moved; a few columns at a
  // time, so that what is read and what is written stay in the cache.
  static void pack(const typename T::B* weight, typename T::B* packed, long n, long k, bool gated,
                   int threads) {
    long panels = panels_of(n, gated), steps = steps_of(k);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long panel = 0; panel < panels; panel++) {
      uint32_t* to = (uint32_t*)(packed + panel * steps * PANEL * T::PER);
      for (long begin = 0; begin < PANEL; begin += 16)
        for (long first = 0; first < steps; first += 64)
          for (long column = begin; column < std::min<long>(begin + 16, PANEL); column++) {
            const long row = row_of(panel, column, n, gated);
            const typename T::B* from = weight + std::max(row, 0L) * k;
            const long end = std::min(first + 64, steps), whole = row < 0 ? first : std::min(end, k / T::PER);
            for (long step = first; step < whole; step++)
              std::memcpy(to + step * PANEL + column, from + step * T::PER, 4);
            for (long step = std::max(first, whole); step < end; step++) {
              uint32_t word = 0;  // past the end, and in a column without a row
              const long rest = std::max(k - step * T::PER, 0L);
              if (row >= 0) std::memcpy(&word, from + step * T::PER, rest * sizeof(typename T::B));
              to[step * PANEL + column] = word;
            }
          }
    }
  }

  // Rows of the weight, read back from a packed one that is not gated. False, and nothing done, when there is no such row.
  static bool rows(const typename T::B* packed, const int64_t* ids, typename T::B* out, long count, long k, long n,
                   int threads) {
    for (long i = 0; i < count; i++)
      if (ids[i] < 0 || ids[i] >= n) return false;
    const long steps = steps_of(k), whole = k / T::PER;
    if (count * k < 1 << 15) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
      const typename T::B* from = packed + (ids[i] / PANEL) * steps * STEP + ids[i] % PANEL * T::PER;
      typename T::B* to = out + i * k;
      for (long step = 0; step < whole; step++) std::memcpy(to + step * T::PER, from + step * STEP, 4);
      for (long j = whole * T::PER; j < k; j++) to[j] = from[whole * STEP + j % T::PER];
    }
    return true;
  }

  // One panel of some rows. sums: [rows][PANEL] scratch. then: the panel that comes after it, or null.
  //
  // Weights come from memory once, however many tiles of rows there are. While a piece of them is multiplied with one tile after the
  // other, the memory would rest: so the tiles share in asking for the piece that follows.
  static void panel(MatrixUnit& unit, const typename T::A* x, long lda, long rows, const typename T::B* b, long steps,
                    typename T::Sum* sums, const typename T::B* then) {
    if constexpr (ON_TILES<T>) return tile_panel<T>(unit, x, lda, rows, b, steps / TILE, sums, then);
    if (rows <= TILE_M) {  // one or two leave the processor time to look ahead by itself
      micro_rows<T, PANEL_V>(int(rows), x, lda, b, STEP, steps, sums, PANEL, true, (const char*)b + AHEAD,
                             rows > 2 ? LINES : 0);
      return;
    }
    const long tiles = (rows + TILE_M - 1) / TILE_M, most = tiles < 4 ? DEPTH / 2 : DEPTH;
    const long pieces = (steps + most - 1) / most, depth = (steps + pieces - 1) / pieces;
    for (long s = 0; s < steps; s += depth) {
      const long some = std::min(depth, steps - s);
      const char* soon = (const char*)(s + depth < steps ? b + (s + depth) * STEP : then);
      long left = soon ? LINES : 0, tiles_left = tiles;
      for (long m = 0; m < rows; tiles_left--) {
        const int count = tile_of(rows - m);
        const long lines = (left + tiles_left - 1) / tiles_left;
        micro_rows<T, PANEL_V>(count, x + m * lda + s * T::PER, lda, b + s * STEP, STEP, some, sums + m * PANEL,
                               PANEL, s == 0, soon, lines);
        soon += lines * some * LINE;
        left -= lines;
        m += count;
      }
    }
  }

  template <class Out>
  static void finish(const float* sums, long rows, long panel, long n, const float* bias, After after,
                     const Out* more, Out* out) {
    long width = after == GATE ? PANEL / 2 : PANEL, total = after == GATE ? n / 2 : n;
    long first = panel * width, count = std::min(width, total - first);
    for (long m = 0; m < rows; m++) {
      const float* from = sums + m * PANEL;
      Out* to = out + m * total + first;
      for (long i = 0; i < count; i += W) {
        int some = int(std::min<long>(W, count - i));
        vf y = load(from + i);
        if (bias) y = add(y, load(bias + panel * PANEL + i));
        if (after == GATE) {
          vf up = load(from + width + i);
          if (bias) up = add(up, load(bias + panel * PANEL + width + i));
          vf less = exp2_(mul(y, all(-LOG2_E)));
          y = mul(div(y, add(all(1.0f), less)), up);
        } else if (after == ADD) {
          const Out* with = more + m * total + first + i;
          // rounded first, as the sum of two tensors is
          Out rounded[W];
          store(rounded, y);
          y = add(load(rounded), some == W ? load(with) : load(with, some));
        }
        if (some == W) {
          store(to + i, y);
        } else {
          store(to + i, y, some);
        }
      }
    }
  }

  // x [m][k] in the dtype of B; bias [panels * PANEL] in the order of the columns, or null; more: what ADD adds, like out.
  // out [m][n], or [m][n / 2] with GATE.
  template <class Out>
  static void run(const typename T::B* x, const typename T::B* packed, const float* bias, After after,
                  const Out* more, Out* out, long m, long k, long n, int threads) {
    long panels = panels_of(n, after == GATE), steps = steps_of(k), width = steps * T::PER;
    const typename T::A* a;
    std::vector<typename T::A> widened;
    if constexpr (sizeof(typename T::A) == sizeof(typename T::B)) a = x;
    if (sizeof(typename T::A) != sizeof(typename T::B) || width != k) {
      widened.resize(m * width);
      for (long i = 0; i < m; i++)
        for (long j = 0; j < k; j++) {
          if constexpr (sizeof(typename T::A) == sizeof(typename T::B)) widened[i * width + j] = x[i * k + j];
          else widened[i * width + j] = widen(x[i * k + j]);
        }
      a = widened.data();
    }
    long columns = after == GATE ? n / 2 : n;
    tasks(m, panels, width, n * k, threads, [&](MatrixUnit& unit, long from, long some, long p, long then, void* scratch) {
      float* sums = (float*)scratch;
      panel(unit, a + from * width, width, some, packed + p * steps * STEP, steps, sums,
            then < 0 ? nullptr : packed + then * steps * STEP);
      finish(sums, some, p, n, bias, after, more ? more + from * columns : nullptr, out + from * columns);
    });
  }

  // Every band of rows with every panel: do(the thread's matrix unit, first row, rows, panel, this thread's next panel or -1, scratch for [rows][PANEL] numbers of
  // 32 bits). A thread takes its next task before it does one.
  template <class Do>
  static void tasks(long m, long panels, long k, long weights, int threads, Do each) {
    // rows of one task. On tiles they pass faster than a further cache than L2 could give them
    long rows = 512;
    if constexpr (ON_TILES<T>) rows = std::clamp<long>((3 << 19) / (k * sizeof(typename T::A)), 64, 512) / 32 * 32;
    rows = std::min(rows, m);  // fewer where threads would wait
    while (rows > 48 && panels * ((m + rows - 1) / rows) < 4 * threads) rows = (rows + 1) / 2;
    long bands = (m + rows - 1) / rows;
    // reading them and multiplying takes less than 10 us, and calling a second thread and waiting for it 4 to 5
    if (weights + m * weights / 8 < 400 << 10) threads = 1;
    const long total = bands * panels;
    std::atomic<long> taken{0};
#pragma omp parallel num_threads(threads)
    {
      MatrixUnit unit;
      static thread_local std::vector<float> scratch;
      if (scratch.size() < size_t(rows * PANEL)) scratch.resize(rows * PANEL);
      for (long task = taken++; task < total;) {
        const long then = taken++, from = task / panels * rows;
        each(unit, from, std::min(rows, m - from), task % panels, then < total ? then % panels : -1, scratch.data());
        task = then;
      }
    }
  }
};

// Weights of 8 bits with a scale for each row of the weight; rows of x are made 8 bits with a scale of their own, every time.
// Sources: Dettmers et al. 2022, LLM.int8(), section 2 (scales by row and column); Yao et al. 2022, ZeroQuant (dynamic, by token).
template <class X>
struct Linear8 {
  using Int8 = Linear<OfInt8>;

  // One row: to 1 .. 255, and its scale. Numbers that are none make the scale one that is none.
  static float quantize(const X* x, uint8_t* to, long k, long width) {
    vf most = zero(), poison = zero();
    long whole = k / W * W;
    for (long i = 0; i < whole; i += W) {
      most = larger(most, magnitude(load(x + i)));
      poison = fma(load(x + i), zero(), poison);
    }
    if (whole < k) {
      vf rest = load(x + whole, int(k - whole));
      most = larger(most, magnitude(rest));
      poison = fma(rest, zero(), poison);
    }
    float peak = largest(most), inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    for (long i = 0; i < whole; i += W) store_offset(to + i, round_near(mul(load(x + i), all(inverse))));
    if (whole < width) {
      uint8_t last[W];
      store_offset(last, round_near(mul(load(x + whole, int(k - whole)), all(inverse))));
      std::memcpy(to + whole, last, std::min<long>(W, width - whole));
    }
    return peak / 127.0f + sum(poison);
  }

  // scales, totals (the sum of each column's weights): [panels * PANEL] in the order of the columns. The rest as in Linear::run.
  template <class Out>
  static void run(const X* x, const int8_t* packed, const float* scales, const int32_t* totals, const float* bias,
                  After after, const Out* more, Out* out, long m, long k, long n, int threads) {
    const long panels = Int8::panels_of(n, after == GATE), steps = Int8::steps_of(k), width = steps * 4;
    static thread_local std::vector<uint8_t> kept_rows;
    static thread_local std::vector<float> kept_scales;
    if (kept_rows.size() < size_t(m * width)) kept_rows.resize(m * width);
    if (kept_scales.size() < size_t(m)) kept_scales.resize(m);
    uint8_t* rows = kept_rows.data();
    float* row_scales = kept_scales.data();
#pragma omp parallel for num_threads(m * k < 1 << 15 ? 1 : threads) schedule(static)
    for (long i = 0; i < m; i++) row_scales[i] = quantize(x + i * k, rows + i * width, k, width);
    const long columns = after == GATE ? n / 2 : n;
    Int8::tasks(m, panels, width, n * k, threads, [&](MatrixUnit& unit, long from, long some, long p, long then, void* scratch) {
      int32_t* sums = (int32_t*)scratch;
      Int8::panel(unit, rows + from * width, width, some, packed + p * steps * Int8::STEP, steps, sums,
                  then < 0 ? nullptr : packed + then * steps * Int8::STEP);
      for (long i = 0; i < some; i++)
        for (long j = 0; j < PANEL; j += W) {
          int32_t exact[W];
          for (int lane = 0; lane < W; lane++)
            exact[lane] = sums[i * PANEL + j + lane] - 128 * totals[p * PANEL + j + lane];
          vf y = mul(mul(to_float(load(exact)), load(scales + p * PANEL + j)), all(row_scales[from + i]));
          store((float*)scratch + i * PANEL + j, y);
        }
      Int8::finish((float*)scratch, some, p, n, bias, after, more ? more + from * columns : nullptr,
                   out + from * columns);
    });
  }
};

}  // namespace xllm
