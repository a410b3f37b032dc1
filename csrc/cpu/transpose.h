// Blocks of kLanes short rows to and from the class-major layout of lanes.h, by tables of
// positions.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

// to_j = from at positions_j. Compilers for any machine with AVX-512 leave gathers out.
template <class A>
void permute(const A* from, const int32_t* positions, A* to, int64_t count) {
  int64_t j = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    for (; j + 16 <= count; j += 16) {
      const __m512i at = _mm512_loadu_si512(positions + j);
      _mm512_storeu_ps(to + j, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, at, from, 4));
    }
  } else {
    for (; j + 8 <= count; j += 8) {
      const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions + j));
      _mm512_storeu_pd(to + j, _mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, at, from, 8));
    }
  }
#endif
  for (; j < count; ++j) to[j] = from[positions[j]];
}

// Where lane r, line k of a block lies in memory. False: too far off for 32 bits.
inline bool lane_positions(int64_t K, int64_t row_stride, int64_t col_stride, int32_t* positions) {
  constexpr int64_t reach = int64_t{1} << 20;  // kLanes rows of few classes stay within 32 bits
  const auto within = [=](int64_t stride) { return stride > -reach && stride < reach; };
  if (!within(row_stride) || !within(col_stride)) return false;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t r = 0; r < kLanes; ++r) {
      positions[k * kLanes + r] = static_cast<int32_t>(r * row_stride + k * col_stride);
    }
  }
  return true;
}

// The way back to contiguous rows.
inline void inverse_positions(int64_t K, int32_t* positions) {
  for (int64_t r = 0; r < kLanes; ++r) {
    for (int64_t k = 0; k < K; ++k) {
      positions[r * K + k] = static_cast<int32_t>(k * kLanes + r);
    }
  }
}

// One matrix's blocks. The tables are the caller's: kLanes * K positions each.
template <class A>
struct BlockReader {
  Matrix matrix;
  int64_t K;
  const int32_t* contiguous;
  const int32_t* direct;  // null: rows must be converted, or are too far apart
  A* staging;             // (kLanes, K)

  // Rows [first, first + rows); lanes without a row are zero.
  void load(int64_t first, int64_t rows, A* to) const {
    if (direct != nullptr && rows == kLanes) {
      const A* data = static_cast<const A*>(matrix.data);
      return permute(data + first * matrix.row_stride, direct, to, kLanes * K);
    }
    if (matrix.col_stride == 1 && matrix.row_stride == K) {
      load_row(matrix, first, 0, staging, 1, rows * K);
    } else {
      for (int64_t r = 0; r < rows; ++r) load_row(matrix, first + r, 0, staging + r * K, 1, K);
    }
    for (int64_t j = rows * K; j < kLanes * K; ++j) staging[j] = A(0);
    permute(staging, contiguous, to, kLanes * K);
  }
};

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
