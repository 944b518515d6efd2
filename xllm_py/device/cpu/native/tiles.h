// Products on the matrix unit that some CPUs have (Intel AMX): tiles of 16 rows and 16 columns, 64 bytes deep.
//
// A packed panel (see OfFloat) is made of such tiles as it is: 16 steps of 16 columns, one step a row of the tile. The unit sums the even and
// the odd numbers of a tile's depth apart, each in ascending order, adds the two, and adds that to what was there. So a number depends on its
// row and its column alone, as in products.h, though its bits are others. Source: Intel, Software Developer's Manual, TDPBF16PS.
#pragma once
#include <algorithm>

#include "products.h"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xllm {

constexpr int TILE = 16;  // rows, columns and steps of a tile

template <class T>
constexpr bool ON_TILES = false;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

template <>
constexpr bool ON_TILES<OfBf16> = true;
template <>
constexpr bool ON_TILES<OfInt8> = true;

// This thread's hold on the matrix unit. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
class MatrixUnit {
 public:
  // The process may use it. Linux asks to be asked, once, since a thread's state grows by 8 KiB.
  static bool allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }

  ~MatrixUnit() {
    if (first_) asm volatile("tilerelease");
  }

  // So many rows are in the upper tiles (0, 1 and 4) and in the lower ones (2, 3 and 5). What was in any tile is lost when that changes.
  void shape(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first, second_ = second;
    struct {
      uint8_t palette, start, nothing[14];
      uint16_t bytes[16];  // of a row
      uint8_t rows[16];
    } wanted = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {}};
    const int rows[] = {first, first, second, second, first, second, TILE, TILE};
    for (int i = 0; i < 8; i++) wanted.rows[i] = uint8_t(rows[i]);
    asm volatile("ldtilecfg %0" : : "m"(wanted));
  }

  template <int I>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "n"(I));
  }
  template <int I>
  static void load(const void* from, long stride) {  // bytes from row to row
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(I) : "memory");
  }
  template <int I>
  static void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "n"(I) : "memory");
  }
  template <class T, int SUM, int ROWS, int COLUMNS>
  static void dot() {
    if constexpr (T::PER == 2)
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(SUM), "n"(ROWS), "n"(COLUMNS));
    else
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(SUM), "n"(ROWS), "n"(COLUMNS));
  }

 private:
  int first_ = 0, second_ = 0;
};

// c[rows][N tiles] (+)= a[rows] * b[N tiles], at most TILE rows; unit: shaped for them, above and below. depth: tiles along k.
// ldb: bytes from one step of b to the next. In each tile of depth `lines` lines of what is to be read soon are asked for, a few before each
// instruction of the unit: asked for together they would fill the processor's queue, and the unit wait for it.
template <class T, int N>
inline void tile_row(const typename T::A* a, long lda, const typename T::B* b, long ldb, long depth,
                     typename T::Sum* c, long ldc, bool fresh, const char* soon = nullptr, long lines = 0) {
  using U = MatrixUnit;
  const char *rows = (const char*)a, *columns = (const char*)b;
  const long from_row = lda * sizeof(*a), to_row = ldc * sizeof(*c);
  if (fresh) {
    U::zero<0>();
    if constexpr (N > 1) U::zero<1>();
    if constexpr (N > 2) U::zero<2>(), U::zero<3>();
  } else {
    U::load<0>(c, to_row);
    if constexpr (N > 1) U::load<1>(c + TILE, to_row);
    if constexpr (N > 2) U::load<2>(c + 2 * TILE, to_row), U::load<3>(c + 3 * TILE, to_row);
  }
  const long part = (lines + 2 * N - 1) / (2 * N);
  for (long d = 0; d < depth; d++, rows += LINE, columns += TILE * ldb, soon += lines * LINE) {
    const char* next = soon;
    auto ask = [part, &next] {
      for (long line = 0; line < part; line++, next += LINE) __builtin_prefetch(next);
    };
    U::load<4>(rows, from_row);
    ask(), U::load<6>(columns, ldb);
    ask(), U::dot<T, 0, 4, 6>();
    if constexpr (N > 1) {
      ask(), U::load<7>(columns + LINE, ldb);
      ask(), U::dot<T, 1, 4, 7>();
    }
    if constexpr (N > 2) {
      ask(), U::load<6>(columns + 2 * LINE, ldb);
      ask(), U::dot<T, 2, 4, 6>();
      ask(), U::load<7>(columns + 3 * LINE, ldb);
      ask(), U::dot<T, 3, 4, 7>();
    }
  }
  U::store<0>(c, to_row);
  if constexpr (N > 1) U::store<1>(c + TILE, to_row);
  if constexpr (N > 2) U::store<2>(c + 2 * TILE, to_row), U::store<3>(c + 3 * TILE, to_row);
}

// c[two tiles of rows][two tiles] (+)= a * b: each tile that is loaded is used twice. The rest as in tile_row. The unit waits for every line of a
// tile, so those of the rows' next tiles are asked for.
template <class T>
inline void tile_square(const typename T::A* a, long lda, const typename T::B* b, long ldb, long depth,
                        typename T::Sum* c, long ldc, bool fresh, const char* soon, long lines) {
  using U = MatrixUnit;
  const char *upper = (const char*)a, *lower = (const char*)(a + TILE * lda), *columns = (const char*)b;
  const long from_row = lda * sizeof(*a), to_row = ldc * sizeof(*c);
  typename T::Sum* below = c + TILE * ldc;
  if (fresh) {
    U::zero<0>(), U::zero<1>(), U::zero<2>(), U::zero<3>();
  } else {
    U::load<0>(c, to_row), U::load<1>(c + TILE, to_row);
    U::load<2>(below, to_row), U::load<3>(below + TILE, to_row);
  }
  for (long d = 0; d < depth; d++, upper += LINE, lower += LINE, columns += TILE * ldb) {
    for (long line = 0; line < lines; line++, soon += LINE) __builtin_prefetch(soon, 0, 2);
    for (long i = 0; i < TILE; i++)
      __builtin_prefetch(upper + i * from_row + LINE), __builtin_prefetch(lower + i * from_row + LINE);
    U::load<4>(upper, from_row);
    U::load<6>(columns, ldb);
    U::dot<T, 0, 4, 6>();
    U::load<5>(lower, from_row);
    U::dot<T, 2, 5, 6>();
    U::load<7>(columns + LINE, ldb);
    U::dot<T, 1, 4, 7>();
    U::dot<T, 3, 5, 7>();
  }
  U::store<0>(c, to_row), U::store<1>(c + TILE, to_row);
  U::store<2>(below, to_row), U::store<3>(below + TILE, to_row);
}

// One tile of sums: c[rows][16] = a[rows] * b[16], in tile SUM. Two tiles of depth, as heads of 64 and blocks of 64 keys have, are kept in tiles KEPT
// and the one after it from column to column: they are loaded for the first.
template <class T, int SUM, int KEPT>
inline void tile_column(const typename T::A* a, long lda, const typename T::B* b, long ldb, long depth,
                        typename T::Sum* c, long ldc, bool first) {
  using U = MatrixUnit;
  const char *rows = (const char*)a, *columns = (const char*)b;
  const long from_row = lda * sizeof(*a);
  U::zero<SUM>();
  if (depth == 2) {
    if (first) U::load<KEPT>(rows, from_row), U::load<KEPT + 1>(rows + LINE, from_row);
    U::load<6>(columns, ldb);
    U::dot<T, SUM, KEPT, 6>();
    U::load<7>(columns + TILE * ldb, ldb);
    U::dot<T, SUM, KEPT + 1, 7>();
  } else {
    for (long d = 0; d < depth; d++, rows += LINE, columns += TILE * ldb) {
      U::load<KEPT>(rows, from_row);
      U::load<6>(columns, ldb);
      U::dot<T, SUM, KEPT, 6>();
    }
  }
  U::store<SUM>(c, ldc * sizeof(*c));
}

// A panel of some rows, as Linear::panel. Half of a piece of it stays in the nearest caches while the rows pass it, two tiles of them at a time.
template <class T>
void tile_panel(MatrixUnit& unit, const typename T::A* x, long lda, long rows, const typename T::B* b, long depth,
                typename T::Sum* sums, const typename T::B* then) {
  constexpr long AHEAD = 4096, LINES = TILE * PANEL * 4 / LINE, MOST = 40;  // bytes; lines of a tile's depth; tiles of a piece
  constexpr long STEP = PANEL * 4, PIECE = TILE * PANEL * T::PER;           // bytes of a step, numbers of a tile's depth
  if (rows <= TILE) {
    unit.shape(int(rows), int(rows));
    return tile_row<T, 4>(x, lda, b, STEP, depth, sums, PANEL, true, (const char*)b + AHEAD, LINES);
  }
  const long pieces = (depth + MOST - 1) / MOST, some = (depth + pieces - 1) / pieces;
  const long squares = (rows + 2 * TILE - 1) / (2 * TILE);
  for (long d = 0; d < depth; d += some) {
    const long deep = std::min(some, depth - d);
    const char* soon = (const char*)(d + some < depth ? b + (d + some) * PIECE : then);
    long left = soon ? LINES : 0, squares_left = 2 * squares;
    for (long half = 0; half < 2; half++)
      for (long m = 0; m < rows; m += 2 * TILE, squares_left--) {
        const long count = std::min<long>(2 * TILE, rows - m), lines = (left + squares_left - 1) / squares_left;
        const typename T::A* from = x + m * lda + d * TILE * T::PER;
        const typename T::B* columns = b + d * PIECE + half * 2 * TILE * T::PER;
        typename T::Sum* to = sums + m * PANEL + half * 2 * TILE;
        if (count > TILE) {
          unit.shape(TILE, int(count - TILE));
          tile_square<T>(from, lda, columns, STEP, deep, to, PANEL, d == 0, soon, lines);
        } else {
          unit.shape(int(count), int(count));
          tile_row<T, 2>(from, lda, columns, STEP, deep, to, PANEL, d == 0, soon, lines);
        }
        soon += lines * deep * LINE, left -= lines;
      }
  }
}

#else

// There is none: nothing to hold.
class MatrixUnit {
 public:
  static bool allowed() { return true; }
  void shape(int, int) {}
};
template <class T, int SUM, int KEPT>
void tile_column(const typename T::A*, long, const typename T::B*, long, long, typename T::Sum*, long, bool);
template <class T>
void tile_panel(MatrixUnit&, const typename T::A*, long, long, const typename T::B*, long, typename T::Sum*,
                const typename T::B*);

#endif

}  // namespace xllm
