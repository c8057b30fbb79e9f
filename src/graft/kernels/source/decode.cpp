// Everything between the matrix products of a decoding step: norm, rotary embedding, attention, sampling.
//
// Each row (and head) is computed by one thread in one order, whatever the other rows are.

#include "decode.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "vector.h"

namespace graft {
namespace {

template <typename T>
void rms_norm(const float* x, int64_t rows, int64_t width, float epsilon, T* out, int64_t out_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += TILE) {
      const __m512 value = load16(from + i, first_lanes(width - i));
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(width) + epsilon);
    for (int64_t i = 0; i < width; i += TILE) {
      const __mmask16 lanes = first_lanes(width - i);
      const __m512 value = _mm512_mul_ps(load16(from + i, lanes), _mm512_set1_ps(inverse));
      store16(out + row * out_stride + i, value, lanes);
    }
  }
}

int64_t block_elements(const Attention& a) { return BLOCK * (a.head_dim + round_up(a.head_dim, TILE)); }

// What one row and key/value head reads of a prefix or of its own slot.
template <typename T>
struct Span {
  T* blocks;
  int64_t length;  // positions
};

template <typename T>
Span<T> prefix_span(const Attention& a, int64_t row, int64_t head) {
  const int64_t block = a.prefix_first[row] * a.kv_heads + head * a.prefix_capacity[row];
  return {static_cast<T*>(a.cache) + block * block_elements(a), a.prefix_length[row]};
}

template <typename T>
Span<T> own_span(const Attention& a, int64_t row, int64_t head) {
  const int64_t block = a.own_first[row] * a.kv_heads + head * a.own_capacity[row];
  return {static_cast<T*>(a.cache) + block * block_elements(a), a.own_length[row] + 1};
}

// Calls for memory that is needed soon, a few lines at a time: all at once would hold up the loads between.
struct Fetch {
  const char* at;
  const char* end;

  void lines(int64_t count) {
    for (int64_t i = 0; i < count && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

// Rotates the row's queries and keys, and writes its keys and values to its own span.
template <typename T>
void enter(const Attention& a, int64_t row) {
  float* query = a.qkv + row * a.qkv_stride;
  float* key = query + a.heads * a.head_dim;
  const float* value = key + a.kv_heads * a.head_dim;
  const int64_t half = a.head_dim / 2, width = round_up(a.head_dim, TILE), at = a.own_length[row];
  const float *cosines = a.cosines + a.position[row] * half, *sines = a.sines + a.position[row] * half;
  for (int64_t head = 0; head < a.heads + a.kv_heads; ++head)
    rotate(query + head * a.head_dim, cosines, sines, half);
  for (int64_t i = 0; i < a.heads * a.head_dim; ++i) query[i] *= a.scale;
  for (int64_t head = 0; head < a.kv_heads; ++head, key += a.head_dim, value += a.head_dim) {
    T* block = own_span<T>(a, row, head).blocks + at / BLOCK * block_elements(a);
    T *keys = block + at % BLOCK, *values = block + BLOCK * a.head_dim + at % BLOCK * width;
    for (int64_t d = 0; d < a.head_dim; d += TILE) {
      alignas(64) T numbers[TILE];
      store16(numbers, load16(key + d, first_lanes(a.head_dim - d)), 0xFFFF);
      for (int64_t i = 0; i < std::min(a.head_dim - d, TILE); ++i) keys[(d + i) * BLOCK] = numbers[i];
      store16(values + d, load16(value + d, first_lanes(a.head_dim - d)), 0xFFFF);
    }
  }
}

// scores[h][0..length) = queries[h] . keys, in blocks of 16; the lanes past the length become -infinity.
template <typename T, int HEADS>
void score(const Attention& a, const Span<T>& span, const float* queries, float* scores, int64_t stride,
           Fetch& fetch) {
  const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const T* keys = span.blocks;
  for (int64_t at = 0; at < span.length; at += BLOCK, keys += block_elements(a)) {
    fetch.lines(16);
    __m512 even[HEADS], odd[HEADS];
    for (int h = 0; h < HEADS; ++h) even[h] = odd[h] = _mm512_setzero_ps();
    for (int64_t d = 0; d < a.head_dim; d += 2) {
      const __m512 first = load16(keys + d * BLOCK), second = load16(keys + (d + 1) * BLOCK);
      for (int h = 0; h < HEADS; ++h) {
        even[h] = _mm512_fmadd_ps(_mm512_set1_ps(queries[h * a.head_dim + d]), first, even[h]);
        odd[h] = _mm512_fmadd_ps(_mm512_set1_ps(queries[h * a.head_dim + d + 1]), second, odd[h]);
      }
    }
    const __mmask16 lanes = first_lanes(span.length - at);
    for (int h = 0; h < HEADS; ++h)
      _mm512_storeu_ps(scores + h * stride + at, _mm512_mask_add_ps(never, lanes, even[h], odd[h]));
  }
}

// sums[h] += weights[h] . values, for up to four vectors of the head's width, from number `first` on.
template <typename T, int HEADS, int VECTORS>
void blend(const Attention& a, const Span<T>& span, const float* weights, int64_t stride, int64_t first,
           __m512 (&sums)[HEADS][VECTORS], Fetch& fetch) {
  const int64_t width = round_up(a.head_dim, TILE);
  __m512 local[HEADS][VECTORS];  // in registers: the compiler must assume that stores to `sums` can be seen
  for (int h = 0; h < HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) local[h][v] = sums[h][v];
  const T* values = span.blocks + BLOCK * a.head_dim + first;
  for (int64_t block = 0; block < span.length; block += BLOCK, values += block_elements(a)) {
    fetch.lines(16);
    const int64_t count = std::min(span.length - block, BLOCK);
    for (int64_t i = 0; i < count; ++i) {
      __m512 value[VECTORS];
      for (int v = 0; v < VECTORS; ++v) value[v] = load16(values + i * width + v * TILE);
      for (int h = 0; h < HEADS; ++h) {
        const __m512 weight = _mm512_set1_ps(weights[h * stride + block + i]);
        for (int v = 0; v < VECTORS; ++v) local[h][v] = _mm512_fmadd_ps(weight, value[v], local[h][v]);
      }
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) sums[h][v] = local[h][v];
}

// Turns scores into probabilities without their common factor; returns 1 / their sum.
float soften(float* scores, int64_t count) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += TILE) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += TILE) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top));
    _mm512_storeu_ps(scores + i, weight);
    sum = _mm512_add_ps(sum, weight);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

template <typename T, int HEADS, int VECTORS>
void blend_and_store(const Attention& a, const Span<T> (&spans)[2], const float* weights, int64_t stride,
                     const float* inverse, int64_t first, T* out, Fetch& fetch) {
  __m512 sums[HEADS][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  blend<T, HEADS, VECTORS>(a, spans[0], weights, stride, first, sums, fetch);
  blend<T, HEADS, VECTORS>(a, spans[1], weights + round_up(spans[0].length, BLOCK), stride, first, sums, fetch);
  for (int h = 0; h < HEADS; ++h)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = first + v * TILE;
      store16(out + h * a.head_dim + at, _mm512_mul_ps(sums[h][v], _mm512_set1_ps(inverse[h])),
              first_lanes(a.head_dim - at));
    }
}

// HEADS query heads of one row that share a key/value head.
template <typename T, int HEADS>
void attend_heads(const Attention& a, const Span<T> (&spans)[2], const float* queries, T* out, Fetch& fetch) {
  const int64_t second = round_up(spans[0].length, BLOCK), stride = second + round_up(spans[1].length, BLOCK);
  thread_local std::vector<float> scratch;
  if (int64_t(scratch.size()) < HEADS * stride) scratch.resize(HEADS * stride);
  float* scores = scratch.data();
  score<T, HEADS>(a, spans[0], queries, scores, stride, fetch);
  score<T, HEADS>(a, spans[1], queries, scores + second, stride, fetch);
  float inverse[HEADS];
  for (int h = 0; h < HEADS; ++h) inverse[h] = soften(scores + h * stride, stride);
  int64_t first = 0;
  for (; first + 3 * TILE < a.head_dim; first += 4 * TILE)
    blend_and_store<T, HEADS, 4>(a, spans, scores, stride, inverse, first, out, fetch);
  for (; first < a.head_dim; first += TILE)
    blend_and_store<T, HEADS, 1>(a, spans, scores, stride, inverse, first, out, fetch);
}

template <typename T>
void attend(const Attention& a, int64_t item) {
  const int64_t row = item % a.rows, kv_head = item / a.rows, group = a.heads / a.kv_heads;
  const Span<T> spans[2] = {prefix_span<T>(a, row, kv_head), own_span<T>(a, row, kv_head)};
  Fetch fetch = {nullptr, nullptr};
  if (item + 1 < a.rows * a.kv_heads) {
    // The next item's own span; its prefix is mostly this one's.
    const Span<T> next = own_span<T>(a, (item + 1) % a.rows, (item + 1) / a.rows);
    fetch.at = reinterpret_cast<const char*>(next.blocks);
    fetch.end = fetch.at + round_up(next.length, BLOCK) / BLOCK * block_elements(a) * sizeof(T);
  }
  for (int64_t head = 0; head < group;) {
    const int64_t at = (kv_head * group + head) * a.head_dim;
    const float* queries = a.qkv + row * a.qkv_stride + at;
    T* out = static_cast<T*>(a.out) + row * a.out_stride + at;
    switch (std::min<int64_t>(group - head, 4)) {
      case 1: attend_heads<T, 1>(a, spans, queries, out, fetch); head += 1; break;
      case 2: attend_heads<T, 2>(a, spans, queries, out, fetch); head += 2; break;
      case 3: attend_heads<T, 3>(a, spans, queries, out, fetch); head += 3; break;
      default: attend_heads<T, 4>(a, spans, queries, out, fetch); head += 4;
    }
  }
}

template <typename T>
void attention(const Attention& a, int threads) {
  const int64_t items = a.rows * a.kv_heads, share = std::clamp<int64_t>(items / (threads * 8), 1, 16);
#pragma omp parallel num_threads(threads)
  {
    // All rows of a prefix that is being computed enter their keys before any of them reads.
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) enter<T>(a, row);
    // Rows of one group are neighbours: their prefix stays in the cache. Later rows of a prefix see more
    // keys, so equal shares of rows are not equal work.
#pragma omp for schedule(dynamic, share)
    for (int64_t item = 0; item < items; ++item) attend<T>(a, item);
  }
}

constexpr int64_t SAMPLE_BLOCK = 256;

// Token and log-probability of one row; token -1 if the logits have no finite maximum or a NaN.
void sample_row(const float* logits, int64_t vocabulary, float factor, double uniform, int32_t* token,
                float* logprob, float* block_sums) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < vocabulary; i += TILE) {
    const __mmask16 lanes = first_lanes(vocabulary - i);
    top = _mm512_mask_max_ps(top, lanes, top, _mm512_mul_ps(load16(logits + i, lanes), factors));
  }
  const float highest = _mm512_reduce_max_ps(top);
  const auto weights = [&](int64_t i) {
    const __mmask16 lanes = first_lanes(vocabulary - i);
    const __m512 z = _mm512_mul_ps(load16(logits + i, lanes), factors);
    return _mm512_maskz_mov_ps(lanes, exponential(_mm512_sub_ps(z, _mm512_set1_ps(highest))));
  };
  double total = 0;
  const int64_t blocks = (vocabulary + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
  for (int64_t block = 0; block < blocks; ++block) {
    __m512 sum = _mm512_setzero_ps();
    const int64_t end = std::min((block + 1) * SAMPLE_BLOCK, vocabulary);
    for (int64_t i = block * SAMPLE_BLOCK; i < end; i += TILE) sum = _mm512_add_ps(sum, weights(i));
    total += block_sums[block] = _mm512_reduce_add_ps(sum);
  }
  *token = -1;
  *logprob = std::numeric_limits<float>::quiet_NaN();
  if (!std::isfinite(highest) || !std::isfinite(total)) return;
  const double target = uniform * total;
  // The last block with any probability takes what rounding leaves over.
  int64_t chosen = -1;
  double before = 0, sum = 0;
  for (int64_t block = 0; block < blocks && (chosen < 0 || sum <= target); ++block) {
    if (block_sums[block] == 0) continue;
    chosen = block;
    before = sum;
    sum += block_sums[block];
  }
  alignas(64) float numbers[TILE];
  double reached = before;
  const int64_t end = std::min((chosen + 1) * SAMPLE_BLOCK, vocabulary);
  for (int64_t i = chosen * SAMPLE_BLOCK; i < end; i += TILE) {
    _mm512_store_ps(numbers, weights(i));
    for (int64_t lane = 0; lane < TILE; ++lane) {
      if (numbers[lane] == 0) continue;
      *token = int32_t(i + lane);
      reached += numbers[lane];
      if (reached > target) goto found;
    }
  }
found:
  *logprob = logits[*token] * factor - highest - float(std::log(total));
}

}  // namespace
}  // namespace graft

using namespace graft;

extern "C" {

// out [rows, width] = x / sqrt(mean of squares + epsilon); rows of x are contiguous.
void graft_rms_norm(const float* x, int64_t rows, int64_t width, float epsilon, void* out, int64_t out_stride,
                    int32_t out_is_bf16, int32_t threads) {
  if (out_is_bf16)
    rms_norm(x, rows, width, epsilon, static_cast<bf16*>(out), out_stride, threads);
  else
    rms_norm(x, rows, width, epsilon, static_cast<float*>(out), out_stride, threads);
}

void graft_attention(const Attention* a, int32_t threads) {
  if (a->bf16_cache)
    attention<bf16>(*a, threads);
  else
    attention<float>(*a, threads);
}

// tokens[r] is the least index whose cumulative probability exceeds uniforms[r]; logprobs are in nats.
void graft_sample(const float* logits, int64_t rows, int64_t vocabulary, int64_t stride, float factor,
                  const double* uniforms, int32_t* tokens, float* logprobs, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> block_sums((vocabulary + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < rows; ++row)
      sample_row(logits + row * stride, vocabulary, factor, uniforms[row], tokens + row, logprobs + row,
                 block_sums.data());
  }
}
}
