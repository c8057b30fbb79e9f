// Bringing matrices into the layouts that products take: packed weights and rows of bf16.

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "transpose.h"
#include "vector.h"

namespace graft {
namespace {

// Packs rows of W. Row r goes to column first + r / group * group_stride + r % group; others stay as they are.
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t k, const float* scale, Engine engine,
               void* to, int64_t first, int64_t group, int64_t group_stride, int threads) {
  const int64_t elements = panel_elements(engine, k), step = engine == FP32 ? TILE : K_STEP;
  const int64_t last = first + (rows - 1) / group * group_stride + (rows - 1) % group;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = first / TILE; block <= last / TILE; ++block) {
    const T* source[TILE];
    __mmask16 columns = 0;
    for (int64_t i = 0; i < TILE; ++i) {
      const int64_t column = block * TILE + i - first, inside = column % group_stride;
      const int64_t row = column / group_stride * group + inside;
      const bool ours = column >= 0 && inside < group && row < rows;
      source[i] = ours ? from + row * stride : nullptr;
      columns |= __mmask16(ours) << i;
    }
    const int64_t panel = block * TILE / PANEL * elements, half = block % (PANEL / TILE);
    for (int64_t at = 0; at < k; at += step) {
      Dwords tile;
      for (int64_t i = 0; i < TILE; ++i) {
        if (!source[i]) {
          tile.row[i] = _mm512_setzero_si512();
        } else if (engine == FP32) {
          const __mmask16 lanes = first_lanes(k - at);
          __m512 values = load16(source[i] + at, lanes);
          if (scale) values = _mm512_mul_ps(values, _mm512_maskz_loadu_ps(lanes, scale + at));
          tile.row[i] = _mm512_castps_si512(values);
        } else {
          tile.row[i] = load_bf16(source[i] + at, k - at, scale ? scale + at : nullptr);
        }
      }
      transpose(tile);
      if (engine == FP32) {
        float* place = static_cast<float*>(to) + panel + at * PANEL + half * TILE;
        for (int64_t i = 0; i < std::min(k - at, TILE); ++i)
          _mm512_mask_storeu_epi32(place + i * PANEL, columns, tile.row[i]);
      } else {
        bf16* place = static_cast<bf16*>(to) + panel + at * PANEL + half * (STEP_ELEMENTS / 2);
        for (int64_t i = 0; i < TILE; ++i) _mm512_mask_storeu_epi32(place + i * 2 * TILE, columns, tile.row[i]);
      }
    }
  }
}

// One block [16 pairs of rows][16 columns][2] of a matrix with `rows` rows.
template <typename T>
void load_block(Dwords& tile, const T* from, int64_t stride, int64_t rows, int64_t row, int64_t column,
                __mmask16 lanes) {
  for (int64_t i = 0; i < TILE; ++i) {
    const T* first = row + 2 * i < rows ? from + (row + 2 * i) * stride + column : nullptr;
    const T* second = row + 2 * i + 1 < rows ? from + (row + 2 * i + 1) * stride + column : nullptr;
    tile.row[i] = load_pairs(first, second, lanes);
  }
}

// Packs columns: `from` [k, n] becomes the packed W^T of x W, W = from. bf16 engines.
template <typename T>
void pack_columns(const T* from, int64_t stride, int64_t k, int64_t n, bf16* to, int threads) {
  const int64_t elements = panel_elements(BF16, k), steps = round_up(k, K_STEP) / K_STEP;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t column = 0; column < round_up(n, PANEL); column += TILE) {
      Dwords tile;
      load_block(tile, from, stride, k, step * K_STEP, column, first_lanes(n - column));
      bf16* place = to + column / PANEL * elements + step * STEP_ELEMENTS;
      place += column / TILE % (PANEL / TILE) * (STEP_ELEMENTS / 2);
      for (int64_t i = 0; i < TILE; ++i) _mm512_storeu_si512(place + i * 2 * TILE, tile.row[i]);
    }
}

// `from` [m, k] as bf16 rows with zeros up to the next step.
template <typename T>
void round_rows(const T* from, int64_t stride, int64_t m, int64_t k, bf16* to, int64_t to_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < m; ++row)
    for (int64_t at = 0; at < k; at += K_STEP)
      _mm512_storeu_si512(to + row * to_stride + at, load_bf16(from + row * stride + at, k - at, nullptr));
}

// `from` [k, m] transposed to bf16 rows [m, k] with zeros up to the next step.
template <typename T>
void transpose_rows(const T* from, int64_t stride, int64_t k, int64_t m, bf16* to, int64_t to_stride, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t column = 0; column < m; column += TILE)
    for (int64_t at = 0; at < k; at += K_STEP) {
      Dwords tile;
      load_block(tile, from, stride, k, at, column, first_lanes(m - column));
      transpose(tile);
      for (int64_t i = 0; i < std::min(m - column, TILE); ++i)
        _mm512_storeu_si512(to + (column + i) * to_stride + at, tile.row[i]);
    }
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

int64_t graft_packed_bytes(int32_t engine, int64_t n, int64_t k) {
  return round_up(n, PANEL) / PANEL * panel_elements(Engine(engine), k) * (engine == FP32 ? 4 : 2);
}

// `from` [rows, k] is bf16 or fp32; `scale` [k] multiplies each row, or is null.
void graft_pack_rows(int32_t engine, int32_t from_is_bf16, const void* from, int64_t stride, int64_t rows,
                     int64_t k, const float* scale, void* to, int64_t first, int64_t group, int64_t group_stride,
                     int32_t threads) {
  if (from_is_bf16)
    pack_rows(static_cast<const bf16*>(from), stride, rows, k, scale, Engine(engine), to, first, group,
              group_stride, threads);
  else
    pack_rows(static_cast<const float*>(from), stride, rows, k, scale, Engine(engine), to, first, group,
              group_stride, threads);
}

void graft_pack_columns(int32_t from_is_bf16, const void* from, int64_t stride, int64_t k, int64_t n, void* to,
                        int32_t threads) {
  if (from_is_bf16)
    pack_columns(static_cast<const bf16*>(from), stride, k, n, static_cast<bf16*>(to), threads);
  else
    pack_columns(static_cast<const float*>(from), stride, k, n, static_cast<bf16*>(to), threads);
}

void graft_round_rows(int32_t from_is_bf16, const void* from, int64_t stride, int64_t m, int64_t k, void* to,
                      int64_t to_stride, int32_t threads) {
  if (from_is_bf16)
    round_rows(static_cast<const bf16*>(from), stride, m, k, static_cast<bf16*>(to), to_stride, threads);
  else
    round_rows(static_cast<const float*>(from), stride, m, k, static_cast<bf16*>(to), to_stride, threads);
}

void graft_transpose_rows(int32_t from_is_bf16, const void* from, int64_t stride, int64_t k, int64_t m, void* to,
                          int64_t to_stride, int32_t threads) {
  if (from_is_bf16)
    transpose_rows(static_cast<const bf16*>(from), stride, k, m, static_cast<bf16*>(to), to_stride, threads);
  else
    transpose_rows(static_cast<const float*>(from), stride, k, m, static_cast<bf16*>(to), to_stride, threads);
}
}
