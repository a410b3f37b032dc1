// A row of Eq. 9 by a cluster of blocks, from what its sums say to the gradient.
#pragma once

#include "row_sums.cuh"

namespace pycdgkd {
namespace cuda {

template <class T, int S, int R, bool reverse>
class ClusterRows : public RowSums<T, S, R, reverse> {
  using Held = HeldRow<T, S, R, reverse>;
  using Sums = RowSums<T, S, R, reverse>;
  using Held::announce_next, Held::ask_for_next, Held::copy, Held::find_first, Held::find_maxima;
  using Held::find_next, Held::finds_next, Held::go_on, Held::leads, Held::leave_sums;
  using Held::pass_over, Held::take_chunk, Held::tell_next;
  using Sums::add_up, Sums::anchors_, Sums::count_, Sums::d_, Sums::exact;
  using Sums::factors_, Sums::held_, Sums::i_, Sums::is_usual, Sums::kKept, Sums::knew_next,
      Sums::maxima_, Sums::meet;
  using Sums::parts, Sums::place, Sums::plain, Sums::ratio_at_anchor, Sums::rank_, Sums::scale_,
      Sums::settle;
  using Sums::shared_, Sums::size_, Sums::V, Sums::vector, Sums::W, Sums::y_;

 public:
  __device__ __forceinline__ ClusterRows(const DistillationArguments& d, Shared<S, reverse>& shared)
      : Sums(d, shared) {
    find_first();
  }

  // All rows that this cluster gets.
  __device__ __forceinline__ void work() {
    while (go_on()) y_ < 0 ? pass_over() : work_row();
  }

 private:
  // Everything of row i, which was asked for; the next one is asked for.
  __device__ __forceinline__ void work_row() {
    const unsigned chunk = take_chunk();
    find_maxima();
    if (knew_next()) announce_next();
    add_up(chunk);
    settle();
    if (finds_next() && !knew_next()) tell_next(find_next());
    __syncthreads();
    if (!knew_next()) announce_next();
    const float divergence = write();
    if (!leads()) return;
    if (d_.row_kl != nullptr) static_cast<float*>(d_.row_kl)[i_] = divergence;
    shared_.kl += static_cast<double>(divergence);
    leave_sums();
  }

  // The gradient; by what formulas is for the sums to say. Meanwhile the next row is asked for.
  // Returns the divergence, to the thread that leads.
  __device__ __forceinline__ float write() {
    const Verdict verdict = shared_.verdict;
    if (verdict == Verdict::good) {
      d_.grad != nullptr ? write_gradient() : ask_for_next();
      return shared_.divergence;
    }
    float divergence;
    if (reverse && verdict == Verdict::cancels) {
      divergence = write_close();
    } else {
      divergence = once_more();
    }
    ask_for_next();
    return divergence;
  }

  __device__ __forceinline__ void write_gradient() const {
    const Gradient g = shared_.gradient;
    const bool more = shared_.next_class >= 0, asked = knew_next();  // for what add_up could free
#pragma unroll 1
    for (int r = 0; r < held_; ++r) {
      is_usual(r) ? write_vector<true>(r, g) : write_vector<false>(r, g);
      if (!more) continue;
      Held::template copy_vector<0, kKept>(shared_.next_rows, r);
      if (!asked) Held::template copy_vector<kKept, S + 1>(shared_.next_rows, r);
    }
  }

  template <bool usual>
  __device__ __forceinline__ void write_vector(int r, const Gradient& g) const {
    float values[V];
#pragma unroll
    for (int h = 0; h < parts; ++h) {
      float x[W], part[W] = {};
      if constexpr (reverse) {
        load_array(reinterpret_cast<const float*>(place(2 * h, r)), x);
        load_array(reinterpret_cast<const float*>(place(2 * h + 1, r)), part);
      } else {
        unpack_part<T>(*place(0, r), h, x);
#pragma unroll
        for (int v = 0; v < W; ++v) x[v] -= maxima_[0];
        take_sources<usual>(r, h, g.kl_weight, part);
      }
      finish<usual>(g, vector(r) * V + h * W, x, part);
#pragma unroll
      for (int v = 0; v < W; ++v) values[h * W + v] = part[v];
    }
    store_gradient(d_, i_ * d_.K + static_cast<int64_t>(vector(r)) * V, values);
  }

  // From x = s - max and, in `part`, slopes or the sources' share.
  template <bool usual>
  __device__ __forceinline__ void finish(const Gradient& g, int first, const float (&x)[W],
                                         float (&part)[W]) const {
    float e[W], share[W];
#pragma unroll
    for (int v = 0; v < W; ++v) e[v] = exponential<exact>(x[v], scale_);
    Sums::template shares<usual>(first, x, e, -g.others, share);
#pragma unroll
    for (int v = 0; v < W; ++v) {
      part[v] = reverse ? e[v] * fmaf(g.kl, part[v], -g.mean) : fmaf(g.kl, e[v], part[v]);
      part[v] += g.ce * share[v];
    }
  }

  // Forward: less the sources' share, sum_j w_j q_j.
  template <bool usual>
  __device__ __forceinline__ void take_sources(int r, int h, float kl,
                                               float (&difference)[W]) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!usual && j >= count_) continue;
      const float weight = kl * shared_.source_shares[j];
      float t[W];
      unpack_part<T>(*place(1 + j, r), h, t);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        difference[v] -= weight * exponential<false>(t[v] - maxima_[1 + j], scale_);
      }
    }
  }

  // ---- a row whose sums say too little: its logits are read again ----

  __device__ __forceinline__ void copy_again() const {
    await_copies();  // of the next row, to the same places
    if (threadIdx.x == 0) Held::tell_rows(i_, shared_.present_rows);
    __syncthreads();
    copy(shared_.present_rows);
    await_copies();
  }

  // Sums over all threads of the cluster.
  template <int n>
  __device__ __forceinline__ void add_over_cluster(double (&values)[n]) const {
    meet(true);  // all have read what was here before
#pragma unroll
    for (int q = 0; q < n; ++q) {
      values[q] = warp_sum(values[q]);
      if (lane_id() == 0) shared_.warp_extra[warp_id()][q] = values[q];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) {
      double total = 0.0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        total += shared_.warp_extra[w][threadIdx.x];
      }
      for (unsigned q = 0; q < size_; ++q) {
        *in_block(&shared_.extra[rank_][threadIdx.x], q) = total;
      }
    }
    meet(warp_id() == 0);
#pragma unroll
    for (int q = 0; q < n; ++q) {
      values[q] = 0.0;
      for (unsigned rank = 0; rank < size_; ++rank) values[q] += shared_.extra[rank][q];
    }
  }

  // Elements W * h and on of vector r, of the student (0) or an active source.
  __device__ __forceinline__ void read_part(int row, int r, int h, float (&to)[W]) const {
    unpack<T, W>(reinterpret_cast<const Packed<T, W>*>(place(row, r))[h], to);
  }

  // Reverse, where the sources are close, their differences from the student exactly: with
  // v = log p - log q but for log_ratio, KL(p || q) is z + log(1 + z - m) - (z - m) for m = E_p[v]
  // and z = E_p[e^-v - 1 + v], in which no term of a class is negative.
  __device__ __forceinline__ float write_close() const {
    copy_again();
    float means[S] = {}, excesses[S] = {};
#pragma unroll 1
    for (int at = 0; at < held_ * parts; ++at) {
      float s[W], x[W], e[W];
      read_part(0, at / parts, at % parts, s);
#pragma unroll
      for (int v = 0; v < W; ++v) {
        x[v] = s[v] - maxima_[0];
        e[v] = exponential<exact>(x[v], scale_);
      }
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (j >= count_) continue;
        float t[W];
        read_part(1 + j, at / parts, at % parts, t);
#pragma unroll
        for (int v = 0; v < W; ++v) {
          const float difference = difference_of(j, s[v], t[v]) * static_cast<float>(shared_.unit);
          means[j] += e[v] * difference;
          excesses[j] += excess(x[v], e[v], difference);
        }
      }
    }
    double sums[2 * S];
#pragma unroll
    for (int j = 0; j < S; ++j) {
      sums[j] = static_cast<double>(means[j]);
      sums[S + j] = static_cast<double>(excesses[j]);
    }
    add_over_cluster(sums);
    double mean = 0.0, divergence = 0.0;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (j >= count_) continue;
      mean += shared_.value_weights[j] * sums[j] / shared_.totals[0];
      if (leads())
        divergence += shared_.value_weights[j] * close_divergence(j, sums[j], sums[S + j]);
    }
    if (d_.grad != nullptr) write_close(static_cast<float>(mean));
    return static_cast<float>(divergence);
  }

  __device__ __forceinline__ float difference_of(int slot, float s, float t) const {
    return shifted_difference(s, t, maxima_[0] - anchors_[slot]);
  }

  __device__ __forceinline__ void write_close(float mean) const {
    Gradient g = shared_.gradient;
    g.mean = g.kl * mean;
#pragma unroll 1
    for (int at = 0; at < held_ * parts; ++at) {
      float s[W], part[W] = {};
      read_part(0, at / parts, at % parts, s);
#pragma unroll
      for (int j = 0; j < S; ++j) {
        if (j >= count_) continue;
        float t[W];
        read_part(1 + j, at / parts, at % parts, t);
#pragma unroll
        for (int v = 0; v < W; ++v) part[v] += factors_[j] * difference_of(j, s[v], t[v]);
      }
      const int first = vector(at / parts) * V + at % parts * W;
#pragma unroll
      for (int v = 0; v < W; ++v) s[v] -= maxima_[0];
      finish<false>(g, first, s, part);
      store_gradient(d_, i_ * d_.K + first, part);
    }
  }

  // e (e^-v - 1 + v) of e = e^(x / T).
  __device__ __forceinline__ float excess(float x, float e, float v) const {
    const float q = exp2_approximate(fmaf(v, -1.44269504f, x * scale_.hi));
    const bool near = v > -0.5f && v < 0.5f;
    return near ? e * (v * v * expm1_remainder(-v)) : q - e + e * v;
  }

  // A source that is far is not helped by this, but by its log-ratio.
  __device__ __forceinline__ double close_divergence(int slot, double mean, double excess) const {
    const double m = mean / shared_.totals[0], z = excess / shared_.totals[0], x = z - m;
    if (x > -0.5 && x < 1.0) return z + (log1p(x) - x);
    const float offset = maxima_[0] - anchors_[slot];
    const double lost = static_cast<double>(maxima_[0]) - static_cast<double>(anchors_[slot]) -
                        static_cast<double>(offset);
    return m - lost * shared_.unit - ratio_at_anchor(slot) -
           log_(shared_.totals[0] / shared_.totals[2 + slot]);
  }

  // body(k, s, e, p, slope, share) of each class of this thread's, by its own formula.
  template <class Body>
  __device__ __forceinline__ void classes(const Body& body) const {
#pragma unroll 1
    for (int at = 0; at < held_ * V; ++at) {
      const auto logit = [&](int row) {
        return to_arithmetic(reinterpret_cast<const T*>(place(row, at / V))[at % V]);
      };
      const float s = logit(0), e = exponential<exact>(s - maxima_[0], scale_);
      const float p = e / shared_.sums[0];
      float slope = 0.0f, share = 0.0f;
#pragma unroll 1
      for (int j = 0; j < count_; ++j) {
        add_source(reverse, shared_.ratios[j], s, logit(1 + j), p, static_cast<float>(shared_.unit),
                   slope, share);
      }
      body(vector(at / V) * V + at % V, s, e, p, slope, share);
    }
  }

  // Value and gradient by the formulas of single classes.
  __device__ __forceinline__ float once_more() const {
    if (static_cast<int>(threadIdx.x) < count_) {
      const int j = static_cast<int>(threadIdx.x);
      shared_.ratios[j] = ratio_of(reverse, shared_.weights[j], shared_.maxima[0], shared_.sums[0],
                                   shared_.maxima[1 + j], shared_.sums[2 + j], shared_.anchors[j],
                                   static_cast<float>(shared_.unit));
    }
    copy_again();
    double sum[1] = {0.0};
    classes([&](int, float, float, float p, float slope, float) {
      sum[0] += static_cast<double>(!reverse ? slope : (p == 0.0f ? 0.0f : p * slope));
    });
    add_over_cluster(sum);
    const auto mean = static_cast<float>(sum[0]);
    sum[0] = 0.0;
    classes([&](int k, float s, float e, float p, float slope, float share) {
      sum[0] += static_cast<double>(share);
      if (d_.grad == nullptr) return;
      const Gradient& g = shared_.gradient;
      const float own = k == y_ ? -g.others : plain(s - maxima_[0], e);
      float value =
          g.kl_weight == 0.0f ? 0.0f : g.kl_weight * centred_slope(reverse, p, slope, mean);
      if (g.ce != 0.0f) value += g.ce * own;
      store_element(d_.grad, i_ * d_.K + k, d_.grad_dtype, value);
    });
    add_over_cluster(sum);
    return static_cast<float>(sum[0]);
  }
};

}  // namespace cuda
}  // namespace pycdgkd
