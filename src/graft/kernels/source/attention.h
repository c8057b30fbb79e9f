// What attention over a packed row of trees takes and gives.
#pragma once

#include <cstdint>

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
  int64_t span_count;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;           // a multiple of 16
  float scale;
};

}  // namespace graft
