// What the decoding kernels are told; the ctypes mirrors are in graft/kernels/library.py.
#pragma once

#include <cstdint>

namespace graft {

// Keys and values live in blocks of 16 positions: [head_dim][16] keys, so that 16 scores are one vector, and
// behind them [16][head_dim padded to 16] values. A span is `capacity` blocks for each key/value head, one
// head after the other: a prefix's span, written once, or a slot's.
constexpr int64_t BLOCK = 16;

struct Attention {
  float* qkv;               // [rows, (heads + 2 kv_heads) head_dim]; queries are rotated in place
  int64_t qkv_stride;
  const float* cosines;     // [positions, head_dim / 2]
  const float* sines;
  void* cache;              // this layer's blocks
  void* out;                // [rows, heads head_dim], in the cache's type
  int64_t out_stride;
  int64_t rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  const int64_t* prefix_first;     // [rows] first block of the prefix's span
  const int64_t* prefix_capacity;  // [rows] blocks for each head in it
  const int64_t* prefix_length;    // [rows] positions in it that the row attends to
  const int64_t* own_first;        // [rows] the same for the span that the row writes to
  const int64_t* own_capacity;
  const int64_t* own_length;       // [rows] positions in it before the row's token
  const int64_t* position;         // [rows] the token's position in its sequence
  float scale;                     // of the scores
  int32_t bf16_cache;
};

}  // namespace graft
