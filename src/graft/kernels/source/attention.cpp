// Attention over a packed row of trees for training: each token sees its own span up to itself and all of its
// ancestors. Forward, and the gradients from recomputed probabilities.
//
// One task is one tree and one key/value head. It walks the tree's spans in row order, which is depth first, and
// keeps the keys and values of the path that it stands on: position p of the path lies in place p. A span's keys
// are brought there once, whatever hangs below; the sums of their gradients leave when its subtree is done. All of a
// tree's sums are taken by one thread in one order.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gemm.h"
#include "vector.h"

namespace graft {

// The ctypes mirror is in graft/kernels/tree_attention.py.
struct TreeAttention {
  const bf16* query;    // [tokens, heads dim], rotated; all rows are neighbours
  const bf16* key;      // [tokens, kv_heads dim], rotated
  const bf16* value;    // [tokens, kv_heads dim]
  bf16* out;            // [tokens, heads dim], rows `out_stride` apart
  int64_t out_stride;
  float* sums;          // [tokens, heads] log-sum-exp of the scores
  const float* d_out;   // [tokens, heads dim]
  float* d_query;
  float* d_key;
  float* d_value;
  const int64_t* spans;  // [spans, 3]: start, end, end of the subtree; in row order
  const int64_t* trees;  // [trees + 1]: first span of each tree
  int64_t tree_count;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;           // a multiple of 16
  float scale;
};

namespace {

constexpr int64_t ROWS = 8;  // queries that are computed together

struct Place {
  int64_t start, end, subtree_end;  // in the row
  int64_t first;                    // of the span's positions on the path
};

struct Buffers {
  std::vector<float> keys_across, values_across;  // [blocks of 16 positions][dim][16]
  std::vector<float> keys, values, d_keys, d_values;  // [positions][dim]
  std::vector<float> scores, d_scores;                // [ROWS][positions in whole pairs of blocks]
  std::vector<float> queries, d_out, sums;            // [ROWS][dim]; sums: dim of the values
  float log_sums[ROWS];
};

float* at_least(std::vector<float>& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// scores[r][0..16 blocks) = rows[r] . columns, with columns in blocks [dim][16]; two blocks at a time.
void multiply_across(const float* rows, const float* columns, int64_t dim, int64_t blocks, float* scores,
                     int64_t stride) {
  for (int64_t block = 0; block < blocks; block += 2) {
    const float *first = columns + block * dim * TILE, *second = first + dim * TILE;
    __m512 a[ROWS], b[ROWS];
    for (int r = 0; r < ROWS; ++r) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; ++d) {
      const __m512 x = _mm512_loadu_ps(first + d * TILE), y = _mm512_loadu_ps(second + d * TILE);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m512 value = _mm512_set1_ps(rows[r * dim + d]);
        a[r] = _mm512_fmadd_ps(value, x, a[r]);
        b[r] = _mm512_fmadd_ps(value, y, b[r]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      _mm512_storeu_ps(scores + r * stride + block * TILE, a[r]);
      _mm512_storeu_ps(scores + r * stride + (block + 1) * TILE, b[r]);
    }
  }
}

// sums[r] = weights[r][0..count) . vectors [count][dim], for VECTORS vectors from number `at` on, four rows.
template <int VECTORS>
void blend_rows(const float* weights, int64_t stride, const float* vectors, int64_t count, int64_t dim, int64_t at,
                float* sums) {
  __m512 total[4][VECTORS];
  for (auto& row : total)
    for (auto& vector : row) vector = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; ++i) {
    __m512 value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = _mm512_loadu_ps(vectors + i * dim + at + v * TILE);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + i]);
      for (int v = 0; v < VECTORS; ++v) total[r][v] = _mm512_fmadd_ps(weight, value[v], total[r][v]);
    }
  }
  for (int r = 0; r < 4; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(sums + r * dim + at + v * TILE, total[r][v]);
}

void blend_all(const float* weights, int64_t stride, const float* vectors, int64_t count, int64_t dim, float* sums) {
  for (int64_t r = 0; r < ROWS; r += 4) {
    int64_t at = 0;
    for (; at + 4 * TILE <= dim; at += 4 * TILE)
      blend_rows<4>(weights + r * stride, stride, vectors, count, dim, at, sums + r * dim);
    for (; at < dim; at += TILE)
      blend_rows<1>(weights + r * stride, stride, vectors, count, dim, at, sums + r * dim);
  }
}

// sums[i] += weights[r][i] rows[r] over all r, for four positions i and VECTORS vectors from number `at` on.
template <int VECTORS>
void spread(const float* weights, int64_t stride, const float* rows, int64_t dim, int64_t at, float* sums) {
  __m512 total[4][VECTORS];
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < VECTORS; ++v) total[i][v] = _mm512_loadu_ps(sums + i * dim + at + v * TILE);
  for (int r = 0; r < ROWS; ++r) {
    __m512 value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = _mm512_loadu_ps(rows + r * dim + at + v * TILE);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 weight = _mm512_set1_ps(weights[r * stride + i]);
      for (int v = 0; v < VECTORS; ++v) total[i][v] = _mm512_fmadd_ps(weight, value[v], total[i][v]);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(sums + i * dim + at + v * TILE, total[i][v]);
}

void spread_all(const float* weights, int64_t stride, const float* rows, int64_t count, int64_t dim, float* sums) {
  for (int64_t i = 0; i < count; i += 4) {
    int64_t at = 0;
    for (; at + 4 * TILE <= dim; at += 4 * TILE) spread<4>(weights + i, stride, rows, dim, at, sums + i * dim);
    for (; at < dim; at += TILE) spread<1>(weights + i, stride, rows, dim, at, sums + i * dim);
  }
}

// One tree and one key/value head.
class Walk {
 public:
  Walk(const TreeAttention& attention, int64_t tree, int64_t kv_head, Buffers& buffers)
      : a(attention), b(buffers), kv_head(kv_head), group(a.heads / a.kv_heads) {
    int64_t longest = 0;
    for (int64_t i = a.trees[tree]; i < a.trees[tree + 1]; ++i) {
      places.push_back({a.spans[3 * i], a.spans[3 * i + 1], a.spans[3 * i + 2], 0});
      Place& place = places.back();
      while (!open.empty() && open.back().subtree_end <= place.start) open.pop_back();
      if (!open.empty()) place.first = open.back().first + open.back().end - open.back().start;
      open.push_back(place);
      longest = std::max(longest, place.first + place.end - place.start);
    }
    open.clear();
    room = round_up(longest, 2 * TILE);
    for (auto* buffer : {&b.keys_across, &b.values_across, &b.keys, &b.values, &b.d_keys, &b.d_values})
      at_least(*buffer, room * a.dim);
    for (auto* buffer : {&b.scores, &b.d_scores}) at_least(*buffer, ROWS * room);
    for (auto* buffer : {&b.queries, &b.d_out, &b.sums}) at_least(*buffer, ROWS * a.dim);
  }

  void forward() {
    for (const Place& place : places) {
      enter(place, false);
      for_rows(place, [&](const Place& p, int64_t row, int64_t rows) {
        const int64_t seen = score(p, row, rows);
        for (int64_t r = 0; r < ROWS; ++r) soften(p, row, rows, r, seen);
        blend_all(b.scores.data(), room, b.values.data(), seen, a.dim, b.sums.data());
        for (int64_t r = 0; r < rows; ++r) {
          bf16* to = a.out + token(p, row + r) * a.out_stride + head(row + r) * a.dim;
          for (int64_t d = 0; d < a.dim; d += TILE)
            store16(to + d, _mm512_loadu_ps(b.sums.data() + r * a.dim + d), 0xFFFF);
        }
      });
    }
  }

  void backward() {
    for (const Place& place : places) {
      leave(place.start);
      enter(place, true);
      open.push_back(place);
      for_rows(place, [&](const Place& p, int64_t row, int64_t rows) {
        const int64_t seen = score(p, row, rows);
        load_gradients(p, row, rows);
        multiply_across(b.d_out.data(), b.values_across.data(), a.dim, round_up(seen, 2 * TILE) / TILE,
                        b.d_scores.data(), room);
        for (int64_t r = 0; r < ROWS; ++r) differentiate(p, row, rows, r, seen);
        blend_all(b.d_scores.data(), room, b.keys.data(), seen, a.dim, b.sums.data());
        for (int64_t r = 0; r < rows; ++r) {
          float* to = a.d_query + (token(p, row + r) * a.heads + head(row + r)) * a.dim;
          for (int64_t d = 0; d < a.dim; d += TILE)
            _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_set1_ps(a.scale),
                                                   _mm512_loadu_ps(b.sums.data() + r * a.dim + d)));
        }
        spread_all(b.scores.data(), room, b.d_out.data(), seen, a.dim, b.d_values.data());
        spread_all(b.d_scores.data(), room, b.queries.data(), seen, a.dim, b.d_keys.data());
      });
    }
    leave(std::numeric_limits<int64_t>::max());
  }

 private:
  const TreeAttention& a;
  Buffers& b;
  int64_t kv_head, group, room;
  std::vector<Place> places, open;

  // Rows of a span: position by position, the heads of one position next to each other.
  int64_t token(const Place& p, int64_t row) const { return p.start + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  int64_t visible(const Place& p, int64_t row) const { return p.first + row / group + 1; }

  template <typename Function>
  void for_rows(const Place& p, Function function) {
    const int64_t count = (p.end - p.start) * group;
    for (int64_t row = 0; row < count; row += ROWS) function(p, row, std::min(ROWS, count - row));
  }

  // Brings a span's keys and values to the path. The places behind it hold finite numbers, whoever left them.
  void enter(const Place& p, bool gradients) {
    for (int64_t i = 0; i < p.end - p.start; ++i) {
      const int64_t from = ((p.start + i) * a.kv_heads + kv_head) * a.dim, position = p.first + i;
      const int64_t across = position / TILE * a.dim * TILE + position % TILE;
      for (int64_t d = 0; d < a.dim; d += TILE) {
        alignas(64) float key[TILE], value[TILE];
        _mm512_store_ps(key, load16(a.key + from + d));
        _mm512_store_ps(value, load16(a.value + from + d));
        for (int64_t j = 0; j < TILE; ++j) b.keys_across[across + (d + j) * TILE] = key[j];
        std::memcpy(b.values.data() + position * a.dim + d, value, sizeof value);
        if (!gradients) continue;
        for (int64_t j = 0; j < TILE; ++j) b.values_across[across + (d + j) * TILE] = value[j];
        std::memcpy(b.keys.data() + position * a.dim + d, key, sizeof key);
      }
    }
    if (!gradients) return;
    // Groups of four positions reach a little behind the path: those sums are not read, but must stay finite.
    const int64_t end = round_up(p.first + p.end - p.start, TILE);
    std::fill(b.d_keys.begin() + p.first * a.dim, b.d_keys.begin() + end * a.dim, 0.0f);
    std::fill(b.d_values.begin() + p.first * a.dim, b.d_values.begin() + end * a.dim, 0.0f);
  }

  // Spans whose subtree ends before `start` give away the sums of their gradients.
  void leave(int64_t start) {
    for (; !open.empty() && open.back().subtree_end <= start; open.pop_back()) {
      const Place& p = open.back();
      for (int64_t i = 0; i < p.end - p.start; ++i) {
        const int64_t to = ((p.start + i) * a.kv_heads + kv_head) * a.dim, from = (p.first + i) * a.dim;
        std::memcpy(a.d_key + to, b.d_keys.data() + from, a.dim * sizeof(float));
        std::memcpy(a.d_value + to, b.d_values.data() + from, a.dim * sizeof(float));
      }
    }
  }

  // Scores of the rows, scaled; returns how many positions the last of them sees.
  int64_t score(const Place& p, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t d = 0; d < a.dim; d += TILE) {
        __m512 query = _mm512_setzero_ps();
        if (r < rows) query = load16(a.query + (token(p, row + r) * a.heads + head(row + r)) * a.dim + d);
        _mm512_storeu_ps(b.queries.data() + r * a.dim + d, _mm512_mul_ps(query, _mm512_set1_ps(a.scale)));
      }
    const int64_t seen = visible(p, row + rows - 1);
    multiply_across(b.queries.data(), b.keys_across.data(), a.dim, round_up(seen, 2 * TILE) / TILE,
                    b.scores.data(), room);
    return seen;
  }

  // Scores of row r -> probabilities, zero past what it sees.
  void soften(const Place& p, int64_t row, int64_t rows, int64_t r, int64_t seen) {
    float* scores = b.scores.data() + r * room;
    const int64_t count = r < rows ? visible(p, row + r) : 0, width = round_up(seen, TILE);
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < count; i += TILE)
      top = _mm512_mask_max_ps(top, first_lanes(count - i), top, _mm512_loadu_ps(scores + i));
    const float highest = count ? _mm512_reduce_max_ps(top) : 0;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += TILE) {
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(highest));
      const __m512 weight = _mm512_maskz_mov_ps(first_lanes(count - i), exponential(shifted));
      _mm512_storeu_ps(scores + i, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    if (!count) return;
    const float total = _mm512_reduce_add_ps(sum);
    a.sums[token(p, row + r) * a.heads + head(row + r)] = highest + std::log(total);
    const __m512 inverse = _mm512_set1_ps(1.0f / total);
    for (int64_t i = 0; i < width; i += TILE)
      _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), inverse));
  }

  // The rows' output gradients and log-sum-exps.
  void load_gradients(const Place& p, int64_t row, int64_t rows) {
    for (int64_t r = 0; r < ROWS; ++r) {
      for (int64_t d = 0; d < a.dim; d += TILE) {
        __m512 gradient = _mm512_setzero_ps();
        if (r < rows)
          gradient = _mm512_loadu_ps(a.d_out + (token(p, row + r) * a.heads + head(row + r)) * a.dim + d);
        _mm512_storeu_ps(b.d_out.data() + r * a.dim + d, gradient);
      }
      b.log_sums[r] = r < rows ? a.sums[token(p, row + r) * a.heads + head(row + r)] : 0;
    }
  }

  // Scores -> probabilities p, and d_p -> d_scores = p (d_p - sum of p d_p). That sum equals d_out . out, but the output
  // is rounded, and where values have much in common it would not cancel.
  void differentiate(const Place& p, int64_t row, int64_t rows, int64_t r, int64_t seen) {
    float *scores = b.scores.data() + r * room, *d_scores = b.d_scores.data() + r * room;
    const int64_t count = r < rows ? visible(p, row + r) : 0;
    __m512 dot = _mm512_setzero_ps();
    for (int64_t i = 0; i < round_up(seen, TILE); i += TILE) {
      const __mmask16 lanes = first_lanes(count - i);
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(b.log_sums[r]));
      const __m512 weight = _mm512_maskz_mov_ps(lanes, exponential(shifted));
      dot = _mm512_mask3_fmadd_ps(weight, _mm512_loadu_ps(d_scores + i), dot, lanes);
      _mm512_storeu_ps(scores + i, weight);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
    for (int64_t i = 0; i < round_up(seen, TILE); i += TILE) {
      const __m512 gradient = _mm512_sub_ps(_mm512_loadu_ps(d_scores + i), mean);
      _mm512_storeu_ps(d_scores + i,
                       _mm512_maskz_mul_ps(first_lanes(count - i), _mm512_loadu_ps(scores + i), gradient));
    }
  }
};

template <typename Function>
void for_tasks(const TreeAttention& a, int threads, Function function) {
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.tree_count * a.kv_heads; ++task) {
      Walk walk(a, task / a.kv_heads, task % a.kv_heads, buffers);
      function(walk);
    }
  }
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

void graft_tree_attention(const TreeAttention* a, int32_t threads) {
  for_tasks(*a, threads, [](Walk& walk) { walk.forward(); });
}

void graft_tree_attention_gradient(const TreeAttention* a, int32_t threads) {
  for_tasks(*a, threads, [](Walk& walk) { walk.backward(); });
}

// x [rows, heads dim] fp32 -> out bf16, each head turned by its row's angles: with halves (a, b) of a head,
// (a c1 - b s1, b c2 + a s2); cosines and sines are [rows, dim].
void graft_rotate(const float* x, const float* cosines, const float* sines, int64_t rows, int64_t heads, int64_t dim,
                  bf16* out, int32_t threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      const float *from = x + (row * heads + head) * dim, *c = cosines + row * dim, *s = sines + row * dim;
      bf16* to = out + (row * heads + head) * dim;
      for (int64_t i = 0; i < half; i += TILE) {
        const __mmask16 lanes = first_lanes(half - i);
        const __m512 a = load16(from + i, lanes), b = load16(from + half + i, lanes);
        const __m512 low = _mm512_mul_ps(a, load16(c + i, lanes));
        const __m512 high = _mm512_mul_ps(b, load16(c + half + i, lanes));
        store16(to + i, _mm512_fnmadd_ps(b, load16(s + i, lanes), low), lanes);
        store16(to + half + i, _mm512_fmadd_ps(a, load16(s + half + i, lanes), high), lanes);
      }
    }
}

// The transposed map on gradients, in place.
void graft_rotate_back(float* x, const float* cosines, const float* sines, int64_t rows, int64_t heads, int64_t dim,
                       int32_t threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t head = 0; head < heads; ++head) {
      float* at = x + (row * heads + head) * dim;
      const float *c = cosines + row * dim, *s = sines + row * dim;
      for (int64_t i = 0; i < half; i += TILE) {
        const __mmask16 lanes = first_lanes(half - i);
        const __m512 a = load16(at + i, lanes), b = load16(at + half + i, lanes);
        const __m512 low = _mm512_mul_ps(a, load16(c + i, lanes));
        const __m512 high = _mm512_mul_ps(b, load16(c + half + i, lanes));
        store16(at + i, _mm512_fmadd_ps(b, load16(s + half + i, lanes), low), lanes);
        store16(at + half + i, _mm512_fnmadd_ps(a, load16(s + i, lanes), high), lanes);
      }
    }
}
}
