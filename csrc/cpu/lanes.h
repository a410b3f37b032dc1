// The softmax formulas for kLanes rows side by side: arrays are (K, kLanes), class-major, so that
// every loop over lanes vectorises and no sum runs across lanes.
#pragma once

#include "rows.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

// Sums over many classes go to double after every kChunk terms: float alone would lose digits.
inline constexpr int64_t kChunk = 64;

template <class A>
struct LaneSum {
  double total[kLanes] = {};
  A part[kLanes] = {};
  int64_t terms = 0;

  void flush() {
    for (int64_t r = 0; r < kLanes; ++r) {
      total[r] += static_cast<double>(part[r]);
      part[r] = A(0);
    }
    terms = 0;
  }
  void step() {
    if (++terms == kChunk) flush();
  }
};

template <class A>
void lane_max(const A* a, int64_t K, A* maximum) {
  for (int64_t r = 0; r < kLanes; ++r) maximum[r] = -std::numeric_limits<A>::infinity();
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      maximum[r] = a[k * kLanes + r] > maximum[r] ? a[k * kLanes + r] : maximum[r];
    }
  }
}

// value = b_k for the class k whose a_k is the maximum (the last such; 0 if there is none).
template <class A>
void lane_at_maximum(const A* a, const A* maximum, const A* b, int64_t K, A* value) {
  for (int64_t r = 0; r < kLanes; ++r) value[r] = A(0);
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      value[r] = a[k * kLanes + r] == maximum[r] ? b[k * kLanes + r] : value[r];
    }
  }
}

// prob = softmax(a / temperature); its logarithm is (a - maximum) / temperature - log_sum.
template <class A>
void lane_softmax(const A* a, int64_t K, A inverse_temperature, A* prob, A* maximum,
                  double* log_sum) {
  lane_max(a, K, maximum);
  LaneSum<A> sum;
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A e = exp_((a[k * kLanes + r] - maximum[r]) * inverse_temperature);
      prob[k * kLanes + r] = e;
      sum.part[r] += e;
    }
    sum.step();
  }
  sum.flush();
  A inverse[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    inverse[r] = static_cast<A>(1.0 / sum.total[r]);
    log_sum[r] = std::log(sum.total[r]);
  }
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) prob[k * kLanes + r] *= inverse[r];
  }
}

// Eq. 3 and plain cross-entropy alike: loss, true-class probability and, in `residual` (may be
// null), P - Y with the true class's entry as minus the sum of the others (p - 1 would cancel).
// Lanes whose class is negative get loss 0, probability 0 and residual 0.
template <class A>
void lane_cross_entropy(const A* a, int64_t K, const int32_t* classes, A* exps, A* loss,
                        A* true_prob, A* residual) {
  A maximum[kLanes];
  lane_max(a, K, maximum);
  LaneSum<A> others;
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A e = exp_(a[k * kLanes + r] - maximum[r]);
      exps[k * kLanes + r] = e;
      others.part[r] += k == classes[r] ? A(0) : e;
    }
    others.step();
  }
  others.flush();
  A inverse[kLanes], complement[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    const bool valid = classes[r] >= 0;
    const int64_t at = (valid ? classes[r] : 0) * kLanes + r;
    const double sum = others.total[r] + (valid ? static_cast<double>(exps[at]) : 0.0);
    inverse[r] = valid ? static_cast<A>(1.0 / sum) : A(0);
    loss[r] =
        valid ? cross_entropy(maximum[r], a[at], exps[at], static_cast<A>(others.total[r])) : A(0);
    true_prob[r] = valid ? static_cast<A>(static_cast<double>(exps[at]) / sum) : A(0);
    complement[r] = valid ? static_cast<A>(-others.total[r] / sum) : A(0);
  }
  if (residual == nullptr) return;
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A p = classes[r] < 0 ? A(0) : exps[k * kLanes + r] * inverse[r];
      residual[k * kLanes + r] = k == classes[r] ? complement[r] : p;
    }
  }
}

// Rows [first, first + rows) of `m` into the class-major block `to`; unused lanes are zero.
template <class A>
void load_lanes(const Matrix& m, int64_t first, int64_t rows, int64_t K, A* to) {
  for (int64_t r = 0; r < rows; ++r) load_row(m, first + r, 0, to + r, kLanes, K);
  for (int64_t r = rows; r < kLanes; ++r) {
    for (int64_t k = 0; k < K; ++k) to[k * kLanes + r] = A(0);
  }
}

template <class A>
void store_lanes(const A* from, int64_t first, int64_t rows, int64_t K, A* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < K; ++k) to[(first + r) * K + k] = from[k * kLanes + r];
  }
}

// Classes of the block's rows; unused lanes take no part.
inline void load_classes(const int32_t* classes, int64_t first, int64_t rows, int32_t* to) {
  for (int64_t r = 0; r < kLanes; ++r) to[r] = r < rows ? classes[first + r] : -1;
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
