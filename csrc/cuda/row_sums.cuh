// A row of Eq. 9 by a cluster of blocks: the second meeting, for the sums, and what follows from
// them.
#pragma once

#include "held_row.cuh"

namespace pycdgkd {
namespace cuda {

template <class T, int S, int R, bool reverse>
class RowSums : public HeldRow<T, S, R, reverse> {
  using Held = HeldRow<T, S, R, reverse>;

 protected:
  using Held::anchors_, Held::count_, Held::d_, Held::held_, Held::i_, Held::maxima_, Held::meet;
  using Held::kKept, Held::knew_next, Held::parts, Held::W;
  using Held::place, Held::rank_, Held::shared_, Held::size_, Held::tell_chunk;
  using Held::temperature_, Held::V, Held::vector, Held::y_;
  static constexpr int Q = kSums<S, reverse>;
  static constexpr bool exact = sizeof(T) == 4;

  __device__ __forceinline__ RowSums(const DistillationArguments& d, Shared<S, reverse>& shared)
      : Held(d, shared), scale_(scale_of(d.temperature)) {
#pragma unroll
    for (int j = 0; j < S; ++j) factors_[j] = j < count_ ? shared.factors[j] : 0.0f;
    if (threadIdx.x != 0) return;
    shared.unit = scale_.hi * kLn2;
    for (int j = 0; j < count_; ++j) {
      shared.value_weights[j] =
          reverse ? shared.factors[j] / shared.unit : static_cast<double>(shared.weights[j]);
    }
  }

  // e^x from e = e^(x / T). Where an exponential costs two instructions, asking for T costs more.
  __device__ __forceinline__ float plain(float x, float e) const {
    constexpr Scale one{1.44269504f, 1.925963033e-8f};
    if constexpr (!exact) return exponential<false>(x, one);
    return temperature_ == 2.0f ? e * e : (temperature_ == 1.0f ? e : exponential<true>(x, one));
  }

  // e^(s - max) of the student's classes, x = s - max and e = e^(x / T); of the true class, which
  // is none of them where `usual`, `own`.
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

  __device__ __forceinline__ void add_up(unsigned next_chunk) {
    float sums[Q] = {};
    const bool more = knew_next() && shared_.next_class >= 0;
#pragma unroll 1
    for (int r = 0; r < held_; ++r) {
      is_usual(r) ? add<true>(r, sums) : add<false>(r, sums);
      if (more) Held::template copy_vector<kKept, S + 1>(shared_.next_rows, r);
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const double total = warp_sum(static_cast<double>(sums[q]));
      if (lane_id() == 0) shared_.warp_sums[warp_id()][q] = total;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < Q) {
      double total = 0.0;
#pragma unroll 8
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        total += shared_.warp_sums[w][threadIdx.x];
      }
      for (unsigned q = 0; q < size_; ++q) {
        *in_block(&shared_.second[rank_][threadIdx.x], q) = total;
      }
    }
    tell_chunk(next_chunk);
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

  // The exponent, in units of log2, of a source's class that lies at its anchor.
  __device__ __forceinline__ float anchor_exponent(float anchor, float maximum) const {
    return (anchor - maximum) * scale_.hi;
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
      const float begin = anchor_exponent(anchors_[j], maxima_[1 + j]);
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

  // Two warps work at once on what all others wait for.
  __device__ __forceinline__ void settle() const {
    if (warp_id() == 0) settle_value();
    if (warp_id() == (blockDim.x > 32 ? 1 : 0)) settle_gradient();
  }

  // Lane q's sum over the cluster.
  __device__ __forceinline__ double own_total() const {
    double total = 0.0;
    if (lane_id() < Q) {
#pragma unroll 8
      for (unsigned rank = 0; rank < size_; ++rank) total += shared_.second[rank][lane_id()];
    }
    return total;
  }

  __device__ __forceinline__ static double from_lane(double value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
  }

  // Divergence from the sums alone. Of a class, log q - log p is log_ratio_j less
  // (s - max) - (t - anchor_j) over T (reverse) or (s - anchor_j) - (t - max_j) over T (forward).
  // In double, as what is left of these may be small.
  __device__ __forceinline__ void settle_value() const {
    const int lane = lane_id();
    const double total = own_total(), log_total = log_(lane < Q ? total : 1.0);
    if (lane < Q) {
      shared_.totals[lane] = total;
      shared_.sums[lane] = static_cast<float>(total);
    }
    const double ratio = from_lane(log_total, 0) - from_lane(log_total, 2 + lane);
    const double source = from_lane(total, 2 + lane), gaps = from_lane(total, 2 + S + lane);
    const double mean = reverse ? from_lane(total, 2 + S) / from_lane(total, 0) : 0.0;
    double part = 0.0;
    float magnitude = 0.0f;
    if (lane < count_) {
      const double log_ratio = ratio + ratio_at_anchor(lane), weight = shared_.value_weights[lane];
      const double gap = reverse ? 0.0 : shared_.unit * gaps / source;
      if (!reverse)
        shared_.source_shares[lane] = shared_.weights[lane] / static_cast<float>(source);
      part = reverse ? -weight * log_ratio : weight * (log_ratio - gap);
      magnitude = static_cast<float>(weight) *
                  (1.0f + fabsf(static_cast<float>(log_ratio)) + fabsf(static_cast<float>(gap)));
    }
    const double divergence = count_ > 0 ? mean + warp_sum(part) : 0.0;
    magnitude = warp_sum(magnitude) + fabsf(static_cast<float>(mean));
    if (lane != 0) return;
    shared_.divergence = static_cast<float>(divergence);
    // The sums are good to some 2e-8 of `magnitude`: to 3e-6 of a divergence that is no smaller.
    const bool finite = divergence - divergence == 0.0;
    const bool large = count_ == 0 || shared_.divergence >= magnitude / 64.0f;
    shared_.verdict = finite ? (large ? Verdict::good : Verdict::cancels) : Verdict::infinite;
  }

  // What the gradient of all its classes shares; the cross-entropy.
  __device__ __forceinline__ void settle_gradient() const {
    const float true_logit = student_element<float>(d_, i_, y_);
    const auto total = static_cast<float>(own_total());
    const float sum = __shfl_sync(kAllLanes, total, 0), others = __shfl_sync(kAllLanes, total, 1);
    const float mean = reverse ? __shfl_sync(kAllLanes, total, 2 + S) / sum : 0.0f;
    if (lane_id() != 0) return;
    const Factors<float> factors = shared_.factors_of_rows;
    const float x = true_logit - maxima_[0], true_exp = plain(x, exponential<exact>(x, scale_));
    float kl = count_ > 0 ? factors.kl / sum : 0.0f, weights = 0.0f;
    for (int j = 0; !reverse && j < count_; ++j) weights += shared_.weights[j];
    if (!reverse) kl *= weights;
    const bool labelled = d_.labels.data != nullptr;
    Gradient& g = shared_.gradient;
    g.kl = kl;
    g.mean = kl * mean;
    g.kl_weight = factors.kl;
    g.ce = labelled ? factors.ce / (true_exp + others) : 0.0f;
    g.others = others;
    if (rank_ != 0 || !labelled) return;
    shared_.ce += static_cast<double>(cross_entropy(maxima_[0], true_logit, true_exp, others));
  }

  // log_ratio_j but for the logarithms of the sums.
  __device__ __forceinline__ double ratio_at_anchor(int slot) const {
    const float student = shared_.maxima[0], source = shared_.maxima[1 + slot];
    const float anchor = shared_.anchors[slot];
    return reverse ? static_cast<double>(anchor_exponent(anchor, source)) * kLn2
                   : (static_cast<double>(student) - static_cast<double>(anchor)) * shared_.unit;
  }

  const Scale scale_;
  float factors_[S];
};

}  // namespace cuda
}  // namespace pycdgkd
