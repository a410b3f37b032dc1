// Eq. 9: cross-entropy and the weighted divergences to all sources, value and gradient in one pass.
#include "lanes.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

// Working memory of one block of rows, each array (K, kLanes).
template <class A>
struct Workspace {
  explicit Workspace(int64_t K)
      : count(K * kLanes),
        storage(6 * count),
        logits(storage.get()),
        prob(logits + count),
        source(prob + count),
        source_prob(source + count),
        slope(source_prob + count),
        grad(slope + count) {}
  int64_t count;
  Scratch<A> storage;
  A *logits, *prob, *source, *source_prob, *slope, *grad;
  A maximum[kLanes];  // of the logits
  double log_sum[kLanes];
};

// Adds w KL(p || q), or w KL(q || p), to `sum` and, to `slope`, what the gradient needs:
// reverse: w (s - t) / T but for a constant of the row, forward: w (p - q). The log-ratio of p and
// q is formed from s - t, not from two logarithms: near p = q those would cancel.
template <class A>
void add_source(const Distillation& d, Workspace<A>& w, A weight, A inverse_temperature,
                LaneSum<double>& sum) {
  const bool reverse = d.direction == Direction::reverse;
  A source_maximum[kLanes], anchor[kLanes], offset[kLanes], log_ratio[kLanes];
  double log_sum[kLanes];
  lane_softmax(w.source, d.K, inverse_temperature, w.source_prob, source_maximum, log_sum);
  // s - t is taken relative to the likeliest class of the weighing distribution: only what the
  // others add to it moves the gradient.
  reverse ? lane_at_maximum(w.logits, w.maximum, w.source, d.K, anchor)
          : lane_at_maximum(w.source, source_maximum, w.logits, d.K, anchor);
  for (int64_t r = 0; r < kLanes; ++r) {
    const A difference = reverse ? w.maximum[r] - anchor[r] : anchor[r] - source_maximum[r];
    offset[r] = difference - difference == A(0) ? difference : A(0);  // 0 beside -inf
    const double rest =
        shifted_difference(static_cast<double>(w.maximum[r]),
                           static_cast<double>(source_maximum[r]), static_cast<double>(offset[r]));
    log_ratio[r] = static_cast<A>(w.log_sum[r] - log_sum[r] + rest / d.temperature);
  }
  LaneSum<A> share;
  for (int64_t k = 0; k < d.K; ++k) {
    const int64_t row = k * kLanes;
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A p = w.prob[row + r], q = w.source_prob[row + r];
      const A difference = shifted_difference(w.logits[row + r], w.source[row + r], offset[r]);
      const A delta = difference * inverse_temperature;
      const A x = log_ratio[r] - delta;  // log q - log p
      if (reverse) {
        share.part[r] += kl_share(p, q, x);
        w.slope[row + r] += weight * (p == A(0) ? A(0) : delta);
      } else {
        share.part[r] += kl_share(q, p, -x);
        w.slope[row + r] -= weight * probability_difference(p, q, x);
      }
    }
    share.step();
  }
  share.flush();
  for (int64_t r = 0; r < kLanes; ++r) sum.total[r] += static_cast<double>(weight) * share.total[r];
}

// Adds factor * d KL / d logits: reverse (1/T) p (delta - E_p delta), forward (1/T) (p - qbar). The
// latter sums to 0 but for the rounding of log_ratio, which p times the sum takes out again.
template <class A>
void add_divergence_grad(const Distillation& d, const Workspace<A>& w, A factor, const A* lane_on) {
  const bool reverse = d.direction == Direction::reverse;
  LaneSum<A> sum;
  for (int64_t k = 0; k < d.K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const A slope = w.slope[k * kLanes + r];
      sum.part[r] += reverse ? w.prob[k * kLanes + r] * slope : slope;
    }
    sum.step();
  }
  sum.flush();
  A mean[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) mean[r] = static_cast<A>(sum.total[r]);
  for (int64_t k = 0; k < d.K; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t at = k * kLanes + r;
      const A p = w.prob[at], slope = w.slope[at];
      const A centred = reverse ? p * (slope - mean[r]) : slope - p * mean[r];
      const A grad = reverse && p == A(0) ? A(0) : centred;
      w.grad[at] += lane_on[r] != A(0) ? factor * grad : A(0);
    }
  }
}

// The divergences of one block: fills row_kl (kLanes) and adds to w.grad.
template <class A>
void divergences(const Distillation& d, Workspace<A>& w, int64_t first, int64_t rows,
                 const A* lane_on, double* row_kl) {
  for (int64_t r = 0; r < kLanes; ++r) row_kl[r] = 0.0;
  for (int64_t at = 0; at < w.count; ++at) w.slope[at] = w.grad[at] = A(0);
  if (d.S == 0) return;
  const A inverse_temperature = static_cast<A>(1.0 / d.temperature);
  lane_softmax(w.logits, d.K, inverse_temperature, w.prob, w.maximum, w.log_sum);
  LaneSum<double> sum;
  for (int64_t j = 0; j < d.S; ++j) {
    if (d.source_weights[j] == 0.0) continue;
    load_lanes(d.sources[j], first, rows, d.K, w.source);
    add_source(d, w, static_cast<A>(d.source_weights[j]), inverse_temperature, sum);
  }
  for (int64_t r = 0; r < kLanes; ++r) row_kl[r] = lane_on[r] != A(0) ? sum.total[r] : 0.0;
  if (d.grad != nullptr && d.kl_factor != 0.0) {
    add_divergence_grad(d, w, static_cast<A>(d.kl_factor) * inverse_temperature, lane_on);
  }
}

// Cross-entropy at temperature 1: returns the block's sum and adds to w.grad.
template <class A>
double add_cross_entropy(const Distillation& d, Workspace<A>& w, const int32_t* classes) {
  A loss[kLanes], true_prob[kLanes];
  lane_cross_entropy(w.logits, d.K, classes, w.prob, loss, true_prob, w.slope);
  const A factor = static_cast<A>(d.ce_factor);
  for (int64_t at = 0; at < w.count; ++at) w.grad[at] += factor * w.slope[at];
  double sum = 0.0;
  for (int64_t r = 0; r < kLanes; ++r) sum += static_cast<double>(loss[r]);
  return sum;
}

template <class A>
void block(const Distillation& d, Workspace<A>& w, int64_t index) {
  const int64_t first = index * kBlockRows;
  const int64_t rows = d.N - first < kBlockRows ? d.N - first : kBlockRows;
  int32_t classes[kLanes];
  A lane_on[kLanes];
  if (d.classes != nullptr) load_classes(d.classes, first, rows, classes);
  for (int64_t r = 0; r < kLanes; ++r) {
    lane_on[r] = r < rows && (d.classes == nullptr || classes[r] >= 0) ? A(1) : A(0);
  }
  load_lanes(d.logits, first, rows, d.K, w.logits);
  double row_kl[kLanes];
  divergences(d, w, first, rows, lane_on, row_kl);
  d.block_kl[index] = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    d.block_kl[index] += row_kl[r];
    if (d.row_kl != nullptr) static_cast<A*>(d.row_kl)[first + r] = static_cast<A>(row_kl[r]);
  }
  d.block_ce[index] = d.classes != nullptr ? add_cross_entropy(d, w, classes) : 0.0;
  if (d.grad != nullptr) store_lanes(w.grad, first, rows, d.K, static_cast<A*>(d.grad));
}

template <class A>
void scale(const ScaleRows& s, ParallelFor threads) {
  parallel_for(threads, s.N, s.K, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(s.K);
    A* row = scratch.get();
    for (int64_t i = begin; i < end; ++i) {
      const A* unit = static_cast<const A*>(s.unit) + i * s.K;
      const A factor = static_cast<A>(s.factors[i * s.factor_stride]);
#pragma omp simd
      for (int64_t k = 0; k < s.K; ++k) row[k] = factor * unit[k];
      store_row(row, s.grad, s.grad_dtype, i, s.K);
    }
  });
}

template <class A>
void run(const Distillation& d, ParallelFor threads) {
  parallel_for(threads, num_blocks(d.N), kBlockRows * d.K * (d.S + 2),
               [&](int64_t begin, int64_t end) {
                 Workspace<A> workspace(d.K);
                 for (int64_t index = begin; index < end; ++index) block(d, workspace, index);
               });
}

}  // namespace

void distillation(const Distillation& d, ParallelFor threads) {
  d.wide ? run<double>(d, threads) : run<float>(d, threads);
}

void scale_rows(const ScaleRows& s, ParallelFor threads) {
  s.wide ? scale<double>(s, threads) : scale<float>(s, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
