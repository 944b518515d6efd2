// Causal attention of query tokens over the paged cache, exact: blocks of 64 keys at absolute positions, in ascending order, with
// an online softmax in float32. What a token sees does not depend on how it came to be computed: a block that it cannot see adds
// nothing (its weights are exactly 0, the rescale exactly 1). Sources: Kwon et al. 2023, PagedAttention; Milakov and Gimelshein 2018.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "tiles.h"

namespace xllm {

constexpr int KEYS = 64;       // of one block of the softmax; absolute, never a function of chunk or cache block
constexpr int TILE_ROWS = 224;  // query rows (tokens x heads of one KV head) that share a packed block of keys

struct Attention {  // as in device/cpu/native/library.py
  const void *queries, *keys, *values;
  void* out;
  const int32_t* tables;                                  // [sequences][table_width]
  const int64_t *first_tokens, *num_tokens, *context_tokens;  // [sequences]
  int64_t sequences, table_width, block_size, heads, kv_heads, head_dim, sliding_window;
};

// Tokens of one sequence and some KV heads. Heads whose keys lie side by side share the reading of memory.
struct Tile {
  int64_t sequence, head, heads, begin, count, cost;
};

// 32-bit words: to[word][KEYS] = from[key][word]; to is in panels of PANEL keys.
template <class Between>
inline void transpose_words(const uint32_t* const* from, uint32_t* to, long words, Between between) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
  if (words % 16 == 0) {
    for (int key = 0; key < KEYS; key += 16)
      for (long word = 0; word < words; word += 16) {
        between();
        __m512i r[16], t[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(from[key + i] + word);
        for (int i = 0; i < 16; i += 2) {
          t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
          t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
          for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
          }
        for (int j = 0; j < 4; j++) {  // r[4 i + j]: word 4 q + j of keys 4 i .. 4 i + 3 in quarter q
          __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
          __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
          __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
          __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
          uint32_t* at = to + (word + j) * PANEL + key;
          _mm512_storeu_si512(at, _mm512_shuffle_i32x4(a, c, 0x88));
          _mm512_storeu_si512(at + 8 * PANEL, _mm512_shuffle_i32x4(a, c, 0xdd));
          _mm512_storeu_si512(at + 4 * PANEL, _mm512_shuffle_i32x4(b, d, 0x88));
          _mm512_storeu_si512(at + 12 * PANEL, _mm512_shuffle_i32x4(b, d, 0xdd));
        }
      }
    return;
  }
#endif
  for (int key = 0; key < KEYS; key++)
    for (long word = 0; word < words; word++)
      to[(key / PANEL * words + word) * PANEL + key % PANEL] = from[key][word];
}

// Two rows of 16-bit numbers as pairs: to[2 d] = even[d], to[2 d + 1] = odd[d].
inline void interleave(const bf16* even, const bf16* odd, bf16* to, long count) {
  long d = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (; d + 32 <= count; d += 32) {
    __m512i e = _mm512_loadu_si512(even + d), o = _mm512_loadu_si512(odd + d);
    _mm512_storeu_si512(to + 2 * d, _mm512_permutex2var_epi16(e, first, o));
    _mm512_storeu_si512(to + 2 * d + 32, _mm512_permutex2var_epi16(e, second, o));
  }
#elif defined(__AVX2__)
  for (; d + 16 <= count; d += 16) {
    __m256i e = _mm256_loadu_si256((const __m256i*)(even + d)), o = _mm256_loadu_si256((const __m256i*)(odd + d));
    __m256i low = _mm256_unpacklo_epi16(e, o), high = _mm256_unpackhi_epi16(e, o);
    _mm256_storeu_si256((__m256i*)(to + 2 * d), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i*)(to + 2 * d + 16), _mm256_permute2x128_si256(low, high, 0x31));
  }
#endif
  for (; d < count; d++) to[2 * d] = even[d], to[2 * d + 1] = odd[d];
}

// Memory of a thread that is kept from call to call and grows when it must.
template <class N>
struct Scratch {
  std::vector<N> memory;
  N* of(size_t count) {
    if (memory.size() < count) memory.resize(count);
    return memory.data();
  }
};

// What one thread computes, tile after tile.
template <class T>
class Worker {
  using A = typename T::A;
  using B = typename T::B;
  static constexpr int ROWS = ON_TILES<T> ? TILE : TILE_M;  // at once

 public:
  Worker(const Attention& it)
      : it_(it),
        dim_(it.head_dim),
        wide_((it.head_dim + W - 1) / W * W),
        deep_(ON_TILES<T> ? (it.head_dim + TILE * T::PER - 1) / (TILE * T::PER) * TILE * T::PER : it.head_dim),
        group_(it.heads / it.kv_heads) {
    static thread_local Scratch<A> queries;
    static thread_local Scratch<B> keys, values;
    static thread_local Scratch<float> sums, highest, totals, added;
    const long rows = std::max<long>(TILE_ROWS, it.heads) + ROWS;
    queries_ = queries.of(rows * deep_);
    packed_keys_ = keys.of(KEYS * deep_), packed_values_ = values.of(KEYS * wide_);
    sums_ = sums.of(rows * wide_), highest_ = highest.of(rows), totals_ = totals.of(rows);
    added_ = added.of(ROWS * wide_);
    // what lies past the last number of a value meets weights, and must be one
    std::fill(packed_values_, packed_values_ + KEYS * wide_, B(0));
    if (deep_ > dim_) {  // and past the last of a key or a query
      std::fill(packed_keys_, packed_keys_ + KEYS * deep_, B(0));
      std::fill(queries_, queries_ + rows * deep_, A(0));
    }
  }

  void compute(const Tile& tile) {
    const int64_t s = tile.sequence, context = it_.context_tokens[s];
    const int64_t first = context - it_.num_tokens[s] + tile.begin;  // position of the tile's first token
    const int64_t last = first + tile.count - 1;
    take_queries(tile);
    const long rows = tile.count * group_ * tile.heads;
    std::fill(sums_, sums_ + rows * wide_, 0.0f);
    std::fill(totals_, totals_ + rows, 0.0f);
    // finite, so that a row which sees nothing of its first block keeps zeros
    std::fill(highest_, highest_ + rows, std::numeric_limits<float>::lowest());
    int64_t from = it_.sliding_window ? std::max<int64_t>(0, first - it_.sliding_window + 1) : 0;
    from = from / KEYS * KEYS;
    row_bytes_ = tile.heads * dim_ * sizeof(B);
    find(tile, from, context);
    for (int64_t key = from; key <= last; key += KEYS) {
      std::swap(here_, next_);
      if (key + KEYS <= last) find(tile, key + KEYS, context);
      else next_->count = 0;
      asked_ = asked_at_ = 0;
      for (long h = 0; h < tile.heads; h++) {
        last_asked_ = next_->count * (h + 1) / tile.heads;
        pack(h * dim_);
        add_block(tile, h, key, first);
      }
    }
    give(tile);
  }

 private:
  void take_queries(const Tile& tile) {
    const B* q = (const B*)it_.queries;
    int64_t token = it_.first_tokens[tile.sequence] + tile.begin;
    for (long h = 0; h < tile.heads; h++)
      for (long t = 0; t < tile.count; t++) {
        const B* from = q + ((token + t) * it_.heads + (tile.head + h) * group_) * dim_;
        A* to = queries_ + (h * tile.count + t) * group_ * deep_;
        for (long g = 0; g < group_; g++, from += dim_, to += deep_)
          for (long i = 0; i < dim_; i++) {
            if constexpr (sizeof(A) == sizeof(B)) to[i] = from[i];
            else to[i] = widen(from[i]);
          }
      }
  }

  // Where the next block's keys and values lie, from the first of the tile's heads on.
  void find(const Tile& tile, int64_t key, int64_t context) {
    const int32_t* table = it_.tables + tile.sequence * it_.table_width + key / it_.block_size;
    const long row = it_.kv_heads * dim_;
    long offset = key % it_.block_size;
    next_->count = int(std::min<int64_t>(KEYS, context - key));
    for (long i = 0; i < next_->count; table++, offset = 0) {  // cache block by cache block
      const long at = (*table * it_.block_size + offset) * row + tile.head * dim_;
      const long end = std::min<long>(next_->count, i + it_.block_size - offset);
      const B *k = (const B*)it_.keys + at, *v = (const B*)it_.values + at;
      for (; i < end; i++, k += row, v += row) next_->keys[i] = k, next_->values[i] = v;
    }
  }

  // Have some of the next block's numbers brought from memory while this one is computed, so many cache lines of keys and of values.
  // Few at a time: the processor drops what it cannot take at once.
  void ask(int lines) {
    for (; lines && asked_ < last_asked_; lines--) {
      __builtin_prefetch((const char*)next_->keys[asked_] + asked_at_, 0, 3);
      __builtin_prefetch((const char*)next_->values[asked_] + asked_at_, 0, 3);
      asked_at_ += 64;
      if (asked_at_ >= row_bytes_) asked_at_ = 0, asked_++;
    }
  }

  // One head of the block; at: where it stands in a row.
  void pack(long at) {
    const uint32_t* words[KEYS];
    alignas(64) static const B nothing[MOST_HEAD_DIM] = {};  // what lies past the end
    for (int i = 0; i < KEYS; i++)
      words[i] = (const uint32_t*)(i < here_->count ? here_->keys[i] + at : nothing);
    transpose_words(words, (uint32_t*)packed_keys_, dim_ / T::PER, [this] { ask(4); });
    if constexpr (T::PER == 1) {
      for (int i = 0; i < KEYS; i++) {
        B* to = packed_values_ + i * wide_;
        std::memcpy(to, i < here_->count ? here_->values[i] + at : nothing, dim_ * sizeof(B));
      }
    } else {
      for (int i = 0; i < KEYS; i += 2) {
        ask(2);
        const B* even = i < here_->count ? here_->values[i] + at : nothing;
        const B* odd = i + 1 < here_->count ? here_->values[i + 1] + at : nothing;
        interleave(even, odd, packed_values_ + i * wide_, dim_);
      }
    }
  }

  // Whether some of these tokens see something of the block.
  bool seen(int64_t key, int64_t earliest, int64_t latest) const {
    return key <= latest && !(it_.sliding_window && key + KEYS <= earliest - it_.sliding_window + 1);
  }

  void add_block(const Tile& tile, long head, int64_t key, int64_t first) {
    const long rows = tile.count * group_, begin = head * rows;
    if constexpr (ON_TILES<T>) return add_on_tiles(begin, rows, key, first);
    for (long r = 0; r < rows;) {
      const int count = tile_of(rows - r);
      if (seen(key, first + r / group_, first + (r + count - 1) / group_)) add_rows(begin + r, count, key, first, r);
      r += count;
    }
  }

  // What a block makes of some rows: their highest score, by how much it rose (an exponent), the sum of their weights.
  struct Change {
    float highest[W] = {}, less[W] = {}, totals[W] = {};
  };

  // Rows [from, to) of a group whose first is r. Stage by stage over all of them, so that they wait for each other's results as little as may be.
  void weigh(Change& change, const float* scores, A* weights, long r, int from, int to) {
    static_assert(ROWS <= W, "one vector holds a number of each row");
    const float scale = LOG2_E / std::sqrt(float(dim_));
    for (int i = from; i < to; i++) {
      vf most = load(scores + i * KEYS);
      for (int j = W; j < KEYS; j += W) most = larger(most, load(scores + i * KEYS + j));
      const float before = highest_[r + i];
      change.highest[i] = std::max(before, largest(most));
      change.less[i] = (before - change.highest[i]) * scale;
      highest_[r + i] = change.highest[i];
    }
    for (int i = from; i < to; i++) {
      vf total = zero();
      for (int j = 0; j < KEYS; j += W) {
        vf p = exp2_(mul(sub(load(scores + i * KEYS + j), all(change.highest[i])), all(scale)));
        total = add(total, p);
        store(weights + i * KEYS + j, p);
      }
      change.totals[i] = sum(total);
    }
  }

  void hide_some(float* scores, int count, int64_t key, int64_t first, long row) {
    if (key + KEYS - 1 > first + row / group_ || it_.sliding_window)
      hide(scores, count, key, first + row / group_, row % group_);
  }

  // r: the first of the rows; row: counted from its head's first.
  void add_rows(long r, int count, int64_t key, int64_t first, long row) {
    for (int panel = 0; panel < KEYS / PANEL; panel++)
      micro_rows<T, PANEL_V>(count, queries_ + r * deep_, deep_,
                             packed_keys_ + panel * PANEL * deep_, PANEL * T::PER, deep_ / T::PER,
                             scores_[0] + panel * PANEL, KEYS, true);
    ask(8);
    hide_some(scores_[0], count, key, first, row);
    Change change;
    weigh(change, scores_[0], weights_[0], r, 0, count);
    ask(8);
    bool changed = false;
    for (int i = 0; i < count; i++) changed |= change.less[i] != 0.0f;
    if (changed) {
      float rescales[W];
      store(rescales, exp2_(load(change.less)));
      for (int i = 0; i < count; i++) {
        float* sums = sums_ + (r + i) * wide_;
        for (long d = 0; d < wide_; d += W) store(sums + d, mul(load(sums + d), all(rescales[i])));
        totals_[r + i] *= rescales[i];
      }
    }
    for (int i = 0; i < count; i++) totals_[r + i] += change.totals[i];
    long d = 0;
    for (; d + PANEL <= wide_; d += PANEL) add_values<PANEL_V>(r, count, d);
    for (; d < wide_; d += W) add_values<1>(r, count, d);
  }

  // The same for all rows of a head on the matrix unit, in groups of a tile's rows. While vectors make a group's weights, the unit computes the
  // next one's scores and what the one before adds to its sums: a quarter of each with a quarter of the rows, near enough for the processor to
  // do them at once. What is added goes beside the sums and not onto them: a tile would wait long for what vectors have just written.
  void add_on_tiles(long begin, long rows, int64_t key, int64_t first) {
    auto sees = [&](long r) { return seen(key, first + r / group_, first + (std::min(r + TILE, rows) - 1) / group_); };
    long from = 0, to = rows;
    while (from < rows && !sees(from)) from += TILE;
    while (to > from && !sees((to - 1) / TILE * TILE)) to = (to - 1) / TILE * TILE;
    if (from >= to) return;
    // rows past the last are computed too where the shape would change for them alone; nobody looks at them
    const int height = int(std::min<long>(rows, TILE));
    unit_.shape(height, height);
    Change changes[2];
    int at = 0;
    for (int quarter = 0; quarter < 4; quarter++) tile_scores(begin + from, scores_[at], quarter);
    for (long r = from; r < to; r += TILE, at ^= 1) {
      const int count = int(std::min<long>(TILE, rows - r));
      const bool next = r + TILE < to, before = r > from;
      hide_some(scores_[at], count, key, first, r);
      for (int quarter = 0; quarter < 4; quarter++) {
        weigh(changes[at], scores_[at], weights_[at], begin + r, std::min(4 * quarter, count), std::min(4 * quarter + 4, count));
        if (next) tile_scores(begin + r + TILE, scores_[at ^ 1], quarter);
        if (before) tile_values(weights_[at ^ 1], quarter);
        ask(4);
      }
      if (before) take_added(changes[at ^ 1], begin + r - TILE, TILE);
    }
    for (int quarter = 0; quarter < 4; quarter++) tile_values(weights_[at ^ 1], quarter);
    const long last = (to - from - 1) / TILE * TILE + from;
    take_added(changes[at ^ 1], begin + last, int(std::min<long>(TILE, rows - last)));
  }

  void tile_scores(long r, float* scores, int quarter) {
    tile_column<T, 0, 4>(queries_ + r * deep_, deep_, packed_keys_ + quarter * TILE * T::PER, KEYS * 4, deep_ / T::PER / TILE,
                         scores + quarter * TILE, KEYS, quarter == 0);
  }

  void tile_values(const A* weights, int quarter) {
    for (long d = quarter * TILE; d < wide_; d += 4 * TILE)
      tile_column<T, 1, 2>(weights, KEYS, packed_values_ + d * T::PER, wide_ * 4, KEYS / T::PER / TILE, added_ + d, wide_, d == 0);
  }

  void take_added(const Change& change, long r, int count) {
    float rescales[W];
    store(rescales, exp2_(load(change.less)));
    for (int i = 0; i < count; i++) {
      float *sums = sums_ + (r + i) * wide_, *added = added_ + i * wide_;
      for (long d = 0; d < wide_; d += W) store(sums + d, fma(load(sums + d), all(rescales[i]), load(added + d)));
      totals_[r + i] = totals_[r + i] * rescales[i] + change.totals[i];
    }
  }

  // The first row is query head `head` of its KV head at position `first`.
  void hide(float* of, int count, int64_t key, int64_t first, long head) {
    const float nothing = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < count; i++) {
      float* scores = of + i * KEYS;
      const int64_t position = first + (head + i) / group_;
      for (int64_t j = std::max<int64_t>(0, position + 1 - key); j < KEYS; j++) scores[j] = nothing;
      if (!it_.sliding_window) continue;
      const int64_t seen = std::min<int64_t>(KEYS, position + 1 - it_.sliding_window - key);
      for (int64_t j = 0; j < seen; j++) scores[j] = nothing;
    }
  }

  template <int N>
  void add_values(long r, int count, long d) {
    micro_rows<T, N>(count, weights_[0], KEYS, packed_values_ + d * T::PER, wide_ * T::PER,
                     KEYS / T::PER, sums_ + r * wide_ + d, wide_, false);
  }

  void give(const Tile& tile) {
    B* out = (B*)it_.out;
    int64_t token = it_.first_tokens[tile.sequence] + tile.begin;
    for (long i = 0; i < tile.heads * tile.count; i++)
      for (long g = 0; g < group_; g++) {
        const float* sums = sums_ + (i * group_ + g) * wide_;
        vf total = all(totals_[i * group_ + g]);
        const long h = i / tile.count, t = i % tile.count;
        B* to = out + ((token + t) * it_.heads + (tile.head + h) * group_ + g) * dim_;
        for (long d = 0; d < dim_; d += W) {
          vf y = div(load(sums + d), total);
          if (d + W <= dim_) store(to + d, y);
          else store(to + d, y, int(dim_ - d));
        }
      }
  }

  const Attention& it_;
  MatrixUnit unit_;
  const long dim_, wide_, deep_, group_;  // of a head; whole vectors, whole tiles; heads
  A* queries_;
  B *packed_keys_, *packed_values_;  // values: [KEYS / PER][wide][PER]
  float *sums_, *highest_, *totals_;  // of each row
  float* added_;                      // what a block adds to the sums of some
  alignas(64) float scores_[2][ROWS * KEYS];  // of two groups of rows
  alignas(64) A weights_[2][ROWS * KEYS];
  long asked_, last_asked_, asked_at_, row_bytes_;  // rows of the next block, and bytes in one
  struct Rows {
    int count;  // keys past it lie past the end of the sequence
    const B *keys[KEYS], *values[KEYS];
  } rows_[2], *here_ = rows_, *next_ = rows_ + 1;
};

template <class T>
void attend(const Attention& it, int threads) {
  const long group = it.heads / it.kv_heads, most = std::max<long>(1, TILE_ROWS / group);
  static thread_local std::vector<Tile> tiles;
  tiles.clear();
  for (long s = 0; s < it.sequences; s++) {
    const long together = it.num_tokens[s] == 1 && it.sequences >= 2 * threads ? it.kv_heads : 1;
    // even tiles; small enough that every thread gets some
    int64_t size = std::min<int64_t>(most, std::max<int64_t>(1, it.num_tokens[s] * it.kv_heads / (4 * threads)));
    for (long begin = 0; begin < it.num_tokens[s]; begin += size) {
      int64_t count = std::min<int64_t>(size, it.num_tokens[s] - begin);
      int64_t cost = (it.context_tokens[s] - it.num_tokens[s] + begin + count) * (count + 4) * together;
      for (long head = 0; head < it.kv_heads; head += together) tiles.push_back({s, head, together, begin, count, cost});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
  if (tiles.size() == 1) threads = 1;
  const Tile* all = tiles.data();
  const size_t count = tiles.size();
#pragma omp parallel num_threads(threads)
  {
    Worker<T> worker(it);
#pragma omp for schedule(dynamic, 1) nowait
    for (size_t i = 0; i < count; i++) worker.compute(all[i]);
  }
}

}  // namespace xllm
