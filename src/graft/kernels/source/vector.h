// Vectors of 16 fp32 numbers: conversion from and to bf16, exponential, sum.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace graft {

using bf16 = uint16_t;  // the bits of a bfloat16

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (count > 0 ? count : 0)) - 1);
}

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load16(const bf16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load16(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

inline __m512 load16(const bf16* from, __mmask16 lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Round to nearest, ties to even, as torch does. The instruction vcvtneps2bf16 would flush subnormal
// numbers to zero, which torch does not.
inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

// 32 numbers as bf16, `low` first; subnormal numbers may become zeros.
inline __m512i to_bf16(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
#endif
}

// The same with the numbers in turns.
inline __m512i to_bf16_pairs(__m512 first, __m512 second) {
  alignas(64) static constexpr uint16_t turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(turns), to_bf16(first, second));
}

inline __m256i load16_as_bf16(const float* from, __mmask16 lanes) { return to_bf16(load16(from, lanes)); }

inline __m256i load16_as_bf16(const bf16* from, __mmask16 lanes) { return _mm256_maskz_loadu_epi16(lanes, from); }

inline void store16(float* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

inline void store16(bf16* to, __m512 x, __mmask16 lanes) { _mm256_mask_storeu_epi16(to, lanes, to_bf16(x)); }

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87.3, NaN for NaN.
inline __m512 exponential(__m512 x) {
  const __mmask16 nonzero = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  // x - power ln 2 with ln 2 in two parts: the first has few bits, so its product is exact.
  __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
  sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), sum, _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(nonzero, sum, power);
}

// 1 / (1 + e^-x)
inline __m512 sigmoid(__m512 x) {
  const __m512 small = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  const __m512 top = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), negative, small);
  return _mm512_div_ps(top, _mm512_add_ps(_mm512_set1_ps(1.0f), small));
}

inline __m512 silu(__m512 x) {
  // exp of the negative magnitude cannot overflow: x e^x / (1 + e^x) for x < 0, x / (1 + e^-x) otherwise.
  const __m512 small = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  const __m512 top = _mm512_mask_mul_ps(x, negative, x, small);
  return _mm512_div_ps(top, _mm512_add_ps(_mm512_set1_ps(1.0f), small));
}

}  // namespace graft
