// A row of Eq. 9 by a cluster of blocks, from the second meeting to the gradient.
#pragma once

#include "held_row.cuh"

namespace pycdgkd {
namespace cuda {

template <class T, int S, int R, bool reverse>
class ClusterRows : public HeldRow<T, S, R, reverse> {
  using Held = HeldRow<T, S, R, reverse>;
  using Held::anchors_, Held::announce, Held::begin_, Held::count_, Held::d_;
  using Held::find_maxima, Held::held_, Held::i_, Held::maxima_, Held::meet, Held::place, Held::rank_;
  using Held::shared_, Held::size_, Held::source, Held::student, Held::temperature_, Held::V;
  using Held::vector, Held::vectors_, Held::y_;
  static constexpr int W = kPart, parts = V / W, Q = kSums<S, reverse>;
  static constexpr bool exact = sizeof(T) == 4;

 public:
  using Held::ask_for;
  __device__ __forceinline__ ClusterRows(const DistillationArguments& d, Shared<S, reverse>& shared)
      : Held(d, shared), scale_(scale_of(d.temperature)) {
#pragma unroll
    for (int j = 0; j < S; ++j) factors_[j] = j < count_ ? shared.factors[j] : 0.0f;
  }

  // Everything of row i, which was asked for; its loss is added to the cluster's sums, and `next`
  // is asked for.
  __device__ __forceinline__ void work(int64_t i, int y, int64_t next,
                                       const Factors<float>& factors) {
    i_ = i;
    y_ = y;
    const float true_logit = student_element<float>(d_, i, y);
    await_copies();
    find_maxima();
    add_up();
    announce(next);  // not sooner: the rows of all clusters, twice, are more than the cache keeps
    if (warp_id() == 0) settle();
    __syncthreads();
    const float true_exp =
        plain(true_logit - maxima_[0], exponential<exact>(true_logit - maxima_[0], scale_));
    const Residual residual(true_exp, shared_.sums[1]);
    float divergence = shared_.divergence;
    if (shared_.careful) {
      divergence = once_more(factors, residual);
    } else if (d_.grad != nullptr) {
      write(factors, residual);
    }
    ask_for(next);
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

  // e^(s - max) of the student's classes, x = s - max and e = e^(x / T); of the true class, which is
  // none of them where `usual`, `own`.
  template <bool usual>
  __device__ __forceinline__ void shares(int first, const float (&x)[W], const float (&e)[W],
                                         float own, float (&share)[W]) const {
    if (temperature_ == 2.0f) {  // asked once, not of every class
#pragma unroll
      for (int v = 0; v < W; ++v) share[v] = e[v] * e[v];
    } else {
#pragma unroll
      for (int v = 0; v < W; ++v) share[v] = plain(x[v], e[v]);
    }
    if constexpr (!usual) {
#pragma unroll
      for (int v = 0; v < W; ++v) share[v] = first + v == y_ ? own : share[v];
    }
  }

  // Whether, as it mostly is, every slot has a source and the true class is none of vector r: then
  // nothing is asked class by class.
  __device__ __forceinline__ bool is_usual(int r) const {
    const int at = y_ - vector(r) * V;
    return count_ == S && (at < 0 || at >= V);
  }

  // ---- the second meeting ----

  __device__ __forceinline__ void add_up() {
    float sums[Q] = {};
#pragma unroll 1
    for (int r = 0; r < held_; ++r) is_usual(r) ? add<true>(r, sums) : add<false>(r, sums);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const float total = warp_sum(sums[q]);
      if (lane_id() == 0) shared_.warp_sums[warp_id()][q] = total;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < Q) {
      double total = 0.0;
#pragma unroll 8
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        total += static_cast<double>(shared_.warp_sums[w][threadIdx.x]);
      }
      for (unsigned q = 0; q < size_; ++q) {
        *in_block(&shared_.second[rank_][threadIdx.x], q) = total;
      }
    }
    meet(warp_id() == 0);
  }

  // Of the classes of vector r.
  template <bool usual>
  __device__ __forceinline__ void add(int r, float (&sums)[Q]) const {
    uint4 raw[S + 1];
#pragma unroll
    for (int j = 0; j <= S; ++j) raw[j] = usual || j <= count_ ? *place(j, r) : uint4{};
#pragma unroll
    for (int h = 0; h < parts; ++h) {
      float s[W], x[W], e[W], share[W];
      unpack_part<T>(raw[0], h, s);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        x[v] = s[v] - maxima_[0];
        e[v] = exponential<exact>(x[v], scale_);
      }
      shares<usual>(vector(r) * V + h * W, x, e, 0.0f, share);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        sums[0] += e[v];
        sums[1] += share[v];
      }
      if constexpr (reverse) {
        add_slopes<usual>(raw, r, h, x, e, sums);
      } else {
        add_gaps<usual>(raw, h, s, sums);
      }
    }
  }

  // Reverse: the slopes sum_j w_j ((s - max) - (t_j - anchor_j)) / T, exactly 0 where all sources
  // have their anchors. With s - max they take the places of the logits.
  template <bool usual>
  __device__ __forceinline__ void add_slopes(const uint4 (&raw)[S + 1], int r, int h,
                                             const float (&x)[W], const float (&e)[W],
                                             float (&sums)[Q]) const {
    float total = 0.0f, slope[W];
#pragma unroll
    for (int j = 0; j < S; ++j) total += factors_[j];
#pragma unroll
    for (int v = 0; v < W; ++v) slope[v] = usual || count_ > 0 ? total * x[v] : 0.0f;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!usual && j >= count_) continue;
      const float begin = (anchors_[j] - maxima_[1 + j]) * scale_.hi;
      float t[W];
      unpack_part<T>(raw[1 + j], h, t);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        const float a = t[v] - anchors_[j];
        sums[2 + j] += exp2_approximate(fmaf(a, scale_.hi, begin));
        slope[v] -= factors_[j] * a;
      }
    }
#pragma unroll
    for (int v = 0; v < W; ++v) sums[2 + S] += e[v] * slope[v];
    store_array(reinterpret_cast<float*>(place(2 * h, r)), x);
    store_array(reinterpret_cast<float*>(place(2 * h + 1, r)), slope);
  }

  // Forward: of each source the sum of q_j ((s - anchor_j) - (t_j - max_j)).
  template <bool usual>
  __device__ __forceinline__ void add_gaps(const uint4 (&raw)[S + 1], int h, const float (&s)[W],
                                           float (&sums)[Q]) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!usual && j >= count_) continue;
      float t[W];
      unpack_part<T>(raw[1 + j], h, t);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        const float a = t[v] - maxima_[1 + j], q = exponential<false>(a, scale_);
        sums[2 + j] += q;
        sums[2 + S + j] += q * ((s[v] - anchors_[j]) - a);
      }
    }
  }

  // By the first warp: ratios, mean slope and divergence from the sums alone, or the word that
  // these say too little.
  __device__ __forceinline__ void settle() const {
    const int lane = lane_id();
    if (lane < Q) {
      double total = 0.0;
#pragma unroll 8
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

  // Reverse, the gradient is e (kl slope - mean) + ce e^(s - max), in the true class ce times -others
  // for the latter; forward, e kl - sum_j weights_j q_j for the former.
  struct Gradient {
    float kl, mean, factor, ce, others;
  };

  __device__ __forceinline__ void write(const Factors<float>& factors,
                                        const Residual& residual) const {
    Gradient g;
    g.kl = count_ > 0 ? factors.kl / shared_.sums[0] : 0.0f;
    g.mean = g.kl * shared_.mean;
    g.factor = factors.kl;
    g.ce = d_.labels.data == nullptr ? 0.0f : factors.ce * residual.factor;
    g.others = residual.others;
    if constexpr (!reverse) {
      float total = 0.0f;
      for (int j = 0; j < count_; ++j) total += shared_.weights[j];
      g.kl *= total;
    }
#pragma unroll 1
    for (int r = 0; r < held_; ++r) is_usual(r) ? write<true>(r, g) : write<false>(r, g);
  }

  template <bool usual>
  __device__ __forceinline__ void write(int r, const Gradient& g) const {
    float values[V];
#pragma unroll
    for (int h = 0; h < parts; ++h) {
      float x[W], e[W], part[W], share[W];
      if constexpr (reverse) {
        load_array(reinterpret_cast<const float*>(place(2 * h, r)), x);
        load_array(reinterpret_cast<const float*>(place(2 * h + 1, r)), part);
      } else {
        unpack_part<T>(*place(0, r), h, x);
      }
#pragma unroll
      for (int v = 0; v < W; ++v) {
        if (!reverse) x[v] -= maxima_[0];
        e[v] = exponential<exact>(x[v], scale_);
        part[v] = e[v] * (reverse ? fmaf(g.kl, part[v], -g.mean) : g.kl);
      }
      if constexpr (!reverse) take_sources<usual>(r, h, g.factor, part);
      shares<usual>(vector(r) * V + h * W, x, e, -g.others, share);
#pragma unroll
      for (int v = 0; v < W; ++v) values[h * W + v] = part[v] + g.ce * share[v];
    }
    store_gradient(d_, i_ * d_.K + static_cast<int64_t>(vector(r)) * V, values);
  }

  // Forward: less the sources' share, sum_j w_j q_j.
  template <bool usual>
  __device__ __forceinline__ void take_sources(int r, int h, float kl,
                                               float (&difference)[W]) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!usual && j >= count_) continue;
      const float weight = kl * shared_.ratios[j].weight * shared_.ratios[j].inverse;
      float t[W];
      unpack_part<T>(*place(1 + j, r), h, t);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        difference[v] -= weight * exponential<false>(t[v] - maxima_[1 + j], scale_);
      }
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
  float factors_[S];
};

}  // namespace cuda
}  // namespace pycdgkd
