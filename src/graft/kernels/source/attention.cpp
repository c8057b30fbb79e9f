// Attention over a packed row of trees for training: each token sees its own span up to itself and all of its
// ancestors. Forward, and the gradients from recomputed probabilities. Products are on AMX tiles: bf16 factors, so that
// probabilities and gradients of scores are rounded, as FlashAttention does, and fp32 sums; the softmax is fp32.
//
// One task is one piece of the row and one key/value head. It walks through its spans in row order, which is depth
// first, and keeps the keys and values of the path that it stands on: position p of the path lies in place p. A span's
// keys are brought there once, whatever hangs below; the sums of their gradients leave when its subtree is done. What
// later pieces add to spans of earlier ones is added at the end, piece by piece. Pieces depend on the spans alone, so
// that results do not depend on the number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "blocks.h"
#include "forest.h"

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
  int64_t span_count;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;           // a multiple of 16
  float scale;
};

namespace {

constexpr int64_t TASKS = 12;  // at least, of long rows: equal shares for 2, 3 and 4 threads

// Blocks are counted along positions ("panels", 32 each) and along the head's numbers ("slices", 32 each).
struct Buffers {
  Blocks<bf16> keys_right, values_right;                        // [panel][slice]: inner dimension positions
  Blocks<bf16> keys_right_transposed, values_right_transposed;  // [panel][slice]: inner dimension the head's numbers
  Blocks<float> d_keys, d_values;                               // [panel][slice]: [32 numbers][32 positions]
  Blocks<float> scores, d_scores;                               // [panel]: [32 rows][32 positions]
  Blocks<bf16> weights_left;                                    // [panel]
  Blocks<bf16> queries, d_out, queries_left_transposed, d_out_left_transposed;  // [slice]
  Blocks<float> sums;                                           // [1]
  Blocks<bf16> weights_right, d_scores_right;                   // [1]
  std::vector<int64_t> tokens;                                  // of each position
};

// Up to 32 queries of one place that are computed together: position by position, the heads of one position next to
// each other.
struct Queries {
  int64_t count;
  int64_t panels;           // that the last of them sees
  int64_t index[BLOCK];     // token heads + head
  int64_t visible[BLOCK];   // positions; 0 behind the last query
};

// One piece and one key/value head.
class Walk {
 public:
  Walk(const TreeAttention& attention, const Forest& forest, const Piece& piece, int64_t kv_head, float* shared,
       Buffers& buffers)
      : a(attention), forest(forest), piece(piece), kv_head(kv_head), shared(shared), b(buffers) {
    group = a.heads / a.kv_heads;
    slices = round_up(a.dim, BLOCK) / BLOCK;
    const int64_t panels = round_up(forest.longest, BLOCK) / BLOCK;
    for (auto* blocks : {&b.keys_right, &b.values_right, &b.keys_right_transposed, &b.values_right_transposed})
      blocks->make_room(panels * slices);
    for (auto* blocks : {&b.d_keys, &b.d_values}) blocks->make_room(panels * slices);
    for (auto* blocks : {&b.scores, &b.d_scores}) blocks->make_room(panels);
    b.weights_left.make_room(panels);
    for (auto* blocks : {&b.queries, &b.d_out, &b.queries_left_transposed, &b.d_out_left_transposed})
      blocks->make_room(slices);
    b.sums.make_room(1);
    b.weights_right.make_room(1);
    b.d_scores_right.make_room(1);
    if (int64_t(b.tokens.size()) < forest.longest) b.tokens.resize(forest.longest);
  }

  void forward() {
    for (int64_t index : forest.ancestors(piece.first)) enter(forest.places[index], false);
    for (int64_t index = piece.first; index < piece.last; ++index) {
      enter(forest.places[index], false);
      for_queries(forest.places[index], [this](const Queries& q) { attend(q); });
    }
  }

  void backward() {
    for (int64_t index : forest.ancestors(piece.first)) open_place(index);
    for (int64_t index = piece.first; index < piece.last; ++index) {
      leave(forest.places[index].start);
      open_place(index);
      for_queries(forest.places[index], [this](const Queries& q) { differentiate(q); });
    }
    leave(std::numeric_limits<int64_t>::max());
  }

 private:
  const TreeAttention& a;
  const Forest& forest;
  const Piece& piece;
  int64_t kv_head;
  float* shared;  // [2][positions that earlier pieces own][dim]: gradients of keys and values
  Buffers& b;
  int64_t group, slices;
  std::vector<int64_t> open;

  template <typename Function>
  void for_queries(const Place& p, Function function) {
    const int64_t count = (p.end - p.start) * group;
    for (int64_t row = 0; row < count; row += BLOCK) {
      Queries q = {std::min(BLOCK, count - row)};
      for (int64_t r = 0; r < q.count; ++r) {
        const int64_t offset = (row + r) / group;
        q.index[r] = (p.start + offset) * a.heads + kv_head * group + (row + r) % group;
        q.visible[r] = p.first + offset + 1;
      }
      q.panels = round_up(q.visible[q.count - 1], BLOCK) / BLOCK;
      function(q);
    }
  }

  void open_place(int64_t index) {
    enter(forest.places[index], true);
    open.push_back(index);
  }

  // Brings a span's keys and values to the path. What lies behind it in its last panel becomes zeros.
  void enter(const Place& p, bool gradients) {
    const int64_t end = p.first + p.end - p.start;
    for (int64_t position = p.first; position < end; ++position) b.tokens[position] = p.start + position - p.first;
    for (int64_t panel = p.first / BLOCK; panel * BLOCK < end; ++panel) {
      const Rows<bf16> keys = on_path(a.key, panel, end), values = on_path(a.value, panel, end);
      pack_right_transposed(keys, b.keys_right_transposed[panel * slices]);
      pack_right(values, b.values_right[panel * slices]);
      if (!gradients) continue;
      pack_right_transposed(values, b.values_right_transposed[panel * slices]);
      pack_right(keys, b.keys_right[panel * slices]);
      const __mmask32 fresh = p.first > panel * BLOCK ? ~__mmask32(0) << (p.first - panel * BLOCK) : ~__mmask32(0);
      clear_columns(b.d_keys[panel * slices], fresh);
      clear_columns(b.d_values[panel * slices], fresh);
    }
  }

  // A panel of the path up to position `end`, from [tokens, kv_heads dim].
  Rows<bf16> on_path(const bf16* matrix, int64_t panel, int64_t end) const {
    Rows<bf16> rows;
    rows.width = a.dim;
    for (int64_t i = 0; i < std::min(BLOCK, end - panel * BLOCK); ++i)
      rows.row[i] = matrix + (b.tokens[panel * BLOCK + i] * a.kv_heads + kv_head) * a.dim;
    return rows;
  }

  void clear_columns(float* sums, __mmask32 columns) {
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t row = 0; row < slices * BLOCK; ++row) {
      _mm512_mask_storeu_ps(sums + row * BLOCK, __mmask16(columns), zero);
      _mm512_mask_storeu_ps(sums + row * BLOCK + TILE, __mmask16(columns >> TILE), zero);
    }
  }

  // Spans whose subtree ends before `start` give away the sums of their gradients.
  void leave(int64_t start) {
    for (; !open.empty() && forest.places[open.back()].subtree_end <= start; open.pop_back()) {
      const Place& p = forest.places[open.back()];
      const bool own = open.back() >= piece.first;
      const int64_t token = p.start - p.first, stride = own ? a.kv_heads * a.dim : a.dim;  // a token further on
      float* d_key = own ? a.d_key + (token * a.kv_heads + kv_head) * a.dim : shared;
      float* d_value = own ? a.d_value + (token * a.kv_heads + kv_head) * a.dim : shared + piece.shared * a.dim;
      give_away(p, b.d_keys, a.scale, d_key, stride);
      give_away(p, b.d_values, 1, d_value, stride);
    }
  }

  // Takes the sums of a place's positions to rows `stride` apart; `to` is the row of position 0.
  void give_away(const Place& p, Blocks<float>& sums, float factor, float* to, int64_t stride) {
    const int64_t end = p.first + p.end - p.start;
    for (int64_t position = p.first / TILE * TILE; position < end; position += TILE)
      for (int64_t d = 0; d < a.dim; d += TILE) {
        const float* from = sums[position / BLOCK * slices] + d * BLOCK + position % BLOCK;
        Dwords dwords;
        for (int64_t i = 0; i < TILE; ++i)
          dwords.row[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from + i * BLOCK), _mm512_set1_ps(factor)));
        transpose(dwords);
        for (int64_t i = std::max(p.first - position, int64_t(0)); i < std::min(TILE, end - position); ++i)
          _mm512_storeu_si512(to + (position + i) * stride + d, dwords.row[i]);
      }
  }

  template <typename T>
  Rows<T> rows_of(const Queries& q, const T* matrix) const {
    Rows<T> rows;
    rows.width = a.dim;
    for (int64_t r = 0; r < q.count; ++r) rows.row[r] = matrix + q.index[r] * a.dim;
    return rows;
  }

  // scores of one panel, not scaled yet
  void multiply_by_panel(const Queries& q, Blocks<bf16>& left, Blocks<bf16>& right, int64_t panel, float* sums) {
    multiply_blocks<false>(left[0], 1, right[panel * slices], 1, slices, q.count, sums);
  }

  void attend(const Queries& q) {
    pack_left(rows_of(q, a.query), b.queries[0]);
    __m512 tops[BLOCK], totals[BLOCK];
    for (int64_t r = 0; r < q.count; ++r) tops[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      multiply_by_panel(q, b.queries, b.keys_right_transposed, panel, b.scores[panel]);
      raise_tops(q, panel, tops);
    }
    float highest[BLOCK];
    for (int64_t r = 0; r < q.count; ++r) {
      highest[r] = _mm512_reduce_max_ps(tops[r]);
      totals[r] = _mm512_setzero_ps();
    }
    for (int64_t panel = 0; panel < q.panels; ++panel) weigh(q, panel, highest, totals);
    float inverse[BLOCK];
    for (int64_t r = 0; r < q.count; ++r) {
      const float total = _mm512_reduce_add_ps(totals[r]);
      a.sums[q.index[r]] = highest[r] + std::log(total);
      inverse[r] = 1.0f / total;
    }
    for (int64_t slice = 0; slice < slices; ++slice) {
      float* sums = b.sums[0];
      multiply_blocks<false>(b.weights_left[0], 1, b.values_right[slice], slices, q.panels, q.count, sums);
      for (int64_t r = 0; r < q.count; ++r) {
        const int64_t token = q.index[r] / a.heads, head = q.index[r] % a.heads;
        bf16* to = a.out + token * a.out_stride + head * a.dim + slice * BLOCK;
        for (int64_t d = 0; d < std::min(BLOCK, a.dim - slice * BLOCK); d += TILE)
          store16(to + d, _mm512_mul_ps(_mm512_loadu_ps(sums + r * BLOCK + d), _mm512_set1_ps(inverse[r])), 0xFFFF);
      }
    }
  }

  // Scales the scores of a panel and keeps the highest that each row sees.
  void raise_tops(const Queries& q, int64_t panel, __m512* tops) {
    const __m512 scale = _mm512_set1_ps(a.scale);
    for (int64_t r = 0; r < q.count; ++r)
      for (int64_t i = 0; i < BLOCK; i += TILE) {
        float* at = b.scores[panel] + r * BLOCK + i;
        const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(at), scale);
        _mm512_storeu_ps(at, score);
        tops[r] = _mm512_mask_max_ps(tops[r], first_lanes(q.visible[r] - panel * BLOCK - i), tops[r], score);
      }
  }

  // Scores of a panel -> weights exp(score - highest), rounded, zero where nothing is seen; and their fp32 sums.
  void weigh(const Queries& q, int64_t panel, const float* highest, __m512* totals) {
    for (int64_t r = 0; r < q.count; ++r) {
      __m512 weight[2];
      for (int64_t half = 0; half < 2; ++half) {
        const __m512 score = _mm512_loadu_ps(b.scores[panel] + r * BLOCK + half * TILE);
        const __m512 shifted = _mm512_sub_ps(score, _mm512_set1_ps(highest[r]));
        const __mmask16 seen = first_lanes(q.visible[r] - panel * BLOCK - half * TILE);
        weight[half] = _mm512_maskz_mov_ps(seen, exponential(shifted));
        totals[r] = _mm512_add_ps(totals[r], weight[half]);
      }
      _mm512_storeu_si512(b.weights_left[panel] + r * BLOCK, to_bf16(weight[0], weight[1]));
    }
  }

  void differentiate(const Queries& q) {
    const Rows<bf16> queries = rows_of(q, a.query);
    const Rows<float> d_out = rows_of(q, a.d_out);
    pack_left(queries, b.queries[0]);
    pack_left(d_out, b.d_out[0]);
    pack_left_transposed(queries, b.queries_left_transposed[0]);
    pack_left_transposed(d_out, b.d_out_left_transposed[0]);
    __m512 dots[BLOCK];
    for (__m512& dot : dots) dot = _mm512_setzero_ps();
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      multiply_by_panel(q, b.queries, b.keys_right_transposed, panel, b.scores[panel]);
      multiply_by_panel(q, b.d_out, b.values_right_transposed, panel, b.d_scores[panel]);
      weigh_again(q, panel, dots);
    }
    float means[BLOCK];
    for (int64_t r = 0; r < BLOCK; ++r) means[r] = _mm512_reduce_add_ps(dots[r]);
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      differentiate_scores(panel, means);
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t at = panel * slices + slice;
        multiply_blocks<true>(b.d_out_left_transposed[slice], 1, b.weights_right[0], 1, 1, a.dim - slice * BLOCK,
                              b.d_values[at]);
        multiply_blocks<true>(b.queries_left_transposed[slice], 1, b.d_scores_right[0], 1, 1, a.dim - slice * BLOCK,
                              b.d_keys[at]);
      }
    }
    for (int64_t slice = 0; slice < slices; ++slice) {
      float* sums = b.sums[0];
      multiply_blocks<false>(b.weights_left[0], 1, b.keys_right[slice], slices, q.panels, q.count, sums);
      for (int64_t r = 0; r < q.count; ++r)
        for (int64_t d = 0; d < std::min(BLOCK, a.dim - slice * BLOCK); d += TILE)
          _mm512_storeu_ps(a.d_query + q.index[r] * a.dim + slice * BLOCK + d,
                           _mm512_mul_ps(_mm512_loadu_ps(sums + r * BLOCK + d), _mm512_set1_ps(a.scale)));
    }
  }

  // Scores -> probabilities p; and sums of p d_p. Such a sum equals d_out . out, but the output is rounded, and where
  // values have much in common it would not cancel.
  void weigh_again(const Queries& q, int64_t panel, __m512* dots) {
    float *scores = b.scores[panel], *d_scores = b.d_scores[panel];
    const __m512 scale = _mm512_set1_ps(a.scale);
    for (int64_t r = 0; r < q.count; ++r) {
      const __m512 log_sum = _mm512_set1_ps(a.sums[q.index[r]]);
      for (int64_t i = 0; i < BLOCK; i += TILE) {
        const int64_t at = r * BLOCK + i;
        const __m512 shifted = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), scale, log_sum);
        const __mmask16 seen = first_lanes(q.visible[r] - panel * BLOCK - i);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(shifted));
        dots[r] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(d_scores + at), dots[r]);
        _mm512_storeu_ps(scores + at, weight);
      }
    }
    for (int64_t at = q.count * BLOCK; at < BLOCK_NUMBERS; at += TILE) {
      _mm512_storeu_ps(scores + at, _mm512_setzero_ps());
      _mm512_storeu_ps(d_scores + at, _mm512_setzero_ps());
    }
  }

  // d_scores = p (d_p - sum of p d_p) of a panel; rounds both to factors.
  void differentiate_scores(int64_t panel, const float* means) {
    const float *scores = b.scores[panel], *d_scores = b.d_scores[panel];
    bf16 *left = b.weights_left[panel], *right = b.weights_right[0], *d_right = b.d_scores_right[0];
    for (int64_t pair = 0; pair < TILE; ++pair) {
      __m512 weight[2][2], slope[2][2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t r = 2 * pair + i;
        const __m512 mean = _mm512_set1_ps(means[r]);
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t at = r * BLOCK + half * TILE;
          weight[i][half] = _mm512_loadu_ps(scores + at);
          slope[i][half] = _mm512_mul_ps(weight[i][half], _mm512_sub_ps(_mm512_loadu_ps(d_scores + at), mean));
        }
        _mm512_storeu_si512(left + r * BLOCK, to_bf16(slope[i][0], slope[i][1]));
      }
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = half * TILE * BLOCK + pair * BLOCK;
        _mm512_storeu_si512(right + at, to_bf16_pairs(weight[0][half], weight[1][half]));
        _mm512_storeu_si512(d_right + at, to_bf16_pairs(slope[0][half], slope[1][half]));
      }
    }
  }
};

// Gradients that pieces have of the spans of earlier pieces.
class Shared {
 public:
  Shared(const TreeAttention& a, const Forest& forest) : a(a), forest(forest) {
    int64_t size = 0;
    for (const Piece& piece : forest.pieces) {
      offsets.push_back(size);
      size += 2 * piece.shared * a.dim * a.kv_heads;
    }
    memory.resize(size);
  }

  float* of(int64_t piece, int64_t kv_head) {
    return memory.data() + offsets[piece] + 2 * forest.pieces[piece].shared * a.dim * kv_head;
  }

  // In the order of pieces, so that sums are the same in every run.
  void add(int64_t kv_head) {
    for (size_t i = 0; i < forest.pieces.size(); ++i) {
      const float *d_keys = of(i, kv_head), *d_values = d_keys + forest.pieces[i].shared * a.dim;
      for (int64_t index : forest.ancestors(forest.pieces[i].first)) {
        const Place& p = forest.places[index];
        for (int64_t token = p.start; token < p.end; ++token) {
          const int64_t from = (p.first + token - p.start) * a.dim, to = (token * a.kv_heads + kv_head) * a.dim;
          for (int64_t d = 0; d < a.dim; ++d) {
            a.d_key[to + d] += d_keys[from + d];
            a.d_value[to + d] += d_values[from + d];
          }
        }
      }
    }
  }

 private:
  const TreeAttention& a;
  const Forest& forest;
  std::vector<float> memory;
  std::vector<int64_t> offsets;
};

template <typename Function>
void for_tasks(const TreeAttention& a, int threads, Function function) {
}

Forest forest_of(const TreeAttention& a) {
  return Forest(a.spans, a.span_count, (TASKS + a.kv_heads - 1) / a.kv_heads);
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

void graft_tree_attention(const TreeAttention* a, int32_t threads) {
  const Forest forest = forest_of(*a);
  const int64_t tasks = forest.pieces.size() * a->kv_heads;
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
    const TileUse tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task)
      Walk(*a, forest, forest.pieces[task / a->kv_heads], task % a->kv_heads, nullptr, buffers).forward();
  }
}

void graft_tree_attention_gradient(const TreeAttention* a, int32_t threads) {
  const Forest forest = forest_of(*a);
  Shared shared(*a, forest);
  const int64_t tasks = forest.pieces.size() * a->kv_heads;
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
    const TileUse tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t piece = task / a->kv_heads, kv_head = task % a->kv_heads;
      Walk(*a, forest, forest.pieces[piece], kv_head, shared.of(piece, kv_head), buffers).backward();
    }
#pragma omp for
    for (int64_t kv_head = 0; kv_head < a->kv_heads; ++kv_head) shared.add(kv_head);
  }
}
}
