// y = x W^T with packed weights.
//
// Packed weights are panels of 32 columns (rows of W), one after the other. bf16: a panel is a sequence of
// steps of 32 along k, each two blocks of 16 columns, each [16 pairs of k][16 columns][2], which is what one
// AMX tile and sixteen vdpbf16ps take. fp32: a panel is [k][32 columns]. Missing columns and the rest of the
// last step are zeros.
#pragma once

#include <cstdint>

namespace graft {

constexpr int64_t PANEL = 32;    // output columns that are computed together
constexpr int64_t TILE = 16;     // rows of a tile; columns of a vector
constexpr int64_t K_STEP = 32;   // bf16 numbers of the inner dimension in one tile row

enum Engine : int32_t { FP32 = 0, BF16 = 1, AMX = 2 };

enum Epilogue : int32_t {
  STORE_FP32 = 0,       // out = y + bias
  STORE_BF16 = 1,
  ADD_FP32 = 2,         // out += y + bias
  GATE_FP32 = 3,        // out = silu(gate) up, both halves of each panel of y + bias
  GATE_BF16 = 4,
};

struct Product {
  const void* x;        // [m, k], rows `x_stride` elements apart
  int64_t x_stride;
  int64_t m;
  const void* weights;  // packed, n columns
  int64_t n;
  int64_t k;
  const float* bias;    // [n] in packed order, or null
  void* out;            // [m, n]; [m, n / 2] after a gate
  int64_t out_stride;
  int32_t epilogue;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int64_t STEP_ELEMENTS = PANEL * K_STEP;  // of a bf16 panel

inline int64_t panel_elements(Engine engine, int64_t k) {
  return PANEL * (engine == FP32 ? k : round_up(k, K_STEP));
}

}  // namespace graft
