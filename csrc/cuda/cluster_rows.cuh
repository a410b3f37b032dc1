// A row of Eq. 9 by a cluster of blocks, from the second meeting to the gradient.
#pragma once

#include "held_row.cuh"

namespace pycdgkd {
namespace cuda {

template <class T, int S, int R, bool reverse>
class ClusterRows : public HeldRow<T, S, R, reverse> {
  using Held = HeldRow<T, S, R, reverse>;
  using Held::ask_for, Held::find_maxima, Held::load, Held::meet, Held::place, Held::source;
  using Held::begin_, Held::constant_, Held::count_, Held::d_, Held::i_, Held::maxima_;
  using Held::offsets_, Held::rank_, Held::shared_, Held::size_, Held::temperature_;
  using Held::student, Held::V, Held::vector;
  using Held::vectors_, Held::y_;
  static constexpr int W = kPart, parts = V / W, Q = kSums<S, reverse>;
  static constexpr bool exact = sizeof(T) == 4;

 public:
  __device__ __forceinline__ ClusterRows(const DistillationArguments& d, Shared<S, reverse>& shared)
      : Held(d, shared), scale_(scale_of(d.temperature)) {}

  // Everything of row i; its loss is added to the cluster's sums, next is asked for.
  __device__ __forceinline__ void work(int64_t i, int64_t next, int y,
                                       const Factors<float>& factors) {
    i_ = i;
    y_ = y;
    const float true_logit = student_element<float>(d_, i, y);
    load();
    find_maxima();
    count_ == S ? add_up<true>() : add_up<false>();
    // Not sooner: the rows of all clusters, twice, are more than the cache keeps.
    if (next < d_.N) ask_for(next);
    if (warp_id() == 0) settle();
    __syncthreads();
    const float true_exp =
        plain(true_logit - maxima_[0], exponential<exact>(true_logit - maxima_[0], scale_));
    const Residual residual(true_exp, shared_.sums[1]);
    float divergence = shared_.divergence;
    if (shared_.careful) {
      divergence = once_more(factors, residual);
    } else if (d_.grad != nullptr) {
      count_ == S ? write<true>(factors, residual) : write<false>(factors, residual);
    }
    if (rank_ != 0 || threadIdx.x != 0) return;
    if (d_.row_kl != nullptr) static_cast<float*>(d_.row_kl)[i] = divergence;
    if (d_.labels.data != nullptr) {
      shared_.ce +=
          static_cast<double>(cross_entropy(maxima_[0], true_logit, true_exp, residual.others));
    }
    shared_.kl += static_cast<double>(divergence);
  }

 private:
  // Of the cross-entropy: e^(s - max) times `factor`, of the true class -others times it.
  struct Residual {
    float others, factor;
    __device__ Residual(float true_exp, float others_)
        : others(others_), factor(1.0f / (true_exp + others_)) {}
  };

  __device__ __forceinline__ float inverse_temperature() const { return 1.0f / temperature_; }
  __device__ __forceinline__ float plain(float x, float e) const {
    return temperature_ == 2.0f
               ? e * e
               : (temperature_ == 1.0f
                      ? e
                      : exponential<exact>(x, Scale{1.44269504f, 1.925963033e-8f}));
  }

  // ---- the second meeting ----

  template <bool exactly>
  __device__ __forceinline__ void exponentials(const float (&x)[W], float maximum,
                                               float (&e)[W]) const {
#pragma unroll
    for (int v = 0; v < W; ++v) e[v] = exponential<exactly>(x[v] - maximum, scale_);
  }

  // Reverse: sum_j w_j (s - t_j - offset_j) / T, exactly 0 where all sources have their anchors.
  template <bool all>
  __device__ __forceinline__ void slopes(int r, int h, const float (&s)[W],
                                         float (&slope)[W]) const {
#pragma unroll
    for (int v = 0; v < W; ++v) slope[v] = constant_;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!all && j >= count_) continue;
      const float factor = shared_.factors[j];
      float t[W];
      unpack_part<T>(place(1 + j, r), h, t);
#pragma unroll
      for (int v = 0; v < W; ++v) slope[v] += factor * (s[v] - t[v]);
    }
  }

  // all: every slot has a source, as it mostly is; then nothing is asked class by class.
  template <bool all>
  __device__ __forceinline__ void add_up() {
    float sums[Q] = {};
#pragma unroll 1
    for (int r = 0; r < R && vector(r) < vectors_; ++r) {
#pragma unroll
      for (int h = 0; h < parts; ++h) add_part<all>(r, h, sums);
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const float total = warp_sum(sums[q]);
      if (lane_id() == 0) shared_.warp_sums[warp_id()][q] = total;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < Q) {
      double total = 0.0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        total += static_cast<double>(shared_.warp_sums[w][threadIdx.x]);
      }
      for (unsigned q = 0; q < size_; ++q) {
        *in_block(&shared_.second[rank_][threadIdx.x], q) = total;
      }
    }
    meet(warp_id() == 0);
  }

  template <bool all>
  __device__ __forceinline__ void add_part(int r, int h, float (&sums)[Q]) const {
    float s[W], e[W], x[W];
    unpack_part<T>(place(0, r), h, s);
    exponentials<exact>(s, maxima_[0], e);
    shares(r, h, s, e, 0.0f, x);
#pragma unroll
    for (int v = 0; v < W; ++v) {
      sums[0] += e[v];
      sums[1] += x[v];
    }
    float slope[W];
#pragma unroll
    for (int v = 0; v < W; ++v) slope[v] = constant_;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!all && j >= count_) continue;
      const float factor = shared_.factors[j];
      float q[W];
      unpack_part<T>(place(1 + j, r), h, x);
      exponentials<false>(x, maxima_[1 + j], q);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        sums[2 + j] += q[v];
        if (reverse) {
          slope[v] += factor * (s[v] - x[v]);
        } else {
          sums[2 + S + j] += q[v] * (s[v] - x[v] - offsets_[j]);
        }
      }
    }
    if (reverse) {
#pragma unroll
      for (int v = 0; v < W; ++v) sums[2 + S] += e[v] * slope[v];
    }
  }

  // e^(s - max), of the true class `own`.
  __device__ __forceinline__ void shares(int r, int h, const float (&s)[W], const float (&e)[W],
                                         float own, float (&share)[W]) const {
    const int first = vector(r) * V + h * W;
    if (temperature_ == 2.0f) {  // asked once, not of every class
#pragma unroll
      for (int v = 0; v < W; ++v) share[v] = e[v] * e[v];
    } else {
#pragma unroll
      for (int v = 0; v < W; ++v) share[v] = plain(s[v] - maxima_[0], e[v]);
    }
    if (y_ < first || y_ >= first + W) return;
#pragma unroll
    for (int v = 0; v < W; ++v) share[v] = first + v == y_ ? own : share[v];
  }

  // By the first warp: ratios, mean slope and divergence from the sums alone, or the word that
  // these say too little.
  __device__ __forceinline__ void settle() const {
    const int lane = lane_id();
    if (lane < Q) {
      double total = 0.0;
      for (unsigned rank = 0; rank < size_; ++rank) total += shared_.second[rank][lane];
      shared_.sums[lane] = static_cast<float>(total);
    }
    __syncwarp();
    const float* sums = shared_.sums;
    float part = 0.0f, magnitude = 0.0f;
    if (lane < count_) {
      const float weight = shared_.weights[lane], factor = shared_.factors[lane];
      const Ratio<float> ratio =
          ratio_of(reverse, weight, shared_.maxima[0], sums[0], shared_.maxima[1 + lane],
                   sums[2 + lane], shared_.anchors[lane], 1.0f / temperature_);
      shared_.ratios[lane] = ratio;
      const float gap = reverse ? 0.0f : factor * sums[2 + S + lane] * ratio.inverse;
      part = weight * (reverse ? -ratio.log_ratio : ratio.log_ratio) - gap;
      magnitude = weight * fabsf(ratio.log_ratio) + factor * fabsf(ratio.offset) + fabsf(gap);
    }
    const float mean = reverse ? sums[2 + S] / sums[0] : 0.0f;
    const float divergence = count_ > 0 ? mean + warp_sum(part) : 0.0f;
    magnitude = 1.0f + fabsf(mean) + warp_sum(magnitude);
    if (lane != 0) return;
    // Each sum is good to some 1e-7 of `magnitude`: to 3e-6 of the divergence, if it is no smaller.
    const bool good = divergence >= magnitude / 32.0f && divergence - divergence == 0.0f;
    shared_.careful = count_ > 0 && !good;
    shared_.mean = mean;
    shared_.divergence = divergence;
  }

  template <bool all>
  __device__ __forceinline__ void write(const Factors<float>& factors,
                                        const Residual& residual) const {
    const float kl_factor = count_ > 0 ? factors.kl / shared_.sums[0] : 0.0f;
    const float mean = shared_.mean, ce_factor = factors.ce * residual.factor;
    float total_weight = 0.0f;
    if (!reverse) {
#pragma unroll
      for (int j = 0; j < S; ++j) total_weight += j < count_ ? shared_.weights[j] : 0.0f;
    }
#pragma unroll 1
    for (int r = 0; r < R && vector(r) < vectors_; ++r) {
      float values[V];
#pragma unroll
      for (int h = 0; h < parts; ++h) {
        float s[W], e[W], part[W];
        unpack_part<T>(place(0, r), h, s);
        exponentials<exact>(s, maxima_[0], e);
        if (reverse) {
          slopes<all>(r, h, s, part);
#pragma unroll
          for (int v = 0; v < W; ++v) part[v] = kl_factor * e[v] * (part[v] - mean);
        } else {
          differences<all>(r, h, e, kl_factor * total_weight, factors.kl, part);
        }
        if (d_.labels.data != nullptr) {
          shares(r, h, s, e, -residual.others, s);
#pragma unroll
          for (int v = 0; v < W; ++v) part[v] += ce_factor * s[v];
        }
#pragma unroll
        for (int v = 0; v < W; ++v) values[h * W + v] = part[v];
      }
      store_gradient(d_, i_ * d_.K + static_cast<int64_t>(vector(r)) * V, values);
    }
  }

  // Forward: factor e less the sources' share, sum_j w_j q_j.
  template <bool all>
  __device__ __forceinline__ void differences(int r, int h, const float (&e)[W], float factor,
                                              float kl_factor, float (&difference)[W]) const {
#pragma unroll
    for (int v = 0; v < W; ++v) difference[v] = factor * e[v];
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!all && j >= count_) continue;
      const float weight = kl_factor * shared_.ratios[j].weight * shared_.ratios[j].inverse;
      float t[W], q[W];
      unpack_part<T>(place(1 + j, r), h, t);
      exponentials<false>(t, maxima_[1 + j], q);
#pragma unroll
      for (int v = 0; v < W; ++v) difference[v] -= weight * q[v];
    }
  }

  // ---- a row whose sums say too little ----

  // Sum of all threads of the cluster; `turn` alternates.
  __device__ __forceinline__ double everyone(double value, int turn) const {
    value = warp_sum(value);
    if (lane_id() == 0) shared_.warp_extra[warp_id()] = value;
    __syncthreads();
    if (threadIdx.x < size_) {
      double total = 0.0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += shared_.warp_extra[w];
      *in_block(&shared_.extra[turn][rank_], threadIdx.x) = total;
    }
    meet(warp_id() == 0);
    double total = 0.0;
    for (unsigned q = 0; q < size_; ++q) total += shared_.extra[turn][q];
    return total;
  }

  // body(k, s, e, p, slope, share) of each class of this thread's, by its own formula; the logits
  // are read again.
  template <class Body>
  __device__ __forceinline__ void classes(const Body& body) const {
    const T* s_row = reinterpret_cast<const T*>(student(i_));
    const int end = begin_ + static_cast<int>(blockDim.x) * R;
    const int last = (end < vectors_ ? end : vectors_) * V;
#pragma unroll 1
    for (int k = begin_ * V + static_cast<int>(threadIdx.x); k < last;
         k += static_cast<int>(blockDim.x)) {
      const float s = to_arithmetic(s_row[k]);
      const float e = exponential<exact>(s - maxima_[0], scale_), p = e / shared_.sums[0];
      float slope = 0.0f, share = 0.0f;
#pragma unroll 1
      for (int j = 0; j < count_; ++j) {
        const float t = to_arithmetic(reinterpret_cast<const T*>(source(j, i_))[k]);
        add_source(reverse, shared_.ratios[j], s, t, p, inverse_temperature(), slope, share);
      }
      body(k, s, e, p, slope, share);
    }
  }

  __device__ __forceinline__ float once_more(const Factors<float>& factors,
                                             const Residual& residual) const {
    double mine = 0.0;
    classes([&](int, float, float, float p, float slope, float) {
      mine += static_cast<double>(!reverse ? slope : (p == 0.0f ? 0.0f : p * slope));
    });
    const auto mean = static_cast<float>(everyone(mine, 0));
    mine = 0.0;
    classes([&](int k, float s, float e, float p, float slope, float share) {
      mine += static_cast<double>(share);
      if (d_.grad == nullptr) return;
      float value = factors.kl == 0.0f ? 0.0f : factors.kl * centred_slope(reverse, p, slope, mean);
      if (d_.labels.data != nullptr) {
        const float own = k == y_ ? -residual.others : plain(s - maxima_[0], e);
        value += factors.ce * residual.factor * own;
      }
      store_element(d_.grad, i_ * d_.K + k, d_.grad_dtype, value);
    });
    return static_cast<float>(everyone(mine, 1));
  }

  const Scale scale_;
};

}  // namespace cuda
}  // namespace pycdgkd
