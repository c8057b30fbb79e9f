// Factors of tile products in blocks of 32 x 32 bf16 numbers, and sums in blocks of 32 x 32 fp32 numbers.
//
// A left factor's block is [32 rows][32]; a right factor's is packed as in gemm.h.
#pragma once

#include <vector>

#include "tiles.h"
#include "transpose.h"

namespace graft {

constexpr int64_t BLOCK = 32;
constexpr int64_t BLOCK_NUMBERS = BLOCK * BLOCK;

// Blocks that stay from one use to the next, whatever is in them.
template <typename T>
class Blocks {
 public:
  void make_room(int64_t count) {
    if (int64_t(blocks.size()) < count) blocks.resize(count);
  }
  T* operator[](int64_t index) { return blocks[index].numbers; }

 private:
  struct alignas(64) Block {
    T numbers[BLOCK_NUMBERS];
  };
  std::vector<Block> blocks;
};

// 32 rows of a matrix with `width` columns; null where there is no row, which reads as zeros.
template <typename T>
struct Rows {
  const T* row[BLOCK] = {};
  int64_t width = 0;
};

inline void store(const Dwords& dwords, bf16* to) {
  for (int64_t i = 0; i < TILE; ++i) _mm512_storeu_si512(to + i * BLOCK, dwords.row[i]);
}

// 32 numbers from number `at` on, of 16 rows from row `first` on.
template <typename T>
inline Dwords neighbours_in_rows(const Rows<T>& x, int64_t first, int64_t at) {
  Dwords result;
  for (int64_t i = 0; i < TILE; ++i) {
    const T* row = x.row[first + i];
    result.row[i] = row ? load_bf16(row + at, x.width - at, nullptr) : _mm512_setzero_si512();
  }
  return result;
}

// 16 numbers from number `at` on, of 32 rows.
template <typename T>
inline Dwords neighbours_in_columns(const Rows<T>& x, int64_t at) {
  Dwords result;
  const __mmask16 lanes = first_lanes(x.width - at);
  for (int64_t i = 0; i < TILE; ++i) {
    const T *first = x.row[2 * i], *second = x.row[2 * i + 1];
    result.row[i] = load_pairs(first ? first + at : nullptr, second ? second + at : nullptr, lanes);
  }
  return result;
}

// x as a left factor: a block for each 32 columns.
template <typename T>
void pack_left(const Rows<T>& x, bf16* to) {
  for (int64_t at = 0; at < x.width; at += BLOCK)
    for (int64_t half = 0; half < BLOCK; half += TILE, to += TILE * BLOCK) store(neighbours_in_rows(x, half, at), to);
}

// x^T as a right factor: a block for each 32 columns of x.
template <typename T>
void pack_right_transposed(const Rows<T>& x, bf16* to) {
  for (int64_t at = 0; at < x.width; at += BLOCK)
    for (int64_t half = 0; half < BLOCK; half += TILE, to += TILE * BLOCK) {
      Dwords dwords = neighbours_in_rows(x, half, at);
      transpose(dwords);
      store(dwords, to);
    }
}

// x as a right factor: a block for each 32 columns.
template <typename T>
void pack_right(const Rows<T>& x, bf16* to) {
  for (int64_t at = 0; at < round_up(x.width, BLOCK); at += TILE, to += TILE * BLOCK)
    store(neighbours_in_columns(x, at), to);
}

// x^T as a left factor: a block for each 32 columns of x.
template <typename T>
void pack_left_transposed(const Rows<T>& x, bf16* to) {
  for (int64_t at = 0; at < round_up(x.width, BLOCK); at += TILE, to += TILE * BLOCK) {
    Dwords dwords = neighbours_in_columns(x, at);
    transpose(dwords);
    store(dwords, to);
  }
}

// A block of sums = (ADD: +=) the sum over `steps` of left and right blocks. Only the first `rows` rows are certain to
// be computed.
template <bool ADD>
inline void multiply_blocks(const bf16* left, int64_t left_step, const bf16* right, int64_t right_step, int64_t steps,
                            int64_t rows, float* sums) {
  const TileFactors factors = {left,  BLOCK, left_step * BLOCK_NUMBERS, right, right_step * BLOCK_NUMBERS, steps};
  if (rows > TILE)
    multiply_tiles<2, ADD>(factors, sums, [](const bf16*) {});
  else
    multiply_tiles<1, ADD>(factors, sums, [](const bf16*) {});
}

}  // namespace graft
