// What stands between the matrix products of a training step: RMS norm, gated activation, softmax over blocks of the
// vocabulary, and their gradients.
//
// Sums over rows are taken in pieces of fixed size, so that no result depends on the number of threads.

#include <omp.h>

#include <cmath>
#include <vector>

#include "gemm.h"
#include "vector.h"

namespace graft {
namespace {

constexpr int64_t PIECE_ROWS = 64;

void norm_row(const float* x, const float* weight, int64_t width, float epsilon, float* out, float* scale) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += TILE) {
    const __m512 value = load16(x + i, first_lanes(width - i));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  *scale = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(width) + epsilon);
  for (int64_t i = 0; i < width; i += TILE) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 normal = _mm512_mul_ps(load16(x + i, lanes), _mm512_set1_ps(*scale));
    store16(out + i, _mm512_mul_ps(normal, load16(weight + i, lanes)), lanes);
  }
}

// With n = x scale and g = d_out weight: d_x = scale (g - n mean(g n)), d_weight += d_out n.
void norm_gradient_row(const float* d_out, const float* x, const float* weight, float scale, int64_t width,
                       float* d_x, float* d_weight) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 dot = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += TILE) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 gradient = load16(d_out + i, lanes), normal = _mm512_mul_ps(load16(x + i, lanes), factor);
    dot = _mm512_fmadd_ps(_mm512_mul_ps(gradient, load16(weight + i, lanes)), normal, dot);
    store16(d_weight + i, _mm512_fmadd_ps(gradient, normal, load16(d_weight + i, lanes)), lanes);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / float(width));
  for (int64_t i = 0; i < width; i += TILE) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 gradient = _mm512_mul_ps(load16(d_out + i, lanes), load16(weight + i, lanes));
    const __m512 normal = _mm512_mul_ps(load16(x + i, lanes), factor);
    store16(d_x + i, _mm512_mul_ps(factor, _mm512_fnmadd_ps(normal, mean, gradient)), lanes);
  }
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

// out [rows, width] = x scale weight with scale [rows] = 1 / sqrt(mean of squares + epsilon).
void graft_norm(const float* x, const float* weight, int64_t rows, int64_t width, float epsilon, float* out,
                float* scales, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    norm_row(x + row * width, weight, width, epsilon, out + row * width, scales + row);
}

void graft_norm_gradient(const float* d_out, const float* x, const float* weight, const float* scales,
                         int64_t rows, int64_t width, float* d_x, float* d_weight, int32_t threads) {
  const int64_t pieces = (rows + PIECE_ROWS - 1) / PIECE_ROWS;
  std::vector<float> sums(pieces * width, 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t row = piece * PIECE_ROWS; row < rows && row < (piece + 1) * PIECE_ROWS; ++row)
      norm_gradient_row(d_out + row * width, x + row * width, weight, scales[row], width, d_x + row * width,
                        sums.data() + piece * width);
  for (int64_t i = 0; i < width; ++i) {
    float total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * width + i];
    d_weight[i] = total;
  }
}

// hidden = silu(gate) up; all bf16 [rows, width], rows `stride` apart.
void graft_gate(const bf16* gate, const bf16* up, int64_t rows, int64_t width, int64_t stride, bf16* hidden,
                int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = row * stride; i < row * stride + width; i += TILE) {
      const __mmask16 lanes = first_lanes(row * stride + width - i);
      const __m512 g = load16(gate + i, lanes), activated = _mm512_mul_ps(g, sigmoid(g));
      store16(hidden + i, _mm512_mul_ps(activated, load16(up + i, lanes)), lanes);
    }
}

// From d_hidden fp32 [rows, width] with neighbouring rows: d_gate, d_up, and hidden once more, rows `out_stride` apart.
//   d_up = d_hidden silu(gate),  d_gate = d_hidden up s (1 + gate (1 - s)),  s = sigmoid(gate)
void graft_gate_gradient(const float* d_hidden, const bf16* gate, const bf16* up, int64_t rows, int64_t width,
                         int64_t stride, bf16* d_gate, bf16* d_up, bf16* hidden, int64_t out_stride,
                         int32_t threads) {
  const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += TILE) {
      const __mmask16 lanes = first_lanes(width - i);
      const int64_t at = row * stride + i, to = row * out_stride + i;
      const __m512 g = load16(gate + at, lanes), u = load16(up + at, lanes);
      const __m512 d = load16(d_hidden + row * width + i, lanes), s = sigmoid(g), activated = _mm512_mul_ps(g, s);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
      store16(hidden + to, _mm512_mul_ps(activated, u), lanes);
      store16(d_up + to, _mm512_mul_ps(d, activated), lanes);
      store16(d_gate + to, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), lanes);
    }
}

// A softmax over blocks of the vocabulary, one block at a time. z = logits factor; state is [3][rows]:
//   top = max z,  total = sum exp(z - top),  weighted = sum exp(z - top) (z - top)
// over the columns so far. Writes z to the logits.
void graft_softmax_block(float* logits, int64_t rows, int64_t columns, float factor, float* state, int32_t threads) {
  float *tops = state, *totals = state + rows, *weighted = state + 2 * rows;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    float* at = logits + row * columns;
    __m512 top = _mm512_set1_ps(tops[row]);
    for (int64_t i = 0; i < columns; i += TILE) {
      const __mmask16 lanes = first_lanes(columns - i);
      const __m512 z = _mm512_mul_ps(load16(at + i, lanes), _mm512_set1_ps(factor));
      store16(at + i, z, lanes);
      top = _mm512_mask_max_ps(top, lanes, top, z);
    }
    const float highest = _mm512_reduce_max_ps(top);
    __m512 sum = _mm512_setzero_ps(), moment = _mm512_setzero_ps();
    for (int64_t i = 0; i < columns; i += TILE) {
      const __mmask16 lanes = first_lanes(columns - i);
      const __m512 shifted = _mm512_sub_ps(load16(at + i, lanes), _mm512_set1_ps(highest));
      const __m512 weight = _mm512_maskz_mov_ps(lanes, exponential(shifted));
      sum = _mm512_add_ps(sum, weight);
      moment = _mm512_mask3_fmadd_ps(weight, shifted, moment, lanes);
    }
    const float drop = tops[row] - highest, scale = std::exp(drop);  // of what was summed below the former top
    const float former = totals[row] == 0 ? 0 : scale * (weighted[row] + drop * totals[row]);
    totals[row] = scale * totals[row] + _mm512_reduce_add_ps(sum);
    weighted[row] = former + _mm512_reduce_add_ps(moment);
    tops[row] = highest;
  }
}

// d_logits [rows, columns] in bf16 from the logits and what is known of each row, with z = logits factor:
//   p = exp(z - log_sum),  d = factor (d_logprob (1[i = target] - p) - d_entropy p (z - log_sum + entropy))
// `facts` is [4][rows]: log_sum, entropy, d_logprob, d_entropy. Targets count from the block's first column.
void graft_softmax_gradient(const float* logits, int64_t rows, int64_t columns, float factor, const float* facts,
                            const int64_t* targets, int64_t first, bf16* out, int64_t out_stride, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const __m512 log_sum = _mm512_set1_ps(facts[row]), entropy = _mm512_set1_ps(facts[rows + row]);
    const float d_logprob = facts[2 * rows + row];
    const __m512 d_entropy = _mm512_set1_ps(facts[3 * rows + row]);
    const int64_t target = targets[row] - first;
    for (int64_t i = 0; i < columns; i += TILE) {
      const __mmask16 lanes = first_lanes(columns - i);
      const __m512 z = _mm512_mul_ps(load16(logits + row * columns + i, lanes), _mm512_set1_ps(factor));
      const __m512 log_p = _mm512_sub_ps(z, log_sum), p = exponential(log_p);
      // a token that could not be drawn: p = 0 and log p is huge, but finite
      __m512 slope = _mm512_fmadd_ps(d_entropy, _mm512_add_ps(log_p, entropy), _mm512_set1_ps(d_logprob));
      __m512 gradient = _mm512_fnmadd_ps(p, slope, _mm512_setzero_ps());
      if (target >= i && target < i + TILE)
        gradient = _mm512_mask_add_ps(gradient, __mmask16(1u << (target - i)), gradient, _mm512_set1_ps(d_logprob));
      store16(out + row * out_stride + i, _mm512_mul_ps(gradient, _mm512_set1_ps(factor)), lanes);
    }
  }
}
}
