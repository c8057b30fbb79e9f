// The path that a walk through a forest stands on: its keys and values as factors of tile products, and the sums of
// their gradients. Position p of the path lies in place p, whichever spans hold it.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "blocks.h"
#include "forest.h"

namespace graft {

// Stay from one walk to the next. Blocks are counted along positions ("panels", 32 each) and along the head's numbers
// ("slices", 32 each): [panel][slice].
struct PathBlocks {
  Blocks<bf16> keys_right, values_right;                        // inner dimension: positions
  Blocks<bf16> keys_right_transposed, values_right_transposed;  // inner dimension: the head's numbers
  Blocks<float> d_keys, d_values;                               // [32 numbers][32 positions]
  std::vector<int64_t> tokens;                                  // of each position
};

// Of one piece and one key/value head.
class Path {
 public:
  // `shared` takes the gradients of what earlier pieces own: [2][piece.shared][dim], keys and values.
  Path(const TreeAttention& attention, const Forest& forest, const Piece& piece, int64_t kv_head, float* shared,
       PathBlocks& blocks)
      : a(attention), forest(forest), piece(piece), kv_head(kv_head), shared(shared), b(blocks) {
    slices = round_up(a.dim, BLOCK) / BLOCK;
    const int64_t count = round_up(forest.longest, BLOCK) / BLOCK * slices;
    for (auto* factors : {&b.keys_right, &b.values_right, &b.keys_right_transposed, &b.values_right_transposed})
      factors->make_room(count);
    for (auto* sums : {&b.d_keys, &b.d_values}) sums->make_room(count);
    if (int64_t(b.tokens.size()) < forest.longest) b.tokens.resize(forest.longest);
  }

  // Brings a place's keys and values to the path. What lies behind it in its last panel becomes zeros.
  void enter(int64_t index, bool gradients) {
    if (gradients) open.push_back(index);
    const Place& p = forest.places[index];
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

  // Places whose subtree ends before `start` give away the sums of their gradients.
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

 private:
  const TreeAttention& a;
  const Forest& forest;
  const Piece& piece;
  int64_t kv_head, slices;
  float* shared;
  PathBlocks& b;
  std::vector<int64_t> open;  // places that have gradients to give away, from the root down

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
};

}  // namespace graft
