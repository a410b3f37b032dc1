// What the prototype kernels share: the parts of a `centred` array (kernels.h), rows of zeros.
#pragma once

#include "rows.h"
#include "vectors.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

inline constexpr int kRows = 4;  // rows of features that share each load of what they meet

template <class A>
struct CentredArrays {
  CentredArrays(const void* array, int64_t D, int64_t K)
      : stride(padded(D)),
        mean(static_cast<A*>(const_cast<void*>(array))),
        rows(mean + stride),
        bias(rows + centred_rows(K) * stride) {}
  A* row(int64_t k) const { return rows + k * stride; }
  int64_t stride;
  A *mean, *rows, *bias;
};

template <class A>
A squared_norm(const A* x, int64_t count) {
  A sum = A(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += x[j] * x[j];
  return sum;
}

// Four rows of the features as A, from column `column` on, where they lie if they can be used there
// and else as copies (`stride` apart); says whether they can.
template <class A>
bool rows_at(const Matrix& features, const int64_t (&rows)[kRows], int64_t column, int64_t columns,
             A* copies, int64_t stride, const A* (&x)[kRows]) {
  const bool direct =
      features.col_stride == 1 &&
      features.dtype == (sizeof(A) == sizeof(double) ? Dtype::float64 : Dtype::float32);
  for (int r = 0; r < kRows; ++r) {
    if (direct) {
      x[r] = static_cast<const A*>(features.data) + rows[r] * features.row_stride + column;
    } else {
      load_row(features, rows[r], column, copies + r * stride, 1, columns);
      x[r] = copies + r * stride;
    }
  }
  return direct;
}

// From row `first` on; what lies beyond the last row repeats it.
template <class A>
bool four_rows(const Matrix& features, int64_t first, int64_t N, int64_t column, int64_t columns,
               A* copies, int64_t stride, const A* (&x)[kRows]) {
  int64_t rows[kRows];
  for (int64_t r = 0; r < kRows; ++r) rows[r] = first + r < N ? first + r : N - 1;
  return rows_at(features, rows, column, columns, copies, stride, x);
}

inline void zero_rows(void* grad, Dtype dtype, int64_t begin, int64_t end, int64_t D) {
  const int64_t size = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  std::memset(static_cast<char*>(grad) + begin * D * size, 0,
              static_cast<size_t>((end - begin) * D * size));
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
