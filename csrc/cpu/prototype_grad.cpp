// The gradient of the prototypes (Eq. 3): residual^T features, in one pass over the features.
#include "prototypes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int64_t kColumns = 64;

template <class A>
class PrototypeSums {
 public:
  PrototypeSums(const PrototypeGrad& p, int64_t first, int64_t columns)
      : p_(p),
        centred_(p.centred, p.D, p.K),
        first_(first),
        columns_(columns),
        sums_(p.K * columns),
        residual_sums_(p.K),
        rows_(2 * kRows * columns) {
    std::memset(sums_.get(), 0, static_cast<size_t>(p.K * columns) * sizeof(double));
    std::memset(residual_sums_.get(), 0, static_cast<size_t>(p.K) * sizeof(double));
  }

  // Four rows are summed in A before they go to double.
  void add_four(int64_t i) {
    const A* x[kRows];
    A* z = rows_.get();
    four_rows(p_.features, i, p_.N, first_, columns_, z + kRows * columns_, columns_, x);
    for (int64_t r = 0; r < kRows; ++r) {
      if (!takes_part(i + r)) {  // what it holds may be anything, NaN too
        std::memset(z + r * columns_, 0, static_cast<size_t>(columns_) * sizeof(A));
        continue;
      }
      const A* from = x[r];
      const A* mean = centred_.mean + first_;
#pragma omp simd
      for (int64_t j = 0; j < columns_; ++j) z[r * columns_ + j] = from[j] - mean[j];
    }
    for (int64_t k = 0; k < p_.K; ++k) {
      const A w0 = weight(i, k), w1 = weight(i + 1, k);
      const A w2 = weight(i + 2, k), w3 = weight(i + 3, k);
      if (w0 == A(0) && w1 == A(0) && w2 == A(0) && w3 == A(0)) continue;
      residual_sums_.get()[k] += (static_cast<double>(w0) + static_cast<double>(w1)) +
                                 (static_cast<double>(w2) + static_cast<double>(w3));
      double* sum = sums_.get() + k * columns_;
#pragma omp simd
      for (int64_t j = 0; j < columns_; ++j) {
        const A two = w0 * z[j] + w1 * z[columns_ + j];
        sum[j] += static_cast<double>(two + (w2 * z[2 * columns_ + j] + w3 * z[3 * columns_ + j]));
      }
    }
  }

  void store_grad() {
    for (int64_t k = 0; k < p_.K; ++k) {
      const A* c = centred_.row(k) + first_;
      A* grad = static_cast<A*>(p_.grad) + k * p_.D + first_;
      for (int64_t j = 0; j < columns_; ++j) {
        grad[j] = static_cast<A>(p_.factor * (sums_.get()[k * columns_ + j] -
                                              residual_sums_.get()[k] * static_cast<double>(c[j])));
      }
    }
  }

 private:
  A weight(int64_t i, int64_t k) const {
    if (i >= p_.N) return A(0);
    const A residual = static_cast<const A*>(p_.residual)[i * p_.K + k];
    return p_.row_factor == nullptr ? residual : static_cast<const A*>(p_.row_factor)[i] * residual;
  }

  bool takes_part(int64_t i) const {
    for (int64_t k = 0; k < p_.K; ++k) {
      if (weight(i, k) != A(0)) return true;
    }
    return false;
  }

  const PrototypeGrad& p_;
  CentredArrays<A> centred_;
  int64_t first_, columns_;
  Scratch<double> sums_, residual_sums_;
  Scratch<A> rows_;
};

// Columns are shared out: no partial sums to add, the same bits for every thread count.
template <class A>
void all_columns(const PrototypeGrad& p, ParallelFor threads) {
  parallel_for(threads, (p.D + kColumns - 1) / kColumns, p.N * kColumns,
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * kColumns;
                 const int64_t last = end * kColumns < p.D ? end * kColumns : p.D;
                 PrototypeSums<A> sums(p, first, last - first);
                 for (int64_t i = 0; i < p.N; i += kRows) sums.add_four(i);
                 sums.store_grad();
               });
}

}  // namespace

void prototype_grad(const PrototypeGrad& p, ParallelFor threads) {
  p.wide ? all_columns<double>(p, threads) : all_columns<float>(p, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
