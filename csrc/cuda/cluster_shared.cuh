// What a cluster of blocks shares while it works on a row of Eq. 9, and the arithmetic of its
// logits.
#pragma once

#include <type_traits>

#include "distillation.cuh"

namespace pycdgkd {
namespace cuda {

inline constexpr int kWarps = 16, kRanks = 16, kFewSlots = 4, kMostSlots = 8;
inline constexpr double kLn2 = 0.693147180559945309;

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
inline constexpr int kSums = S + 2 + (reverse ? 1 : S);

// What a row's sums are good for: for value and gradient; not for the value, in which they all but
// cancel; for neither, as logits are infinite.
enum class Verdict { good, cancels, infinite };

// A row's gradient is, reverse, e (kl slope - mean) + ce e^(s - max), in the true class ce times
// -others for the latter; forward, e kl - sum_j kl_weight w_j q_j for the former.
struct Gradient {
  float kl, mean, kl_weight, ce, others;
};

template <int S, bool reverse>
struct alignas(16) Shared {
  float warp_maxima[S + 1][kWarps];
  union {  // the second of each, of rows that are read once more
    double warp_sums[kWarps][kSums<S, reverse>];
    double warp_extra[kWarps][2 * S];
  };
  First<S> first[kRanks];
  union {
    double second[kRanks][kSums<S, reverse>];
    double extra[kRanks][2 * S];
  };
  double ce, kl, rows;  // sums of this chunk; rows that take part in all
  Factors<float> factors_of_rows;
  double unit;                              // 1 / T, as the exponentials have it after rounding
  unsigned bytes;                           // of a row, in this block
  unsigned chunk, next_chunk, ended_chunk;  // the present one, the one after it, the one before it
  int64_t chunk_end;
  bool begins_chunk;  // whether the next row does
  bool knew_next;     // whether the next row was known before this one's sums
  int64_t next;       // that row, and its class
  int next_class;
  const uint4* next_rows[S + 1];     // its logits
  const uint4* present_rows[S + 1];  // those of the present one, if they are read once more
  // Of the row, as its first two warps find them.
  double totals[kSums<S, reverse>];
  float maxima[S + 1], anchors[S], sums[kSums<S, reverse>], divergence;
  Verdict verdict;
  Gradient gradient;
  Ratio<float> ratios[S];
  float weights[S], factors[S];  // of the active sources; weight / temperature
  double value_weights[S];       // weights as the slopes have them after rounding
  float source_shares[S];        // weights over the sources' sums
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
  return fmaf(e * fmaf(x, scale.lo, fmaf(x, scale.hi, -y)), static_cast<float>(kLn2), e);
}

inline constexpr int kPart = 4;

// Elements kPart * part and on of a vector.
template <class T>
__device__ __forceinline__ void unpack_part(const uint4& raw, int part, float (&to)[kPart]) {
  Packed<T, kPart> packed;
  memcpy(&packed, reinterpret_cast<const char*>(&raw) + part * sizeof(packed), sizeof(packed));
  unpack<T, kPart>(packed, to);
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

// The largest of vectors of T; the 16-bit types compare in pairs.
template <class T>
class Largest {
 public:
  __device__ __forceinline__ void add(const uint4& raw) {
    if constexpr (sizeof(T) == 2) {
      pair_ = larger_pair<T>(pair_, larger_pair<T>(raw.x, raw.y));
      pair_ = larger_pair<T>(pair_, larger_pair<T>(raw.z, raw.w));
    } else {
      float x[4];
      memcpy(x, &raw, sizeof(raw));
      most_ = fmaxf(fmaxf(most_, fmaxf(x[0], x[1])), fmaxf(x[2], x[3]));
    }
  }
  __device__ __forceinline__ float value() const {
    if constexpr (sizeof(T) == 2) {
      T both[2];
      memcpy(both, &pair_, sizeof(pair_));
      return fmaxf(to_arithmetic(both[0]), to_arithmetic(both[1]));
    } else {
      return most_;
    }
  }

 private:
  float most_ = -infinity<float>();
  uint32_t pair_ = std::is_same_v<T, bfloat16> ? 0xff80ff80u : 0xfc00fc00u;  // -inf, twice
};

}  // namespace cuda
}  // namespace pycdgkd
