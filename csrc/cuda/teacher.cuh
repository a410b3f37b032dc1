// What the forward kernel of Eqs. 2-6 is given, what its blocks leave, and what the last of them
// makes of that (teacher.cu).
#pragma once

#include "centred.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int kMostModalities = 8;  // of one launch

struct Part {
  Modality modality;
  bool vectors;  // rows can be read 16 bytes at a time
};

struct Arguments {
  int64_t N, K, M;
  double scale, proto_weight;
  Matrix logits;
  void* logits_residual;
  Labels labels;
  ClassCounts counts;
  Reduction reduction;
  Results results;
  double* partials;   // (1 + M, gridDim.x, 3): loss, true probabilities, rows
  unsigned* counter;  // null: a later launch combines
  int first_part;     // of this launch: 0 is the cross-entropy, 1 + m a modality
  bool in_shared;     // each block centres the prototypes for itself
  int groups;         // of rows that a warp finishes together
  Part parts[kMostModalities];
};

// What a warp adds up over its rows; the same in all its lanes.
struct Sums {
  double loss = 0.0, rate = 0.0, rows = 0.0;
};

// Of sums that each lane has made for itself.
__device__ __forceinline__ Sums sum_lanes(const Sums& mine) {
  return {warp_sum(mine.loss), warp_sum(mine.rate), warp_sum(mine.rows)};
}

// The block's sums to its place among the partial ones.
__device__ __forceinline__ void leave(const Arguments& a, int part, const Sums& sums) {
  __shared__ Sums warps[kWarps];
  if (lane_id() == 0) warps[warp_id()] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Sums total;
  for (int w = 0; w < kWarps; ++w) {
    total.loss += warps[w].loss;
    total.rate += warps[w].rate;
    total.rows += warps[w].rows;
  }
  double* at = a.partials + (static_cast<int64_t>(part) * gridDim.x + blockIdx.x) * 3;
  at[0] = total.loss;
  at[1] = total.rate;
  at[2] = total.rows;
}

template <class A>
__device__ __forceinline__ void put(void* to, int64_t at, double value) {
  if (to != nullptr) static_cast<A*>(to)[at] = static_cast<A>(value);
}

// Eqs. 4-6 from the sums of all parts, by one thread.
template <class A>
__device__ __forceinline__ void combine(const Arguments& a) {
  double* s = a.results.statistics;
  const int64_t M = a.M;
  const double rows = s[2];
  double largest = M > 0 ? s[3 + M] : 0.0;
  for (int64_t m = 1; m < M; ++m) {
    const double rate = s[3 + M + m];
    largest = rate > largest || rate != rate ? rate : largest;
  }
  const double ce = s[0] / s[1];
  double loss = weighted_mean(1.0 - a.proto_weight, ce);
  s[3 + 2 * M] = (1.0 - a.proto_weight) / (s[1] > 1.0 ? s[1] : 1.0);
  for (int64_t m = 0; m < M; ++m) {
    const double rate = s[3 + M + m], mean = s[3 + m] / rows;
    const double lambda = modality_weight(largest, rate), weight = a.proto_weight * lambda;
    // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
    if (lambda != 0.0) loss += weight * mean;
    s[4 + 2 * M + m] = weight * 2.0 * a.scale / (rows > 1.0 ? rows : 1.0);
    put<A>(a.results.losses, m, mean);
    put<A>(a.results.rates, m, rate);
    put<A>(a.results.weights, m, lambda);
  }
  put<A>(a.results.cross_entropy, 0, ce);
  if (a.logits.data == nullptr) {  // one prototype loss alone
    loss = a.reduction == Reduction::mean ? s[3] / rows : s[3];
    s[4 + 2 * M] = 2.0 * a.scale / (rows > 1.0 ? rows : 1.0);
  }
  put<A>(a.results.loss, 0, loss);
}

// The sums of all blocks, a warp a value.
template <class A>
__device__ __forceinline__ void finish(const Arguments& a) {
  double* s = a.results.statistics;
  const int blocks = static_cast<int>(gridDim.x);
  const int64_t values = 3 * (1 + a.M);
  for (int64_t v = warp_id(); v < values; v += kWarps) {
    const int64_t part = v / 3, what = v - 3 * part;
    const bool there = part > 0 || a.logits.data != nullptr;
    double sum = 0.0;
    for (int b = lane_id(); there && b < blocks; b += 32) {
      sum += a.partials[(part * blocks + b) * 3 + what];
    }
    sum = warp_sum(sum);
    if (lane_id() != 0) continue;
    if (part == 0 && what != 1) s[what == 0 ? 0 : 1] = sum;
    if (part == 1 && what == 2) s[2] = sum;
    if (part > 0 && what < 2) s[(what == 0 ? 3 : 3 + a.M) + part - 1] = sum;
  }
  if (threadIdx.x == 0 && a.M == 0) s[2] = 0.0;
  __syncthreads();
  if (threadIdx.x == 0) combine<A>(a);
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
