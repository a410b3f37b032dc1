// Loops over the classes of R rows at once, kLanes values side by side.
//
// Two layouts, the same loops. R = kLanes: an array is (height, kLanes) with a row in each lane and
// a class in each line, height = K. R = 1: one row, folded into lines of kLanes classes and filled
// up with classes of logit -inf, which take no part; height = ceil(K / kLanes). What belongs to a
// row (maximum, sum, ...) is an array of kLanes either way: for R = 1 all of its entries are equal.
#pragma once

#include "rows.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

// Sums over many classes go to double after every kChunk terms: float alone would lose digits.
inline constexpr int64_t kChunk = 64;

template <int64_t R>
inline int64_t lane_height(int64_t K) {
  return R == 1 ? (K + kLanes - 1) / kLanes : K;
}

// part = the sums of term(k, r) over the lines [begin, end), in A; fetch(k) comes before each line.
template <class A, class Term, class Fetch>
inline void lane_part(int64_t begin, int64_t end, A* part, const Term& term, const Fetch& fetch) {
  for (int64_t r = 0; r < kLanes; ++r) part[r] = A(0);
  for (int64_t k = begin; k < end; ++k) {
    fetch(k);
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) part[r] += term(k, r);
  }
}

// total = the sums of term(k, r) over the lines k of each lane r.
template <class A, int64_t R = kLanes, class Term, class Fetch>
inline void lane_sum(int64_t height, double* total, const Term& term, const Fetch& fetch) {
  A part[kLanes];
  lane_part(0, height < kChunk ? height : kChunk, part, term, fetch);
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) total[r] = static_cast<double>(part[r]);
  for (int64_t begin = kChunk; begin < height; begin += kChunk) {
    lane_part(begin, height - begin < kChunk ? height : begin + kChunk, part, term, fetch);
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) total[r] += static_cast<double>(part[r]);
  }
  if (R == 1) {
    for (int64_t r = 1; r < kLanes; ++r) total[0] += total[r];
    for (int64_t r = 1; r < kLanes; ++r) total[r] = total[0];
  }
}

template <class A, int64_t R = kLanes, class Term>
inline void lane_sum(int64_t height, double* total, const Term& term) {
  lane_sum<A, R>(height, total, term, [](int64_t) {});
}

template <class A>
inline A larger(A a, A b) {
  return a > b ? a : b;
}

// Four lines at a time: one alone would wait for the line before it.
template <class A, int64_t R = kLanes>
void lane_max(const A* a, int64_t height, A* maximum) {
  constexpr int64_t kWide = 4 * kLanes;
  A wide[kWide];
  for (int64_t r = 0; r < kWide; ++r) wide[r] = -std::numeric_limits<A>::infinity();
  int64_t k = 0;
  for (; k + 4 <= height; k += 4) {
#pragma omp simd
    for (int64_t r = 0; r < kWide; ++r) wide[r] = larger(a[k * kLanes + r], wide[r]);
  }
  for (; k < height; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) wide[r] = larger(a[k * kLanes + r], wide[r]);
  }
  for (int64_t half = kWide / 2; half >= R; half /= 2) {
    if (half < kLanes && R != 1) break;
    for (int64_t r = 0; r < half; ++r) wide[r] = larger(wide[r + half], wide[r]);
  }
  for (int64_t r = 0; r < kLanes; ++r) maximum[r] = wide[R == 1 ? 0 : r];
}

// value = b_k for the class k whose a_k is the maximum (the last such; 0 if there is none).
template <class A>
void lane_at_maximum(const A* a, const A* maximum, const A* b, int64_t height, A* value) {
  for (int64_t r = 0; r < kLanes; ++r) value[r] = A(0);
  for (int64_t k = 0; k < height; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      value[r] = a[k * kLanes + r] == maximum[r] ? b[k * kLanes + r] : value[r];
    }
  }
}

// value = a_k for the k that `line` names in each lane, 0 where it names none.
template <class A>
void lane_at_line(const A* a, const A* line, int64_t height, A* value) {
  for (int64_t r = 0; r < kLanes; ++r) value[r] = A(0);
  for (int64_t k = 0; k < height; ++k) {
    const A number = static_cast<A>(k);
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      value[r] = number == line[r] ? a[k * kLanes + r] : value[r];
    }
  }
}

// For one folded row: that class itself.
template <class A>
int64_t class_of_maximum(const A* a, const A* maximum, int64_t height) {
  A line[kLanes];  // counted in A: one type, one vector width
  for (int64_t r = 0; r < kLanes; ++r) line[r] = A(-1);
  for (int64_t k = 0; k < height; ++k) {
    const A number = static_cast<A>(k);
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      line[r] = a[k * kLanes + r] == maximum[r] ? number : line[r];
    }
  }
  int64_t found = 0;
  for (int64_t r = 0; r < kLanes; ++r) {
    if (line[r] >= A(0)) found = larger(found, static_cast<int64_t>(line[r]) * kLanes + r);
  }
  return found;
}

// exps = exp((a - maximum) inverse_temperature) and their sums. Meanwhile the memory from `ahead`
// on, `ahead_step` bytes a line, is fetched for whoever comes next.
template <class A, int64_t R>
void lane_exps(const A* a, int64_t height, const A* maximum, A inverse_temperature, A* exps,
               double* total, const char* ahead, int64_t ahead_step) {
  const auto exp_of = [=](int64_t k, int64_t r) {
    const A e = exp_nonpositive((a[k * kLanes + r] - maximum[r]) * inverse_temperature);
    exps[k * kLanes + r] = e;
    return e;
  };
  lane_sum<A, R>(height, total, exp_of,
                 [=](int64_t k) { __builtin_prefetch(ahead + k * ahead_step, 0, 2); });
}

// Eq. 3 and plain cross-entropy alike, from the exponentials' sums over all classes but the true
// one. `complement` is the true class's entry of P - Y as minus the sum of the others (p - 1 would
// cancel), the others are `inverse` times their exponentials. Lanes that are off get zeros.
template <class A>
struct CrossEntropy {
  A loss[kLanes], true_prob[kLanes], complement[kLanes], inverse[kLanes];
};

template <class A>
void lane_losses(const A* maximum, const A* true_logit, const double* others, const A* on,
                 CrossEntropy<A>& result) {
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    const A true_exp = exp_nonpositive(true_logit[r] - maximum[r]);
    const A rest = static_cast<A>(others[r]);
    const A inverse = A(1) / (true_exp + rest);
    const A loss = cross_entropy(maximum[r], true_logit[r], true_exp, rest);
    result.loss[r] = on[r] != A(0) ? loss : A(0);
    result.true_prob[r] = on[r] != A(0) ? true_exp * inverse : A(0);
    result.complement[r] = on[r] != A(0) ? -rest * inverse : A(0);
    result.inverse[r] = on[r] != A(0) ? inverse : A(0);
  }
}

// Loss, true-class probability and, in `residual` (may be null), P - Y. Lanes whose class is
// negative get loss 0, probability 0 and residual 0.
template <class A>
void lane_cross_entropy(const A* a, int64_t K, const int32_t* classes, A* exps, A* loss,
                        A* true_prob, A* residual) {
  A maximum[kLanes], true_logit[kLanes], on[kLanes], line[kLanes];
  lane_max(a, K, maximum);
  for (int64_t r = 0; r < kLanes; ++r) {
    on[r] = classes[r] >= 0 ? A(1) : A(0);
    line[r] = static_cast<A>(classes[r]);
  }
  lane_at_line(a, line, K, true_logit);
  double others[kLanes];
  lane_sum<A>(K, others, [&](int64_t k, int64_t r) {
    const A e = exp_nonpositive(a[k * kLanes + r] - maximum[r]);
    exps[k * kLanes + r] = e;
    return e * (static_cast<A>(k) == line[r] ? A(0) : A(1));
  });
  CrossEntropy<A> result;
  lane_losses(maximum, true_logit, others, on, result);
  for (int64_t r = 0; r < kLanes; ++r) {
    loss[r] = result.loss[r];
    true_prob[r] = result.true_prob[r];
  }
  if (residual == nullptr) return;
  for (int64_t k = 0; k < K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A p = on[r] != A(0) ? exps[k * kLanes + r] * result.inverse[r] : A(0);
      residual[k * kLanes + r] = static_cast<A>(k) == line[r] ? result.complement[r] : p;
    }
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
