// The rotary embedding of queries and keys, and its gradient.

#include <omp.h>

#include "gemm.h"
#include "vector.h"

using namespace graft;

extern "C" {

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
