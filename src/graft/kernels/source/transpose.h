// Blocks of 16 vectors of 16 dwords, where a dword is one fp32 number or two bf16 neighbours: transposing such a block
// turns rows into packed columns, and packed columns into rows.
#pragma once

#include "gemm.h"
#include "vector.h"

namespace graft {

struct Dwords {
  __m512i row[16];
};

// row[i] dword j becomes row[j] dword i.
inline void transpose(Dwords& block) {
  __m512i* r = block.row;
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xDD);
  }
}

// 32 numbers of a row as bf16, those past `count` as zeros.
template <typename T>
inline __m512i load_bf16(const T* from, int64_t count, const float* scale) {
  __m256i half[2];
  for (int i = 0; i < 2; ++i) {
    const __mmask16 lanes = first_lanes(count - i * TILE);
    half[i] = scale ? to_bf16(_mm512_mul_ps(load16(from + i * TILE, lanes), load16(scale + i * TILE, lanes)))
                    : load16_as_bf16(from + i * TILE, lanes);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

// Two rows' numbers of the same column next to each other: 16 columns of rows `first` and `second`, which
// may be null.
template <typename T>
inline __m512i load_pairs(const T* first, const T* second, __mmask16 lanes) {
  const __m256i zero = _mm256_setzero_si256();
  const __m512i low = _mm512_cvtepu16_epi32(first ? load16_as_bf16(first, lanes) : zero);
  const __m512i high = _mm512_cvtepu16_epi32(second ? load16_as_bf16(second, lanes) : zero);
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

}  // namespace graft
