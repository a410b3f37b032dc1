// Eq. 9 for longer rows whose 16-byte vectors are aligned: a cluster of blocks holds one row of the
// student and of every active source in shared memory, so that each logit is read from memory once.
// The row after it is asked for meanwhile.
//
// The blocks meet twice a row: for the maxima, and for the sums of exponentials with the mean
// slope, from which value and gradient follow. Where that would cancel (student and sources all but
// equal) or logits are infinite, the row is worked once more with the formulas of add_source.
#include <map>
#include <mutex>
#include <tuple>

#include "distillation.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kWarps = 16, kRanks = 16, kMostSlots = 8;
constexpr float kLn2 = 0.693147180559945309f;

// Of one block, and then of the row: the maxima (0: the student's) and what ratio_of wants of each
// source: reverse, the source where the student is largest; forward, the student where the source
// is.
template <int S>
struct First {
  float maximum[S + 1], anchor[S];
};

// The student's sum, its sum at T = 1 without the true class, the sources' sums, and the mean slope
// (reverse) or each source's sum of gaps (forward), all unnormalised.
template <int S, bool reverse>
constexpr int kSums = S + 2 + (reverse ? 1 : S);

template <int S, bool reverse>
struct alignas(16) Shared {
  float warp_maxima[S + 1][kWarps];
  float warp_sums[kWarps][kSums<S, reverse>];
  double warp_extra[kWarps];
  First<S> first[kRanks];
  double second[kRanks][kSums<S, reverse>];
  double extra[2][kRanks];
  double ce, kl, rows;  // sums of this cluster; rows that take part in all
  // Of the row, as its first warp finds them.
  float maxima[S + 1], anchors[S], sums[kSums<S, reverse>], mean, divergence;
  bool careful;
  Ratio<float> ratios[S];
  float weights[S], factors[S];  // of the active sources; weight / temperature
  int active[S];
  int count;
};

// For e^(x scale), x <= 0, with scale = hi + lo in units of log2. `exact` puts back what rounding
// x scale loses, a part in |x| 2^24, as fast_exp does: for the student's classes in float32, of
// which even the least likely may be all that the cross-entropy of a sure row is made of.
struct Scale {
  float hi, lo;
};

__device__ __forceinline__ Scale scale_of(double temperature) {
  const double scale = 1.4426950408889634074 / temperature;
  const auto hi = static_cast<float>(scale);
  return {hi, static_cast<float>(scale - static_cast<double>(hi))};
}

template <bool exact>
__device__ __forceinline__ float exponential(float x, const Scale& scale) {
  const float y = x * scale.hi, e = exp2_approximate(y);
  if (!exact || e == 0.0f) return e;
  return fmaf(e * fmaf(x, scale.lo, fmaf(x, scale.hi, -y)), kLn2, e);
}

constexpr int kPart = 4;

// Elements kPart * part and on of a vector.
template <class T>
__device__ __forceinline__ void unpack_part(const uint4* raw, int part, float (&to)[kPart]) {
  unpack<T, kPart>(reinterpret_cast<const Packed<T, kPart>*>(raw)[part], to);
}

// The larger of each of the two 16-bit elements that words hold; NaN counts for nothing.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t most;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  }
  return most;
#else
  T x[2], y[2];
  memcpy(x, &a, sizeof(a));
  memcpy(y, &b, sizeof(b));
  for (int v = 0; v < 2; ++v) {
    const float left = to_arithmetic(x[v]), right = to_arithmetic(y[v]);
    if (!(left >= right) && right == right) x[v] = y[v];
  }
  uint32_t most;
  memcpy(&most, x, sizeof(most));
  return most;
#endif
}

// The largest of a vector and `most`.
template <class T>
__device__ __forceinline__ float larger(float most, const uint4* raw) {
  const uint4 from = *raw;
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair =
        larger_pair<T>(larger_pair<T>(from.x, from.y), larger_pair<T>(from.z, from.w));
    T both[2];
    memcpy(both, &pair, sizeof(pair));
    return fmaxf(most, fmaxf(to_arithmetic(both[0]), to_arithmetic(both[1])));
  } else {
    float x[4];
    memcpy(x, &from, sizeof(from));
    return fmaxf(fmaxf(most, fmaxf(x[0], x[1])), fmaxf(x[2], x[3]));
  }
}

// S: slots for active sources. R: vectors of a row that each thread holds.
template <class T, int S, int R, bool reverse>
class ClusterRows {
  static constexpr int V = kVector<T>, W = kPart, parts = V / W, Q = kSums<S, reverse>;
  static constexpr bool exact = sizeof(T) == 4;
  static_assert(R * V <= 32, "tell_anchors: a lane an element");
  using Common = Shared<S, reverse>;

 public:
  __device__ __forceinline__ ClusterRows(const DistillationArguments& d, Common& shared)
      : d_(d),
        shared_(shared),
        rank_(cluster_rank()),
        size_(cluster_size()),
        vectors_(static_cast<int>(d.K / V)),
        begin_(static_cast<int>(rank_ * blockDim.x) * R),
        temperature_(static_cast<float>(d.temperature)),
        scale_(scale_of(d.temperature)) {
    if (threadIdx.x == 0) {
      int count = 0;
      for (int j = 0; j < d.S; ++j) {
        const float weight = source_weight<float>(d, j);
        if (weight == 0.0f) continue;
        shared.weights[count] = weight;
        shared.factors[count] = weight / temperature_;
        shared.active[count++] = j;
      }
      shared.count = count;
    }
    __syncthreads();
    count_ = shared.count;
  }

  // Everything of row i; ce and kl grow in the first thread of the cluster.
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

  // A row without a label: no loss, gradient 0.
  __device__ __forceinline__ void ignore(int64_t i) const {
    if (rank_ == 0 && threadIdx.x == 0 && d_.row_kl != nullptr) {
      static_cast<float*>(d_.row_kl)[i] = 0.0f;
    }
    if (d_.grad == nullptr) return;
    const float zeros[V] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (vector(r) < vectors_) store_gradient(d_, i * d_.K + vector(r) * V, zeros);
    }
  }

 private:
  // Of the cross-entropy: e^(s - max) times `factor`, of the true class -others times it.
  struct Residual {
    float others, factor;
    __device__ Residual(float true_exp, float others_)
        : others(others_), factor(1.0f / (true_exp + others_)) {}
  };

  __device__ __forceinline__ int vector(int r) const {
    return begin_ + r * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ const uint4* student(int64_t i) const {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(d_.logits.data) +
                                          i * d_.logits.row_stride);
  }
  __device__ __forceinline__ const uint4* source(int slot, int64_t i) const {
    const Source& s = d_.sources[shared_.active[slot]];
    return reinterpret_cast<const uint4*>(static_cast<const T*>(s.data) + i * s.row_stride);
  }
  __device__ __forceinline__ float inverse_temperature() const { return 1.0f / temperature_; }
  __device__ __forceinline__ float plain(float x, float e) const {
    return temperature_ == 2.0f
               ? e * e
               : (temperature_ == 1.0f
                      ? e
                      : exponential<exact>(x, Scale{1.44269504f, 1.925963033e-8f}));
  }
  // Vector r of this thread's, of the student (0) or an active source.
  __device__ __forceinline__ uint4* place(int row, int r) const {
    const auto at = static_cast<unsigned>(row * R + r) * blockDim.x + threadIdx.x;
    return reinterpret_cast<uint4*>(dynamic_shared() + sizeof(Common)) + at;
  }

  // Each thread reads what it has copied itself: no barrier is needed.
  __device__ __forceinline__ void load() const {
    for (int row = 0; row <= count_; ++row) {
      const uint4* from = row == 0 ? student(i_) : source(row - 1, i_);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (vector(r) < vectors_) copy_async(place(row, r), from + vector(r));
      }
    }
    await_copies();
  }

  // This block's part of another row, a thread for each of its rows.
  __device__ __forceinline__ void ask_for(int64_t i) const {
    const int left = vectors_ - begin_, most = static_cast<int>(blockDim.x) * R;
    const int j = static_cast<int>(threadIdx.x) - 1;
    if (j >= count_ || left <= 0) return;
    const auto bytes =
        static_cast<unsigned>(left < most ? left : most) * static_cast<unsigned>(sizeof(uint4));
    prefetch((j < 0 ? student(i) : source(j, i)) + begin_, bytes);
  }

  // told: whether this warp has written to other blocks since they met. Only then must it wait
  // until all that it wrote, gradients too, has arrived.
  __device__ __forceinline__ void meet(bool told) const {
    if (size_ > 1) {
      cluster_barrier(told);
    } else {
      __syncthreads();
    }
  }

  // ---- the first meeting ----

  __device__ __forceinline__ void find_maxima() {
    float mine[S + 1];
#pragma unroll
    for (int j = 0; j <= S; ++j) mine[j] = -infinity<float>();
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      for (int r = 0; r < R; ++r) {
        if (j > count_ || vector(r) >= vectors_) break;
        mine[j] = larger<T>(mine[j], place(j, r));
      }
    }
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      const float most = warp_max(mine[j]);
      if (lane_id() == 0) shared_.warp_maxima[j][warp_id()] = most;
    }
    __syncthreads();
    bool told = warp_id() == 0;
    const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      // Reverse: of the student all sources' anchors; forward: of each source the student's.
      const bool anchors = (j == 0) == reverse && j <= count_;
      if (!anchors && warp_id() != 0) continue;
      const float most = lane_id() < warps ? shared_.warp_maxima[j][lane_id()] : -infinity<float>();
      const float block = warp_max(most);
      if (anchors && first_lane(lane_id() < warps && most == block) == warp_id()) {
        tell_anchors(j, first_lane(mine[j] == block), block);
        told = true;
      }
      if (threadIdx.x < size_) in_block(&shared_.first[rank_], threadIdx.x)->maximum[j] = block;
    }
    meet(told);
    combine_maxima();
  }

  __device__ __forceinline__ void combine_maxima() {
    const auto rank = static_cast<unsigned>(lane_id());
    float anchors[S];
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      const float most = rank < size_ ? shared_.first[rank].maximum[j] : -infinity<float>();
      maxima_[j] = warp_max(most);
      if ((j == 0) != reverse) continue;
      const First<S>& from = shared_.first[first_lane(rank < size_ && most == maxima_[j])];
      if (j > 0) anchors[j - 1] = from.anchor[j - 1];
#pragma unroll
      for (int other = 0; j == 0 && other < S; ++other) anchors[other] = from.anchor[other];
    }
    constant_ = 0.0f;
#pragma unroll
    for (int j = 0; j < S; ++j) {
      offsets_[j] = 0.0f;
      if (j >= count_) continue;
      const float difference = reverse ? maxima_[0] - anchors[j] : anchors[j] - maxima_[1 + j];
      offsets_[j] = difference - difference == 0.0f ? difference : 0.0f;
      constant_ -= shared_.factors[j] * offsets_[j];
      if (threadIdx.x == 0) shared_.anchors[j] = anchors[j];
    }
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int j = 0; j <= S; ++j) shared_.maxima[j] = maxima_[j];
  }

  __device__ __forceinline__ int first_lane(bool holds) const {
    return __ffs(static_cast<int>(__ballot_sync(kAllLanes, holds))) - 1;
  }

  // By the warp that has the block's largest value of row j: lane n looks at element n of those
  // that lane `owner` holds.
  __device__ __forceinline__ void tell_anchors(int j, int owner, float most) const {
    const int back = owner - lane_id(), n = lane_id();
    const auto element = [&](int row, int at) {
      return to_arithmetic(reinterpret_cast<const T*>(place(row, at / V) + back)[at % V]);
    };
    const bool held = n < R * V && vector(n / V) + back < vectors_;
    const int at = first_lane(held && element(j, n) == most);
    const int slot = reverse ? n : j - 1;
    if (at < 0 || n >= (reverse ? count_ : 1)) return;
    const float anchor = element(reverse ? 1 + n : 0, at);
    for (unsigned q = 0; q < size_; ++q) {
      in_block(&shared_.first[rank_], q)->anchor[slot] = anchor;
    }
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
    if (temperature_ == 2.0f) {
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

  const DistillationArguments& d_;
  Common& shared_;
  const unsigned rank_, size_;
  const int vectors_, begin_;
  const float temperature_;
  const Scale scale_;
  int count_, y_;
  int64_t i_;
  float maxima_[S + 1], offsets_[S], constant_;
};

// Of the smallest kernel three blocks of 256 threads fit a multiprocessor's registers.
template <class T, int S, int R, bool reverse>
__global__ void __launch_bounds__(S == 3 ? 768 : kWarps * 32, 1)
    cluster_rows_kernel(const __grid_constant__ DistillationArguments d) {
  auto& shared = *reinterpret_cast<Shared<S, reverse>*>(dynamic_shared());
  const double rows = rows_of_all(d);
  if (threadIdx.x == 0) {
    shared.ce = shared.kl = 0.0;
    shared.rows = rows;
  }
  const Factors<float> factors = factors_of<float>(d, rows);
  const unsigned clusters = gridDim.x / cluster_size();
  ClusterRows<T, S, R, reverse> row(d, shared);
  for (int64_t i = blockIdx.x / cluster_size(); i < d.N; i += clusters) {
    const int y = class_of(d.labels, i, d.K);
    if (y < 0) {
      row.ignore(i);
    } else {
      row.work(i, i + clusters, y, factors);
    }
  }
  if (cluster_rank() != 0) return;
  __syncthreads();
  const bool own = threadIdx.x == 0;
  combine_blocks<float>(d, shared.rows, own ? shared.ce : 0.0, own ? shared.kl : 0.0,
                        blockIdx.x / cluster_size(), gridDim.x / cluster_size());
}

struct Shape {
  unsigned size, threads;  // of a cluster in blocks, of a block
};

// The smallest cluster that holds a row of `vectors`; size 0: none does. Two blocks fit a
// multiprocessor up to 256 threads, so that one computes while the other waits.
Shape shape_of(int64_t vectors, int R) {
  const int64_t needed = (vectors + R - 1) / R, most = most_cluster_threads();
  if (needed <= most) return {1, static_cast<unsigned>((needed + 31) / 32 * 32)};
  for (const int64_t threads : {most / 2, most}) {
    for (unsigned size = 2; size <= most_cluster_blocks(); size *= 2) {
      if (size * threads >= needed) return {size, static_cast<unsigned>(threads)};
    }
  }
  return {0, 0};
}

// Asked once of each device: the answer does not change, the question takes microseconds.
template <auto kernel>
unsigned resident(const Shape& shape, size_t shared_bytes) {
  static std::mutex lock;
  static std::map<std::tuple<int, unsigned, unsigned, size_t>, unsigned> known;
  const std::lock_guard<std::mutex> guard(lock);
  const auto key = std::tuple(current_device(), shape.size, shape.threads, shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = resident_clusters<kernel>(shape.size, shape.threads, shared_bytes);
}

template <class T, int S, int R, bool reverse>
bool start(const DistillationArguments& d, Stream stream) {
  constexpr auto kernel = cluster_rows_kernel<T, S, R, reverse>;
  const Shape shape = shape_of(d.K / kVector<T>, R);
  const size_t staged = static_cast<size_t>(d.S + 1) * R * shape.threads * sizeof(uint4);
  const size_t shared_bytes = sizeof(Shared<S, reverse>) + staged;
  if (shape.size == 0 || shared_bytes > device_limits().shared_bytes) return false;
  const unsigned most = resident<kernel>(shape, shared_bytes);
  if (most == 0) return false;
  const unsigned clusters = blocks_for(d.N, 1, most);
  launch_clusters<kernel>(clusters, shape.size, shape.threads, shared_bytes, stream, d);
  return true;
}

template <class T>
bool start(const DistillationArguments& d, Stream stream) {
  const bool reverse = d.direction == Direction::reverse;
  if (d.S <= 3) {
    return reverse ? start<T, 3, 4, true>(d, stream) : start<T, 3, 4, false>(d, stream);
  }
  return reverse ? start<T, kMostSlots, 2, true>(d, stream)
                 : start<T, kMostSlots, 2, false>(d, stream);
}

}  // namespace

bool distill_cluster_rows(const DistillationArguments& d, Stream stream) {
  if (d.S > kMostSlots || !all_rows(d, [&](const Matrix& m) {
        return m.dtype == d.logits.dtype && has_vector_rows(m);
      })) {
    return false;
  }
  if (d.K * element_size(d.logits.dtype) % 16 != 0) return false;
  switch (d.logits.dtype) {
    case Dtype::float32:
      return start<float>(d, stream);
    case Dtype::bfloat16:
      return start<bfloat16>(d, stream);
    case Dtype::float16:
      return start<float16>(d, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace pycdgkd
