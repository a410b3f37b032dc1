// What the kernels of Eq. 9 share: their arguments, the formulas of one source, how many rows take
// part, and how the last block combines the sums of all.
#pragma once

#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {

inline constexpr int kCountBlocks = 64;
inline constexpr int kRowThreads = 128;          // of a block whose threads have a row each
inline constexpr int64_t kCountedByEach = 1024;  // rows that every block counts for itself

inline constexpr int64_t kMostChunks = 4096;  // of rows that clusters of blocks take

struct Source {
  const void* data;
  int64_t row_stride, col_stride;
};

struct DistillationArguments {
  int64_t N, K;
  int S;
  double temperature, ce_weight, kl_weight;
  Direction direction;
  Matrix logits;
  Values source_weights;
  Labels labels;
  Reduction reduction;
  void *row_kl, *grad, *loss, *cross_entropy, *kl;
  Dtype grad_dtype;
  const unsigned* counted;  // (kCountBlocks,) rows that take part, null: each block counts
  double* partials;         // (partial sums, 2): cross-entropies, divergences
  unsigned* counters;       // 0: blocks that are done; 1: chunks of rows that were taken
  int64_t chunk;            // rows of one
  int64_t staged;           // classes of each row that lie in shared memory
  int rows_staged;  // for so many rows there is room: the student and the sources that come first
  Source sources[kMostSources];
  Dtype dtypes[kMostSources];
};

template <class A>
__device__ __forceinline__ A source_weight(const DistillationArguments& d, int j) {
  return d.source_weights.data == nullptr ? A(1) / static_cast<A>(d.S)
                                          : value_at<A>(d.source_weights, j);
}

template <class A>
__device__ __forceinline__ A source_element(const DistillationArguments& d, int j, int64_t i,
                                            int64_t k) {
  const Source& s = d.sources[j];
  return load_element<A>(s.data, i * s.row_stride + k * s.col_stride, d.dtypes[j]);
}

template <class A>
__device__ __forceinline__ A student_element(const DistillationArguments& d, int64_t i, int64_t k) {
  return load_element<A>(d.logits.data, i * d.logits.row_stride + k * d.logits.col_stride,
                         d.logits.dtype);
}

// exp(x) of x <= 0; -inf gives 0. What rounding x / ln 2 loses, a part in |x| 2^24, is put back.
__device__ __forceinline__ float fast_exp(float x) {
  const float y = x * 1.44269504f;
  const float e = exp2_approximate(y);
  const float lost = fmaf(x, 1.925963033e-8f, fmaf(x, 1.44269504f, -y));
  return e == 0.0f ? 0.0f : fmaf(e * lost, 0.693147181f, e);
}
__device__ __forceinline__ double fast_exp(double x) { return exp_(x); }

// exp(x) from e = exp(x / temperature), if one is a small power of the other.
template <class A>
__device__ __forceinline__ A plain_exp(A x, A e, A temperature) {
  return temperature == A(1) ? e : (temperature == A(2) ? e * e : fast_exp(x));
}

// Log-ratio of the two softmaxes but for (s - t - offset) / T, where s - t is taken relative to the
// likeliest class of the weighing distribution: only what the others add to it moves the gradient.
template <class A>
struct Ratio {
  A weight, offset, log_ratio, maximum, inverse;  // of the source
};

// `anchor`: reverse, the source at the student's likeliest class; forward, the student at the
// source's.
template <class A>
__device__ __forceinline__ Ratio<A> ratio_of(bool reverse, A weight, A student_maximum,
                                             A student_total, A maximum, A total, A anchor,
                                             A inverse_temperature) {
  const A difference = reverse ? student_maximum - anchor : anchor - maximum;
  const A offset = difference - difference == A(0) ? difference : A(0);  // 0 beside -inf
  const A rest = shifted_difference(student_maximum, maximum, offset);
  const A log_ratio = log_(student_total / total) + rest * inverse_temperature;
  return {weight, offset, log_ratio, maximum, A(1) / total};
}

// Of one class: adds w KL's share to `kl` and to `slope` what the gradient needs: reverse
// w (s - t) / T but for a constant of the row, forward w (p - q).
template <class A>
__device__ __forceinline__ void add_source(bool reverse, const Ratio<A>& r, A s, A t, A p,
                                           A inverse_temperature, A& slope, A& kl) {
  const A q = fast_exp((t - r.maximum) * inverse_temperature) * r.inverse;
  const A gap = shifted_difference(s, t, r.offset);
  const A x = r.log_ratio - gap * inverse_temperature;  // log q - log p
  if (reverse) {
    slope += r.weight * inverse_temperature * gap;
    kl += r.weight * kl_share(p, q, x);
  } else {
    slope -= r.weight * probability_difference(p, q, x);
    kl += r.weight * kl_share(q, p, -x);
  }
}

// Of one class: the divergences' share of the gradient, without its factor. Reverse
// p (delta - E_p delta), forward p - qbar, which sums to 0 but for the rounding of log_ratio: p
// times the sum takes that out again.
template <class A>
__device__ __forceinline__ A centred_slope(bool reverse, A p, A slope, A mean) {
  if (!reverse) return slope - p * mean;
  return p == A(0) ? A(0) : p * (slope - mean);
}

// Rows that take part, by every thread of the block.
__device__ __forceinline__ double rows_of_all(const DistillationArguments& d) {
  if (d.labels.data == nullptr) return static_cast<double>(d.N);
  if (d.counted != nullptr) {
    static_assert(kCountBlocks == 64, "two a lane");
    return static_cast<double>(warp_sum(d.counted[lane_id()] + d.counted[32 + lane_id()]));
  }
  return static_cast<double>(
      block_sum(count_labelled(d.labels, d.N, threadIdx.x, static_cast<int64_t>(blockDim.x))));
}

// What a row's cross-entropy and divergence are multiplied by in the gradient.
template <class A>
struct Factors {
  A ce, kl;
};

template <class A>
__device__ __forceinline__ Factors<A> factors_of(const DistillationArguments& d, double rows) {
  const bool mean = d.reduction == Reduction::mean;
  const double divisor = mean && rows > 1.0 ? rows : 1.0;
  return {static_cast<A>(d.ce_weight / divisor),
          static_cast<A>(d.kl_weight / divisor) / static_cast<A>(d.temperature)};
}

template <class A>
__device__ __forceinline__ void put_scalar(void* to, double value) {
  if (to != nullptr) *static_cast<A*>(to) = static_cast<A>(value);
}

// The results, by the last of `blocks` that come here, from `count` partial sums.
template <class A>
__device__ __forceinline__ void combine_partials(const DistillationArguments& d, double rows,
                                                 unsigned blocks, unsigned count) {
  if (!is_last_block(d.counters, blocks)) return;
  double ce = 0.0, kl = 0.0;
#pragma unroll 8
  for (unsigned b = threadIdx.x; b < count; b += blockDim.x) {
    ce += d.partials[2 * b];
    kl += d.partials[2 * b + 1];
  }
  ce = block_sum(ce);
  kl = block_sum(kl);
  if (threadIdx.x != 0) return;
  d.counters[1] = 0;
  if (d.reduction == Reduction::mean) {
    ce /= rows;
    kl /= rows;
  }
  const double ce_term = d.labels.data == nullptr ? 0.0 : weighted_mean(d.ce_weight, ce);
  put_scalar<A>(d.loss, ce_term + weighted_mean(d.kl_weight, kl));
  put_scalar<A>(d.cross_entropy, ce);
  put_scalar<A>(d.kl, kl);
}

// ce and kl: the sums of this thread's rows, in a fixed order.
template <class A>
__device__ __forceinline__ void combine_blocks(const DistillationArguments& d, double rows,
                                               double ce, double kl) {
  ce = block_sum(ce);
  kl = block_sum(kl);
  if (threadIdx.x == 0) {
    d.partials[2 * blockIdx.x] = ce;
    d.partials[2 * blockIdx.x + 1] = kl;
  }
  combine_partials<A>(d, rows, gridDim.x, gridDim.x);
}

// V classes of the gradient from element `at` on, which are aligned for a vector of them.
template <int V, class A>
__device__ __forceinline__ void store_gradient(const DistillationArguments& d, int64_t at,
                                               const A (&values)[V]) {
  if constexpr (V >= 4) {
    if (d.grad_dtype == Dtype::bfloat16) {
      return store_packed<bfloat16, V>(static_cast<bfloat16*>(d.grad) + at, values);
    }
  }
  if constexpr (V == 1) {
    store_element(d.grad, at, d.grad_dtype, values[0]);
  } else {
    store_array(static_cast<A*>(d.grad) + at, values);
  }
}

template <class Test>
bool all_rows(const DistillationArguments& d, const Test& test) {
  bool holds = test(d.logits);
  for (int j = 0; j < d.S; ++j) {
    const Source& s = d.sources[j];
    holds = holds && test(Matrix{s.data, s.row_stride, s.col_stride, d.dtypes[j]});
  }
  return holds;
}

// False where the rows are not for it.
bool distill_cluster_rows(const DistillationArguments&, Stream);
void distill_short_rows(const DistillationArguments&, bool wide, unsigned blocks, Stream);
void distill_long_rows(const DistillationArguments&, bool wide, unsigned blocks, int threads,
                       size_t shared, Stream);

}  // namespace cuda
}  // namespace pycdgkd
