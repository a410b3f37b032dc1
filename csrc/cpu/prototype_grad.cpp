// The gradient of the prototypes (Eq. 3): residual^T features, in one pass over the features.
#include "prototypes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int64_t kColumns = 64;  // the least that threads share out

// Rows that are summed in A before they go to double: what lies in the L1 cache, and no more than
// rounding allows.
template <class A>
constexpr int64_t rows_at_once(int64_t D) {
  const int64_t rows = 24576 / (padded(D) * static_cast<int64_t>(sizeof(A))) / kRows * kRows;
  return rows < kRows ? kRows : rows > 16 ? 16 : rows;
}

// sums[c][j] += sum_r weights[r][c] z_rj over `count` rows and V vectors of columns; `width` apart
// lie the rows of z and of sums.
template <class A, int C, int V>
[[gnu::noinline]] void product_tile(const A* weights, int64_t K, const A* z, int64_t width,
                                    int64_t count, double* sums) {
  constexpr int64_t columns = V * kWidth<A>;
  Vector<A> products[C][V];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) products[c][v] = Vector<A>{};
  }
  for (int64_t r = 0; r < count; ++r) {
    Vector<A> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(z + r * width + v * kWidth<A>);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const A weight = weights[r * K + c];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) products[c][v] += weight * row[v];
    }
  }
  alignas(64) A out[C][columns];
  std::memcpy(out, products, sizeof(out));
  for (int c = 0; c < C; ++c) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) sums[c * width + j] += static_cast<double>(out[c][j]);
  }
}

template <class A>
class PrototypeSums {
 public:
  PrototypeSums(const PrototypeGrad& p, int64_t first, int64_t columns)
      : p_(p),
        centred_(p.centred, p.D, p.K),
        first_(first),
        columns_(columns),
        width_(padded(columns)),
        at_once_(rows_at_once<A>(p.D)),  // of D: the same for every thread count
        sums_(p.K * width_),
        residual_sums_(p.K),
        rows_((at_once_ + kRows) * width_),
        weights_(p.row_factor == nullptr ? 0 : at_once_ * p.K) {
    std::memset(sums_.get(), 0, static_cast<size_t>(p.K * width_) * sizeof(double));
    std::memset(residual_sums_.get(), 0, static_cast<size_t>(p.K) * sizeof(double));
    std::memset(rows_.get(), 0, static_cast<size_t>(at_once_ * width_) * sizeof(A));
  }

  void add_all() {
    for (int64_t i = 0; i < p_.N; i += at_once_) add(i, p_.N - i < at_once_ ? p_.N - i : at_once_);
  }

  void store_grad() {
    for (int64_t k = 0; k < p_.K; ++k) {
      const A* c = centred_.row(k) + first_;
      A* grad = static_cast<A*>(p_.grad) + k * p_.D + first_;
      for (int64_t j = 0; j < columns_; ++j) {
        grad[j] = static_cast<A>(p_.factor * (sums_.get()[k * width_ + j] -
                                              residual_sums_.get()[k] * static_cast<double>(c[j])));
      }
    }
  }

 private:
  void add(int64_t i, int64_t count) {
    const A* weights = weights_of(i, count);
    centre(i, count, weights);
    for (int64_t r = 0; r < count; ++r) {
      double* sums = residual_sums_.get();
      const A* row = weights + r * p_.K;
#pragma omp simd
      for (int64_t k = 0; k < p_.K; ++k) sums[k] += static_cast<double>(row[k]);
    }
    constexpr int many = kVectorBytes == 64 ? 4 : 2;  // as registers hold
    int64_t k = 0;
    for (; k + many <= p_.K; k += many) add_products<many>(weights, k, count);
    if (k + 2 <= p_.K) {
      add_products<2>(weights, k, count);
      k += 2;
    }
    if (k < p_.K) add_products<1>(weights, k, count);
  }

  // (count, K): the residuals times the rows' factors.
  const A* weights_of(int64_t i, int64_t count) {
    const A* residual = static_cast<const A*>(p_.residual) + i * p_.K;
    if (p_.row_factor == nullptr) return residual;
    for (int64_t r = 0; r < count; ++r) {
      const A factor = static_cast<const A*>(p_.row_factor)[i + r];
      for (int64_t k = 0; k < p_.K; ++k) {
        weights_.get()[r * p_.K + k] = factor * residual[r * p_.K + k];
      }
    }
    return weights_.get();
  }

  // Columns beyond the last stay 0, and so does a row that takes no part: what it holds may be
  // anything, NaN too.
  void centre(int64_t i, int64_t count, const A* weights) {
    const A* mean = centred_.mean + first_;
    for (int64_t r = 0; r < count; r += kRows) {
      const A* x[kRows];
      four_rows(p_.features, i + r, p_.N, first_, columns_, rows_.get() + at_once_ * width_, width_,
                x);
      for (int64_t s = r; s < r + kRows && s < count; ++s) {
        const A* from = x[s - r];
        A* z = rows_.get() + s * width_;
        if (takes_part(weights + s * p_.K)) {
#pragma omp simd
          for (int64_t j = 0; j < columns_; ++j) z[j] = from[j] - mean[j];
        } else {
          std::memset(z, 0, static_cast<size_t>(columns_) * sizeof(A));
        }
      }
    }
  }

  bool takes_part(const A* weights) const {
    for (int64_t k = 0; k < p_.K; ++k) {
      if (weights[k] != A(0)) return true;
    }
    return false;
  }

  template <int C>
  void add_products(const A* weights, int64_t k, int64_t count) {
    constexpr int wide = 4;
    double* sums = sums_.get() + k * width_;
    int64_t j = 0;
    for (; j + wide * kWidth<A> <= columns_; j += wide * kWidth<A>) {
      product_tile<A, C, wide>(weights + k, p_.K, rows_.get() + j, width_, count, sums + j);
    }
    for (; j < columns_; j += kWidth<A>) {
      product_tile<A, C, 1>(weights + k, p_.K, rows_.get() + j, width_, count, sums + j);
    }
  }

  const PrototypeGrad& p_;
  CentredArrays<A> centred_;
  int64_t first_, columns_, width_, at_once_;
  Scratch<double> sums_, residual_sums_;
  Scratch<A> rows_, weights_;
};

// Columns are shared out: no partial sums to add, the same bits for every thread count.
template <class A>
void all_columns(const PrototypeGrad& p, ParallelFor threads) {
  parallel_for(threads, (p.D + kColumns - 1) / kColumns, p.N * kColumns,
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * kColumns;
                 const int64_t last = end * kColumns < p.D ? end * kColumns : p.D;
                 PrototypeSums<A> sums(p, first, last - first);
                 sums.add_all();
                 sums.store_grad();
               });
}

}  // namespace

void prototype_grad(const PrototypeGrad& p, ParallelFor threads) {
  p.wide ? all_columns<double>(p, threads) : all_columns<float>(p, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
