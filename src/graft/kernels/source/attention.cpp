// Attention over a packed row of trees for training: each token sees its own span up to itself and all of its
// ancestors. Forward, and the gradients from recomputed probabilities. Products are on AMX tiles: bf16 factors, so that
// probabilities and gradients of scores are rounded, as FlashAttention does, and fp32 sums; the softmax is fp32.
//
// One task is one piece of the row and one key/value head. It walks through its spans in row order, which is depth
// first, and keeps the keys and values of the path that it stands on. A span's keys are brought there once, whatever
// hangs below; the sums of their gradients leave when its subtree is done. What later pieces add to spans of earlier
// ones is added at the end, piece by piece. Pieces depend on the spans alone, so that results do not depend on the
// number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "path.h"

namespace graft {
namespace {

constexpr int64_t TASKS = 12;  // at least, of long rows: equal shares for 2, 3 and 4 threads

// Stay from one walk to the next. Panels and slices as in path.h.
struct Buffers {
  PathBlocks path;
  Blocks<float> scores, d_scores;  // [panel]: [32 queries][32 positions]
  Blocks<bf16> weights_left;       // [panel]: of scores, or of their gradients
  Blocks<bf16> queries, d_out, queries_left_transposed, d_out_left_transposed;  // [slice]
  Blocks<bf16> weights_right, d_scores_right;                                   // [1]: one panel's
  Blocks<float> sums;                                                           // [1]
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
      : a(attention), forest(forest), piece(piece), kv_head(kv_head), b(buffers),
        path(attention, forest, piece, kv_head, shared, buffers.path) {
    group = a.heads / a.kv_heads;
    slices = round_up(a.dim, BLOCK) / BLOCK;
    const int64_t panels = round_up(forest.longest, BLOCK) / BLOCK;
    for (auto* scores : {&b.scores, &b.d_scores}) scores->make_room(panels);
    b.weights_left.make_room(panels);
    for (auto* factors : {&b.queries, &b.d_out, &b.queries_left_transposed, &b.d_out_left_transposed})
      factors->make_room(slices);
    for (auto* factors : {&b.weights_right, &b.d_scores_right}) factors->make_room(1);
    b.sums.make_room(1);
  }

  void forward() {
    for (int64_t index : forest.ancestors(piece.first)) path.enter(index, false);
    for (int64_t index = piece.first; index < piece.last; ++index) {
      path.enter(index, false);
      for_queries(forest.places[index], [this](const Queries& q) { attend(q); });
    }
  }

  void backward() {
    for (int64_t index : forest.ancestors(piece.first)) path.enter(index, true);
    for (int64_t index = piece.first; index < piece.last; ++index) {
      path.leave(forest.places[index].start);
      path.enter(index, true);
      for_queries(forest.places[index], [this](const Queries& q) { differentiate(q); });
    }
    path.leave(std::numeric_limits<int64_t>::max());
  }

 private:
  const TreeAttention& a;
  const Forest& forest;
  const Piece& piece;
  int64_t kv_head, group, slices;
  Buffers& b;
  Path path;

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

  template <typename T>
  Rows<T> rows_of(const Queries& q, const T* matrix) const {
    Rows<T> rows;
    rows.width = a.dim;
    for (int64_t r = 0; r < q.count; ++r) rows.row[r] = matrix + q.index[r] * a.dim;
    return rows;
  }

  // sums [queries][32 positions] = left . right^T, for one panel
  void multiply_by_panel(const Queries& q, Blocks<bf16>& left, Blocks<bf16>& right, int64_t panel, float* sums) {
    multiply_blocks<false>(left[0], 1, right[panel * slices], 1, slices, q.count, sums);
  }

  void attend(const Queries& q) {
    pack_left(rows_of(q, a.query), b.queries[0]);
    __m512 tops[BLOCK], totals[BLOCK];
    for (int64_t r = 0; r < q.count; ++r) tops[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      multiply_by_panel(q, b.queries, b.path.keys_right_transposed, panel, b.scores[panel]);
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
    blend_path(q, b.path.values_right, inverse, [&](int64_t r) {
      return a.out + q.index[r] / a.heads * a.out_stride + q.index[r] % a.heads * a.dim;
    });
  }

  // place(r)[dim] = factors[r] times the sum over positions of weights and rows of a right factor.
  template <typename PlaceOf>
  void blend_path(const Queries& q, Blocks<bf16>& right, const float* factors, PlaceOf place) {
    float* sums = b.sums[0];
    for (int64_t slice = 0; slice < slices; ++slice) {
      multiply_blocks<false>(b.weights_left[0], 1, right[slice], slices, q.panels, q.count, sums);
      for (int64_t r = 0; r < q.count; ++r)
        for (int64_t d = 0; d < std::min(BLOCK, a.dim - slice * BLOCK); d += TILE) {
          const __m512 sum = _mm512_loadu_ps(sums + r * BLOCK + d);
          store16(place(r) + slice * BLOCK + d, _mm512_mul_ps(sum, _mm512_set1_ps(factors[r])), 0xFFFF);
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
      multiply_by_panel(q, b.queries, b.path.keys_right_transposed, panel, b.scores[panel]);
      multiply_by_panel(q, b.d_out, b.path.values_right_transposed, panel, b.d_scores[panel]);
      weigh_again(q, panel, dots);
    }
    float means[BLOCK], scales[BLOCK];
    for (int64_t r = 0; r < BLOCK; ++r) {
      means[r] = _mm512_reduce_add_ps(dots[r]);
      scales[r] = a.scale;
    }
    for (int64_t panel = 0; panel < q.panels; ++panel) {
      differentiate_scores(panel, means);
      add_to_panel(panel);
    }
    blend_path(q, b.path.keys_right, scales, [&](int64_t r) { return a.d_query + q.index[r] * a.dim; });
  }

  // d_values^T += d_out^T p and d_keys^T += queries^T d_scores for the positions of a panel.
  void add_to_panel(int64_t panel) {
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t at = panel * slices + slice, numbers = a.dim - slice * BLOCK;
      multiply_blocks<true>(b.d_out_left_transposed[slice], 1, b.weights_right[0], 1, 1, numbers, b.path.d_values[at]);
      multiply_blocks<true>(b.queries_left_transposed[slice], 1, b.d_scores_right[0], 1, 1, numbers,
                            b.path.d_keys[at]);
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
  Shared(const TreeAttention& a, const Forest& forest, std::vector<float>& memory)
      : a(a), forest(forest), memory(memory) {
    int64_t size = 0;
    for (const Piece& piece : forest.pieces) {
      offsets.push_back(size);
      size += 2 * piece.shared * a.dim * a.kv_heads;
    }
    if (int64_t(memory.size()) < size) memory.resize(size);
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
  std::vector<float>& memory;
  std::vector<int64_t> offsets;
};

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
  thread_local std::vector<float> memory;  // new pages at each call would cost a tenth
  Shared shared(*a, forest, memory);
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
