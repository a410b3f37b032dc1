// Eq. 1: class means and their gradient.
#include "rows.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int64_t kColumns = 64;

// Columns are shared out, rows are added in order in double: exact enough for features far from the
// origin, and the same bits for every thread count.
template <class A>
void mean_columns(const ClassMeans& m, int64_t first, int64_t columns) {
  Scratch<double> sums(m.K * columns);
  Scratch<A> row(columns);
  for (int64_t at = 0; at < m.K * columns; ++at) sums.get()[at] = 0.0;
  for (int64_t i = 0; i < m.N; ++i) {
    if (m.classes[i] < 0) continue;
    load_row(m.features, i, first, row.get(), 1, columns);
    double* sum = sums.get() + m.classes[i] * columns;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sum[j] += static_cast<double>(row.get()[j]);
  }
  for (int64_t k = 0; k < m.K; ++k) {
    A* mean = static_cast<A*>(m.means) + k * m.D + first;
    const double count = m.counts[k] > 0 ? static_cast<double>(m.counts[k]) : 1.0;
    for (int64_t j = 0; j < columns; ++j) {
      mean[j] = static_cast<A>(sums.get()[k * columns + j] / count);
    }
  }
}

template <class A>
void means(const ClassMeans& m, ParallelFor threads) {
  parallel_for(threads, (m.D + kColumns - 1) / kColumns, m.N * kColumns,
               [&](int64_t begin, int64_t end) {
                 for (int64_t b = begin; b < end; ++b) {
                   const int64_t first = b * kColumns;
                   mean_columns<A>(m, first, m.D - first < kColumns ? m.D - first : kColumns);
                 }
               });
}

template <class A>
void means_backward(const ClassMeansBackward& m, ParallelFor threads) {
  parallel_for(threads, m.N, m.D, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(m.D);
    A* row = scratch.get();
    for (int64_t i = begin; i < end; ++i) {
      const int32_t k = m.classes[i];
      if (k >= 0) {
        load_row(m.grad_means, k, 0, row, 1, m.D);
        const A inverse = static_cast<A>(1.0 / static_cast<double>(m.counts[k]));
        for (int64_t j = 0; j < m.D; ++j) row[j] *= inverse;
      } else {
        for (int64_t j = 0; j < m.D; ++j) row[j] = A(0);
      }
      store_row(row, m.grad, m.grad_dtype, i, m.D);
    }
  });
}

}  // namespace

void class_means(const ClassMeans& m, ParallelFor threads) {
  m.wide ? means<double>(m, threads) : means<float>(m, threads);
}

void class_means_backward(const ClassMeansBackward& m, ParallelFor threads) {
  m.wide ? means_backward<double>(m, threads) : means_backward<float>(m, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
