// Eqs. 2-4: distance softmax against class prototypes. Forward reads the features once; backward
// writes the gradient once, from the saved (N, K) residual, and never reads the features again.
#include "lanes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

template <class A>
A dot(const A* x, const A* y, int64_t count) {
  A sum = A(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += x[j] * y[j];
  return sum;
}

// x.(y - z): of two classes only the difference of their logits matters, one product instead of
// two.
template <class A>
A dot_difference(const A* x, const A* y, const A* z, int64_t count) {
  A sum = A(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += x[j] * (y[j] - z[j]);
  return sum;
}

template <class A>
void centre(const CentrePrototypes& c) {
  A* mean = static_cast<A*>(c.mean);
  A* centred = static_cast<A*>(c.centred);
  A* bias = static_cast<A*>(c.bias);
  Scratch<double> sum(c.D);
  for (int64_t j = 0; j < c.D; ++j) sum.get()[j] = 0.0;
  double active = 0.0;
  for (int64_t k = 0; k < c.K; ++k) {
    load_row(c.prototypes, k, 0, centred + k * c.D, 1, c.D);
    if (!c.active[k]) continue;
    active += 1.0;
    for (int64_t j = 0; j < c.D; ++j) sum.get()[j] += static_cast<double>(centred[k * c.D + j]);
  }
  for (int64_t j = 0; j < c.D; ++j) {
    mean[j] = static_cast<A>(active > 0.0 ? sum.get()[j] / active : 0.0);
  }
  for (int64_t k = 0; k < c.K; ++k) {
    A* row = centred + k * c.D;
    for (int64_t j = 0; j < c.D; ++j) row[j] = c.active[k] ? row[j] - mean[j] : A(0);
    bias[k] = c.active[k] ? static_cast<A>(-c.scale) * dot(row, row, c.D)
                          : -std::numeric_limits<A>::infinity();
  }
}

// a_k = 2 scale (z - mean).(c_k - mean) - scale |c_k - mean|^2 for one row: -scale |z - c_k|^2 but
// for a term that all classes share.
template <class A>
void row_logits(const PrototypeForward& p, int64_t i, A* row, A* logits) {
  const A* mean = static_cast<const A*>(p.mean);
  const A* centred = static_cast<const A*>(p.centred);
  const A* bias = static_cast<const A*>(p.bias);
  load_row(p.features, i, 0, row, 1, p.D);
#pragma omp simd
  for (int64_t j = 0; j < p.D; ++j) row[j] -= mean[j];
  const A twice = static_cast<A>(2.0 * p.scale);
  constexpr A lowest = std::numeric_limits<A>::lowest();
  if (p.K == 2 && bias[0] >= lowest && bias[1] >= lowest) {  // two classes that take part
    logits[0] = twice * dot_difference(row, centred, centred + p.D, p.D) + (bias[0] - bias[1]);
    logits[kLanes] = A(0);
    return;
  }
  for (int64_t k = 0; k < p.K; ++k) {
    logits[k * kLanes] = twice * dot(row, centred + k * p.D, p.D) + bias[k];
  }
}

template <class A>
void forward_block(const PrototypeForward& p, int64_t index, A* row, A* logits, A* exps,
                   A* residual) {
  const int64_t first = index * kBlockRows;
  const int64_t rows = p.N - first < kBlockRows ? p.N - first : kBlockRows;
  int32_t classes[kLanes];
  load_classes(p.classes, first, rows, classes);
  for (int64_t r = 0; r < kLanes; ++r) {
    if (classes[r] >= 0) {
      row_logits(p, first + r, row, logits + r);
    } else {
      for (int64_t k = 0; k < p.K; ++k) logits[k * kLanes + r] = A(0);
    }
  }
  A loss[kLanes], true_prob[kLanes];
  lane_cross_entropy(logits, p.K, classes, exps, loss, true_prob,
                     p.residual != nullptr ? residual : nullptr);
  double loss_sum = 0.0, rate = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    loss_sum += static_cast<double>(loss[r]);
    rate += static_cast<double>(true_prob[r]);
    if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[first + r] = loss[r];
    if (p.true_prob != nullptr) static_cast<A*>(p.true_prob)[first + r] = true_prob[r];
  }
  p.block_loss[index] = loss_sum;
  p.block_rate[index] = rate;
  if (p.residual != nullptr) store_lanes(residual, first, rows, p.K, static_cast<A*>(p.residual));
}

template <class A>
void forward(const PrototypeForward& p, ParallelFor threads) {
  parallel_for(threads, num_blocks(p.N), kBlockRows * (p.D + p.K), [&](int64_t begin, int64_t end) {
    const int64_t lanes = p.K * kLanes;
    Scratch<A> row(p.D), work(3 * lanes);
    for (int64_t index = begin; index < end; ++index) {
      forward_block(p, index, row.get(), work.get(), work.get() + lanes, work.get() + 2 * lanes);
    }
  });
}

template <class A>
void backward(const PrototypeBackward& p, ParallelFor threads) {
  const A* residual = static_cast<const A*>(p.residual);
  const A* centred = static_cast<const A*>(p.centred);
  const A* row_factor = static_cast<const A*>(p.row_factor);
  parallel_for(threads, p.N, p.D + p.K, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(p.D);
    A* row = scratch.get();
    for (int64_t i = begin; i < end; ++i) {
      const A factor = static_cast<A>(p.factor) * (row_factor != nullptr ? row_factor[i] : A(1));
      for (int64_t j = 0; j < p.D; ++j) row[j] = A(0);
      for (int64_t k = 0; k < p.K && factor != A(0); ++k) {
        const A weight = factor * residual[i * p.K + k];
        const A* c = centred + k * p.D;
#pragma omp simd
        for (int64_t j = 0; j < p.D; ++j) row[j] += weight * c[j];
      }
      store_row(row, p.grad, p.grad_dtype, i, p.D);
    }
  });
}

// Columns are shared out, rows are summed in order: no partial sums, same bits for every thread
// count.
template <class A>
void prototype_grad_columns(const PrototypeGrad& p, int64_t first, int64_t columns) {
  const A* residual = static_cast<const A*>(p.residual);
  const A* row_factor = static_cast<const A*>(p.row_factor);
  const A* mean = static_cast<const A*>(p.mean) + first;
  Scratch<double> sums(p.K * columns), residual_sums(p.K);
  Scratch<A> row(columns);
  for (int64_t at = 0; at < p.K * columns; ++at) sums.get()[at] = 0.0;
  for (int64_t k = 0; k < p.K; ++k) residual_sums.get()[k] = 0.0;
  for (int64_t i = 0; i < p.N; ++i) {
    load_row(p.features, i, first, row.get(), 1, columns);
    for (int64_t j = 0; j < columns; ++j) row.get()[j] -= mean[j];
    const double factor = row_factor != nullptr ? static_cast<double>(row_factor[i]) : 1.0;
    for (int64_t k = 0; k < p.K; ++k) {
      const double weight = factor * static_cast<double>(residual[i * p.K + k]);
      if (weight == 0.0) continue;
      residual_sums.get()[k] += weight;
      double* sum = sums.get() + k * columns;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) sum[j] += weight * static_cast<double>(row.get()[j]);
    }
  }
  for (int64_t k = 0; k < p.K; ++k) {
    const A* c = static_cast<const A*>(p.centred) + k * p.D + first;
    A* grad = static_cast<A*>(p.grad) + k * p.D + first;
    for (int64_t j = 0; j < columns; ++j) {
      grad[j] = static_cast<A>(p.factor * (sums.get()[k * columns + j] -
                                           residual_sums.get()[k] * static_cast<double>(c[j])));
    }
  }
}

template <class A>
void prototype_grad_all(const PrototypeGrad& p, ParallelFor threads) {
  constexpr int64_t width = 64;
  parallel_for(threads, (p.D + width - 1) / width, p.N * width, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * width;
      prototype_grad_columns<A>(p, first, p.D - first < width ? p.D - first : width);
    }
  });
}

}  // namespace

void centre_prototypes(const CentrePrototypes& c) { c.wide ? centre<double>(c) : centre<float>(c); }

void prototype_forward(const PrototypeForward& p, ParallelFor threads) {
  p.wide ? forward<double>(p, threads) : forward<float>(p, threads);
}

void prototype_backward(const PrototypeBackward& p, ParallelFor threads) {
  p.wide ? backward<double>(p, threads) : backward<float>(p, threads);
}

void prototype_grad(const PrototypeGrad& p, ParallelFor threads) {
  p.wide ? prototype_grad_all<double>(p, threads) : prototype_grad_all<float>(p, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
