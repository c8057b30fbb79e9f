// The three engines that multiply with packed weights: AMX tiles, AVX-512 bf16, AVX-512 fp32.
//
// Each output element is one chain of sums along k in one thread, so it depends neither on the other rows
// nor on the number of threads.

#include "gemm.h"

#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "tiles.h"
#include "vector.h"

namespace graft {
namespace {

// Rows of x, and numbers of each, that stay in the second-level cache while panels pass by.
constexpr int64_t CHUNK_ROWS = 256;
constexpr int64_t CHUNK_K = 2048;

// A product restricted to the inner numbers first_k .. first_k + k of the packed weights.
struct Slice : Product {
  int64_t first_k;
  int64_t panel_stride;  // elements of a whole panel
};

// Takes one block [rows][PANEL] of sums to its place.
void finish(const Product& p, const float* sums, int64_t row, int64_t rows, int64_t panel) {
  const int64_t column = panel * PANEL;
  const bool gate = p.epilogue == GATE_FP32 || p.epilogue == GATE_BF16;
  const __mmask16 low = first_lanes(p.n - column), high = first_lanes(p.n - column - TILE);
  __m512 bias_low = _mm512_setzero_ps(), bias_high = _mm512_setzero_ps();
  if (p.bias) {
    bias_low = _mm512_maskz_loadu_ps(low, p.bias + column);
    bias_high = _mm512_maskz_loadu_ps(high, p.bias + column + TILE);
  }
  const int64_t first = (row * p.out_stride) + (gate ? column / 2 : column);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 a = _mm512_add_ps(_mm512_loadu_ps(sums + r * PANEL), bias_low);
    const __m512 b = _mm512_add_ps(_mm512_loadu_ps(sums + r * PANEL + TILE), bias_high);
    const int64_t at = first + r * p.out_stride;
    float* out = static_cast<float*>(p.out) + at;
    bf16* half = static_cast<bf16*>(p.out) + at;
    switch (p.epilogue) {
      case STORE_FP32:
        store16(out, a, low);
        store16(out + TILE, b, high);
        break;
      case STORE_BF16:
        store16(half, a, low);
        store16(half + TILE, b, high);
        break;
      case ADD_FP32:
        store16(out, _mm512_add_ps(a, load16(out, low)), low);
        store16(out + TILE, _mm512_add_ps(b, load16(out + TILE, high)), high);
        break;
      case GATE_FP32:
        store16(out, _mm512_mul_ps(silu(a), b), 0xFFFF);
        break;
      default:  // GATE_BF16
        store16(half, _mm512_mul_ps(silu(a), b), 0xFFFF);
    }
  }
}

#ifdef __AMX_BF16__
// How far ahead of its use weights are called from memory; anything from 8 to 24 KiB does as well.
constexpr int64_t AHEAD_BYTES = 16 << 10;

template <int ROW_TILES>
void amx_block(const Slice& p, int64_t row, const bf16* panel, bool first_pass, float* sums) {
  const bf16* x = static_cast<const bf16*>(p.x) + row * p.x_stride;
  const int64_t steps = round_up(p.k, K_STEP) / K_STEP;
  const TileFactors factors = {x, p.x_stride, K_STEP, panel, STEP_ELEMENTS, steps};
  multiply_tiles<ROW_TILES, false>(factors, sums, [first_pass](const bf16* block) {
    if (!first_pass) return;
    const char* ahead = reinterpret_cast<const char*>(block) + AHEAD_BYTES;
    for (int64_t line = 0; line < STEP_ELEMENTS * 2; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T1);
  });
}

void amx_panel(const Slice& p, int64_t begin, int64_t end, int64_t panel) {
  alignas(64) float sums[2 * TILE * PANEL];
  const bf16* weights = static_cast<const bf16*>(p.weights) + panel * p.panel_stride + p.first_k * PANEL;
  for (int64_t row = begin; row < end; row += 2 * TILE) {
    if (end - row > TILE)
      amx_block<2>(p, row, weights, row == begin, sums);
    else
      amx_block<1>(p, row, weights, row == begin, sums);
    finish(p, sums, row, std::min(end - row, 2 * TILE), panel);
  }
}
#endif

template <int ROWS>
void fp32_block(const Slice& p, int64_t row, int64_t panel, float* sums) {
  const float* weights = static_cast<const float*>(p.weights) + panel * p.panel_stride + p.first_k * PANEL;
  const float* x = static_cast<const float*>(p.x) + row * p.x_stride;
  __m512 low[ROWS], high[ROWS];
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.k; ++k, weights += PANEL) {
    const __m512 a = _mm512_loadu_ps(weights), b = _mm512_loadu_ps(weights + TILE);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const __m512 value = _mm512_set1_ps(x[r * p.x_stride + k]);
      low[r] = _mm512_fmadd_ps(value, a, low[r]);
      high[r] = _mm512_fmadd_ps(value, b, high[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(sums + r * PANEL, low[r]);
    _mm512_storeu_ps(sums + r * PANEL + TILE, high[r]);
  }
}

#ifdef __AVX512BF16__
template <int ROWS>
void bf16_block(const Slice& p, int64_t row, int64_t panel, float* sums) {
  const bf16* weights = static_cast<const bf16*>(p.weights) + panel * p.panel_stride + p.first_k * PANEL;
  const bf16* x = static_cast<const bf16*>(p.x) + row * p.x_stride;
  const int64_t steps = round_up(p.k, K_STEP) / K_STEP;
  __m512 low[ROWS], high[ROWS];
  for (int r = 0; r < ROWS; ++r) low[r] = high[r] = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; ++step, weights += STEP_ELEMENTS) {
    for (int64_t pair = 0; pair < K_STEP / 2; ++pair) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(weights + pair * 2 * TILE);
      const __m512bh b = (__m512bh)_mm512_loadu_si512(weights + STEP_ELEMENTS / 2 + pair * 2 * TILE);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r) {
        int32_t two;
        std::memcpy(&two, x + r * p.x_stride + step * K_STEP + pair * 2, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
        low[r] = _mm512_dpbf16_ps(low[r], value, a);
        high[r] = _mm512_dpbf16_ps(high[r], value, b);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(sums + r * PANEL, low[r]);
    _mm512_storeu_ps(sums + r * PANEL + TILE, high[r]);
  }
}
#endif

// 12 rows of two vectors are 24 accumulators: with two vectors of weights they fill the register file.
constexpr int64_t VECTOR_ROWS = 12;
using Block = void (*)(const Slice&, int64_t, int64_t, float*);
#define GRAFT_BLOCKS(name) \
  {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, name<7>, name<8>, name<9>, name<10>, name<11>, name<12>}
constexpr Block FP32_BLOCKS[VECTOR_ROWS] = GRAFT_BLOCKS(fp32_block);
#ifdef __AVX512BF16__
constexpr Block BF16_BLOCKS[VECTOR_ROWS] = GRAFT_BLOCKS(bf16_block);
#endif

void vector_panel(const Slice& p, const Block* blocks, int64_t begin, int64_t end, int64_t panel) {
  float sums[VECTOR_ROWS * PANEL];
  for (int64_t row = begin; row < end; row += VECTOR_ROWS) {
    const int64_t rows = std::min(end - row, VECTOR_ROWS);
    blocks[rows - 1](p, row, panel, sums);
    finish(p, sums, row, rows, panel);
  }
}

void multiply_slice(Engine engine, const Slice& p, int64_t begin, int64_t end, int64_t panel) {
  if (engine == FP32) vector_panel(p, FP32_BLOCKS, begin, end, panel);
#ifdef __AVX512BF16__
  if (engine == BF16) vector_panel(p, BF16_BLOCKS, begin, end, panel);
#endif
#ifdef __AMX_BF16__
  if (engine == AMX) amx_panel(p, begin, end, panel);
#endif
}

void multiply(Engine engine, const Product& product, int threads) {
  const int64_t panels = (product.n + PANEL - 1) / PANEL, chunks = (product.m + CHUNK_ROWS - 1) / CHUNK_ROWS;
  // Sums over a long inner dimension are taken in pieces where `out` can hold them in between. How many
  // depends on k alone, so that a row's result does not depend on the other rows.
  const bool fp32_out = product.epilogue == STORE_FP32 || product.epilogue == ADD_FP32;
  const int64_t longest = fp32_out ? CHUNK_K : product.k, element = engine == FP32 ? 4 : 2;
  const int64_t pieces = std::max<int64_t>((product.k + longest - 1) / longest, 1), tasks = panels * chunks;
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), last = tasks * (me + 1) / team;
#ifdef __AMX_BF16__
    if (engine == AMX) _tile_loadconfig(&TILE_CONFIG);
#endif
    for (int64_t first = tasks * me / team; first < last;) {
      // This thread's panels of one chunk of rows.
      const int64_t begin = first / panels * CHUNK_ROWS, end = std::min(begin + CHUNK_ROWS, product.m);
      const int64_t stop = std::min(last, (first / panels + 1) * panels);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        Slice slice{product, piece * longest, panel_elements(engine, product.k)};
        slice.x = static_cast<const char*>(product.x) + slice.first_k * element;
        slice.k = std::min(product.k - slice.first_k, longest);
        if (piece) {
          slice.epilogue = ADD_FP32;
          slice.bias = nullptr;
        }
        for (int64_t task = first; task < stop; ++task) multiply_slice(engine, slice, begin, end, task % panels);
      }
      first = stop;
    }
#ifdef __AMX_BF16__
    if (engine == AMX) _tile_release();
#endif
  }
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

// Bit e is set when engine e can be used. Asks Linux for the use of AMX tiles.
int32_t graft_engines() {
  int32_t engines = 1 << FP32;
#ifdef __AVX512BF16__
  engines |= 1 << BF16;
#endif
#ifdef __AMX_BF16__
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0) engines |= 1 << AMX;
#endif
  return engines;
}

void graft_gemm(int32_t engine, const Product* product, int32_t threads) {
  multiply(Engine(engine), *product, threads);
}

// Large pages halve the misses of address translation when weights stream from memory.
void graft_advise_huge_pages(void* memory, int64_t bytes) {
  const uintptr_t page = 2 << 20, begin = round_up(reinterpret_cast<uintptr_t>(memory), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
}
