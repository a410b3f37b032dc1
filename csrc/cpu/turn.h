// Rows of matrices whose rows lie closer together than their columns (a transposed tensor): read by
// columns, a whole cache line at a time, and turned in registers.
#pragma once

#include <utility>

#include "rows.h"
#include "vectors.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

// Rows by columns of a tile: a cache line of floats a column.
inline constexpr int64_t kTile = 16;

inline int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }

// Whether rows one by one would touch a cache line for each element.
inline bool lies_across(const Matrix& m) {
  return m.col_stride != 1 && distance(m.row_stride) < distance(m.col_stride);
}

// a_0, b_0, a_1, b_1, ... from element `First` on; spelt so that compilers see one shuffle.
template <class A, size_t First, size_t... I>
inline Vector<A> interleaved(Vector<A> a, Vector<A> b, std::index_sequence<I...>) {
  return Vector<A>{(I % 2 == 0 ? a : b)[First + I / 2]...};
}

// A square of vectors, transposed: each round interleaves its two halves.
template <class A>
inline void turn(Vector<A> (&v)[kWidth<A>]) {
  constexpr size_t width = kWidth<A>, half = width / 2;
  constexpr auto all = std::make_index_sequence<width>();
#pragma GCC unroll 4
  for (size_t round = 1; round < width; round *= 2) {
    Vector<A> next[width];
#pragma GCC unroll 16
    for (size_t i = 0; i < half; ++i) {
      next[2 * i] = interleaved<A, 0>(v[i], v[i + half], all);
      next[2 * i + 1] = interleaved<A, half>(v[i], v[i + half], all);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < width; ++i) v[i] = next[i];
  }
}

// to[r * stride + c] = tile[c * kTile + r].
template <class A>
void store_turned(const A* tile, int64_t rows, int64_t columns, A* to, int64_t stride) {
  constexpr int64_t width = kWidth<A>;
  for (int64_t row = 0; row < rows; row += width) {
    for (int64_t column = 0; column < columns; column += width) {
      Vector<A> v[width];
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) v[i] = load(tile + (column + i) * kTile + row);
      turn<A>(v);
      A* out = to + row * stride + column;
      if (rows - row >= width && columns - column >= width) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < width; ++i) store<A>(v[i], out + i * stride);
      } else {
        const int64_t count = columns - column < width ? columns - column : width;
        for (int64_t i = 0; i < width && row + i < rows; ++i) {
          std::memcpy(out + i * stride, &v[i], static_cast<size_t>(count) * sizeof(A));
        }
      }
    }
  }
}

// The hardware fetches nothing ahead across pages, so the next tile is asked for here.
template <class T, class A>
void turn_rows(const T* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t columns,
               A* to, int64_t stride) {
  alignas(64) A tile[kTile * kTile] = {};
  for (int64_t column = 0; column < columns; column += kTile) {
    const int64_t width = columns - column < kTile ? columns - column : kTile;
    for (int64_t row = 0; row < rows; row += kTile) {
      const int64_t height = rows - row < kTile ? rows - row : kTile;
      const T* corner = from + row * row_stride + column * col_stride;
      for (int64_t c = 0; c < width; ++c) {
        const T* line = corner + c * col_stride;
        if (column + c + kTile < columns) __builtin_prefetch(line + kTile * col_stride);
        if (row_stride == 1 && height == kTile) {
          copy_row(line, 1, tile + c * kTile, 1, kTile);
        } else {
          copy_row(line, row_stride, tile + c * kTile, 1, height);
        }
      }
      store_turned(tile, height, width, to + row * stride + column, stride);
    }
  }
}

// Rows [first, first + rows), columns [column, column + columns), as A and `stride` apart.
template <class A>
void load_rows(const Matrix& m, int64_t first, int64_t rows, int64_t column, int64_t columns, A* to,
               int64_t stride) {
  if (!lies_across(m)) {
    for (int64_t r = 0; r < rows; ++r) {
      load_row(m, first + r, column, to + r * stride, 1, columns);
    }
    return;
  }
  const int64_t offset = first * m.row_stride + column * m.col_stride;
  const auto turn_from = [&](const auto* data) {
    turn_rows(data + offset, m.row_stride, m.col_stride, rows, columns, to, stride);
  };
  switch (m.dtype) {
    case Dtype::float32:
      return turn_from(static_cast<const float*>(m.data));
    case Dtype::float64:
      return turn_from(static_cast<const double*>(m.data));
    case Dtype::bfloat16:
      return turn_from(static_cast<const bfloat16*>(m.data));
    case Dtype::float16:
      return turn_from(static_cast<const float16*>(m.data));
  }
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
