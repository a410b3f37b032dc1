// Eq. 1: class means and their gradient.
#include "prototypes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int64_t kColumns = 64;

// Class sums over some columns. Rows wait until four of a class are there: their float sum, whose
// error is below the rounding of the mean itself, costs one conversion to double instead of four.
template <class A>
class ClassSums {
 public:
  ClassSums(const ClassMeans& m, int64_t first, int64_t columns)
      : m_(m),
        first_(first),
        columns_(columns),
        sums_(m.K * columns),
        copies_(kRows * columns),
        waiting_(m.K * kRows),
        count_(m.K) {
    std::memset(sums_.get(), 0, static_cast<size_t>(m.K * columns) * sizeof(double));
    std::memset(count_.get(), 0, static_cast<size_t>(m.K) * sizeof(int64_t));
  }

  void add(int64_t i, int64_t k) {
    waiting_.get()[k * kRows + count_.get()[k]++] = i;
    if (count_.get()[k] == kRows) add_four(k);
  }

  void store_means() {
    for (int64_t k = 0; k < m_.K; ++k) {
      for (int64_t r = 0; r < count_.get()[k]; ++r) add_one(waiting_.get()[k * kRows + r], k);
      A* mean = static_cast<A*>(m_.means) + k * m_.D + first_;
      const double count = m_.counts[k] > 0 ? static_cast<double>(m_.counts[k]) : 1.0;
      for (int64_t j = 0; j < columns_; ++j) {
        mean[j] = static_cast<A>(sums_.get()[k * columns_ + j] / count);
      }
    }
  }

 private:
  void add_four(int64_t k) {
    int64_t rows[kRows];
    std::memcpy(rows, waiting_.get() + k * kRows, sizeof(rows));
    const A* x[kRows];
    rows_at(m_.features, rows, first_, columns_, copies_.get(), columns_, x);
    double* sum = sums_.get() + k * columns_;
#pragma omp simd
    for (int64_t j = 0; j < columns_; ++j) {
      sum[j] += static_cast<double>((x[0][j] + x[1][j]) + (x[2][j] + x[3][j]));
    }
    count_.get()[k] = 0;
  }

  void add_one(int64_t i, int64_t k) {
    load_row(m_.features, i, first_, copies_.get(), 1, columns_);
    double* sum = sums_.get() + k * columns_;
    for (int64_t j = 0; j < columns_; ++j) sum[j] += static_cast<double>(copies_.get()[j]);
  }

  const ClassMeans& m_;
  int64_t first_, columns_;
  Scratch<double> sums_;
  Scratch<A> copies_;
  Scratch<int64_t> waiting_, count_;
};

// Columns are shared out, rows are added in an order of their own for each column: the same bits
// for every thread count.
template <class A>
void means(const ClassMeans& m, ParallelFor threads) {
  parallel_for(threads, (m.D + kColumns - 1) / kColumns, m.N * kColumns,
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * kColumns;
                 const int64_t last = end * kColumns < m.D ? end * kColumns : m.D;
                 ClassSums<A> sums(m, first, last - first);
                 for (int64_t i = 0; i < m.N; ++i) {
                   if (m.classes[i] >= 0) sums.add(i, m.classes[i]);
                 }
                 sums.store_means();
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
