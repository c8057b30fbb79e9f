// Products on AMX tiles: bf16 factors, fp32 sums. Where the compiler has no AMX these are traps, and `graft_engines`
// does not offer it.
#pragma once

#include <immintrin.h>

#include "gemm.h"
#include "vector.h"

namespace graft {

// [rows][32 steps] times [32 steps][32 columns].
struct TileFactors {
  const bf16* left;    // row r, step s: 32 numbers at left + r row_stride + s left_step
  int64_t row_stride;
  int64_t left_step;
  const bf16* right;   // step s: packed as in gemm.h, at right + s right_step
  int64_t right_step;
  int64_t steps;
};

#ifdef __AMX_BF16__

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline const TileConfig TILE_CONFIG;

// While it lives, this thread's tiles are 16 rows of 64 bytes.
class TileUse {
 public:
  TileUse() { _tile_loadconfig(&TILE_CONFIG); }
  ~TileUse() { _tile_release(); }
};

// sums [16 ROW_TILES][32] = the product, or += with ADD. `each_step(right)` is called with every block of the right
// factor.
template <int ROW_TILES, bool ADD, typename Function>
inline void multiply_tiles(const TileFactors& f, float* sums, Function each_step) {
  const int64_t stride = f.row_stride * 2;
  if (ADD) {
    _tile_loadd(0, sums, PANEL * 4);
    _tile_loadd(1, sums + TILE, PANEL * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  if (ROW_TILES == 2) {
    if (ADD) {
      _tile_loadd(2, sums + TILE * PANEL, PANEL * 4);
      _tile_loadd(3, sums + TILE * PANEL + TILE, PANEL * 4);
    } else {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < f.steps; ++step) {
    const bf16 *left = f.left + step * f.left_step, *right = f.right + step * f.right_step;
    _tile_loadd(4, left, stride);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + STEP_ELEMENTS / 2, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (ROW_TILES == 2) {
      _tile_loadd(5, left + TILE * f.row_stride, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    each_step(right);
  }
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + TILE, PANEL * 4);
  if (ROW_TILES == 2) {
    _tile_stored(2, sums + TILE * PANEL, PANEL * 4);
    _tile_stored(3, sums + TILE * PANEL + TILE, PANEL * 4);
  }
}

#else

class TileUse {
 public:
  TileUse() { __builtin_trap(); }
};

template <int ROW_TILES, bool ADD, typename Function>
inline void multiply_tiles(const TileFactors&, float*, Function) {
  __builtin_trap();
}

#endif

}  // namespace graft
