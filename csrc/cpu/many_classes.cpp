// Eqs. 2-4 for many classes, beside a matrix product: the operand of a block of rows, its softmax.
#include "prototypes.h"
#include "turn.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int64_t kTerms = 1024;  // a float sum takes 64 terms a lane, then goes to double

template <class A>
void centre_block(const CentreRows& c) {
  const A* mean = static_cast<const A*>(c.mean);
  A* rows = static_cast<A*>(c.rows);
  load_rows(c.features, 0, c.N, 0, c.D, rows, c.D);
  for (int64_t i = 0; i < c.N; ++i) {
    A* row = rows + i * c.D;
    if (c.classes[i] < 0) {  // 0 times what an ignored row may hold is not always 0
      std::memset(row, 0, static_cast<size_t>(c.D) * sizeof(A));
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < c.D; ++j) row[j] -= mean[j];
  }
}

// a = factor x + bias in place; returns the largest.
template <class A>
A logits_of(A* x, const A* bias, A factor, int64_t K) {
  A maximum = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t k = 0; k < K; ++k) {
    x[k] = factor * x[k] + bias[k];
    maximum = x[k] > maximum ? x[k] : maximum;
  }
  return maximum;
}

// a = e^(a - maximum) in place; returns the sum.
template <class A>
double exps_of(A* a, A maximum, int64_t K) {
  double total = 0.0;
  for (int64_t first = 0; first < K; first += kTerms) {
    const int64_t last = first + kTerms < K ? first + kTerms : K;
    A sum = A(0);
#pragma omp simd reduction(+ : sum)
    for (int64_t k = first; k < last; ++k) {
      a[k] = exp_(a[k] - maximum);
      sum += a[k];
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// The true class is left out of the sum of the others, and its residual is their complement: p - 1
// would cancel.
template <class A>
void softmax_row(const SoftmaxRows& s, int64_t i) {
  A* x = static_cast<A*>(s.products) + i * s.K;
  const int32_t y = s.classes[i];
  A loss = A(0), true_prob = A(0);
  if (y < 0) {
    for (int64_t k = 0; k < s.K; ++k) x[k] = A(0);
  } else {
    const A maximum =
        logits_of(x, static_cast<const A*>(s.bias), static_cast<A>(2.0 * s.scale), s.K);
    const A true_logit = x[y];
    const A true_exp = exp_(true_logit - maximum);
    x[y] = -std::numeric_limits<A>::infinity();
    const double others = exps_of(x, maximum, s.K);
    const double sum = others + static_cast<double>(true_exp);
    const A factor = s.row_factor != nullptr ? static_cast<const A*>(s.row_factor)[i] : A(1);
    const A inverse = factor * static_cast<A>(1.0 / sum);
#pragma omp simd
    for (int64_t k = 0; k < s.K; ++k) x[k] *= inverse;
    x[y] = factor * static_cast<A>(-others / sum);
    loss = cross_entropy(maximum, true_logit, true_exp, static_cast<A>(others));
    true_prob = static_cast<A>(static_cast<double>(true_exp) / sum);
  }
  if (s.row_loss != nullptr) static_cast<A*>(s.row_loss)[i] = loss;
  if (s.true_prob != nullptr) static_cast<A*>(s.true_prob)[i] = true_prob;
  *s.loss += static_cast<double>(loss);
  *s.rate += static_cast<double>(true_prob);
}

template <class A>
void softmax_block(const SoftmaxRows& s) {
  *s.loss = *s.rate = 0.0;
  for (int64_t i = 0; i < s.N; ++i) softmax_row<A>(s, i);
}

}  // namespace

void centre_rows(const CentreRows& c) { c.wide ? centre_block<double>(c) : centre_block<float>(c); }

void softmax_rows(const SoftmaxRows& s) {
  s.wide ? softmax_block<double>(s) : softmax_block<float>(s);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
