// The formulas of one row, written once for every device.
//
// Everything is branch-free (selects only) so that a loop over rows or classes vectorises, and
// lives in a namespace named after the instruction set it is compiled for: the same inline function
// built with other flags must never be merged with it by the linker.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define PYCDGKD_HD __host__ __device__ __forceinline__
#else
#define PYCDGKD_HD inline
#endif

#ifndef PYCDGKD_ISA
#define PYCDGKD_ISA baseline
#endif

namespace pycdgkd {
namespace PYCDGKD_ISA {

template <class To, class From>
PYCDGKD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Storage types of 16 bits. Arithmetic is never done in them: they convert on load and on store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

PYCDGKD_HD float to_arithmetic(float x) { return x; }
PYCDGKD_HD double to_arithmetic(double x) { return x; }

PYCDGKD_HD float to_arithmetic(bfloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

PYCDGKD_HD float to_arithmetic(float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Rebias the exponent; infinity and NaN, whose exponent is all ones, once more.
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u);
  // Subnormals are normal in float: no denormal arithmetic, which a program may have switched off.
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  const uint32_t bits = magnitude < 0x400u ? bit_cast<uint32_t>(tiny) : normal;
  return bit_cast<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <class T>
PYCDGKD_HD T from_arithmetic(double x) {
  return static_cast<T>(x);
}
template <class T>
PYCDGKD_HD T from_arithmetic(float x) {
  return static_cast<T>(x);
}

template <>
PYCDGKD_HD bfloat16 from_arithmetic<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
PYCDGKD_HD float16 from_arithmetic<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias the exponent and round to nearest even.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the subnormal mantissa, correctly rounded, in the low bits.
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past 65504: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return {static_cast<uint16_t>(sign | half)};
}

template <>
PYCDGKD_HD bfloat16 from_arithmetic<bfloat16>(double x) {
  return from_arithmetic<bfloat16>(static_cast<float>(x));
}
template <>
PYCDGKD_HD float16 from_arithmetic<float16>(double x) {
  return from_arithmetic<float16>(static_cast<float>(x));
}

// exp(x) = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2)/2 (Cody-Waite), e^r by its series.
// 2^n is applied in two factors so that results down to the smallest subnormal come out. The error
// over the whole range is tested: under 1.5 units in the last place for float, 2 for double.
PYCDGKD_HD float exp_(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float low = x < -104.0f ? -104.0f : x;
  const float clamped = low > 89.0f ? 89.0f : low;
  const float shifted = clamped * 1.44269504088896341f + shift;
  const float n = shifted - shift;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(shift);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const float first = bit_cast<float>((half + 127u) << 23);
  const float second = bit_cast<float>((exponent - half + 127u) << 23);
  return p * first * second;
}

PYCDGKD_HD double exp_(double x) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52
  const double low = x < -746.0 ? -746.0 : x;
  const double clamped = low > 710.0 ? 710.0 : low;
  const double shifted = clamped * 1.4426950408889634074 + shift;
  const double n = shifted - shift;
  const double r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const uint64_t exponent = bit_cast<uint64_t>(shifted) - bit_cast<uint64_t>(shift);
  const uint64_t half = static_cast<uint64_t>(static_cast<int64_t>(exponent) >> 1);
  const double first = bit_cast<double>((half + 1023u) << 52);
  const double second = bit_cast<double>((exponent - half + 1023u) << 52);
  return p * first * second;
}

// (e^x - 1 - x) / x^2 for |x| <= 0.5 by its series sum_n x^n / (n + 2)!, exact to rounding.
PYCDGKD_HD float expm1_remainder(float x) {
  float p = 1.0f / 3628800.0f;
  p = p * x + 1.0f / 362880.0f;
  p = p * x + 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  return p * x + 0.5f;
}

PYCDGKD_HD double expm1_remainder(double x) {
  double p = 1.0 / 20922789888000.0;
  p = p * x + 1.0 / 1307674368000.0;
  p = p * x + 1.0 / 87178291200.0;
  p = p * x + 1.0 / 6227020800.0;
  p = p * x + 1.0 / 479001600.0;
  p = p * x + 1.0 / 39916800.0;
  p = p * x + 1.0 / 3628800.0;
  p = p * x + 1.0 / 362880.0;
  p = p * x + 1.0 / 40320.0;
  p = p * x + 1.0 / 5040.0;
  p = p * x + 1.0 / 720.0;
  p = p * x + 1.0 / 120.0;
  p = p * x + 1.0 / 24.0;
  p = p * x + 1.0 / 6.0;
  return p * x + 0.5;
}

// One class's share of KL(p || q) as q - p - p x, x = log q - log p: the shares sum to the
// divergence because sum q = sum p, none is negative, and near p = q nothing cancels (there it is
// p (e^x - 1 - x)). A class with p = 0 weighs q, whatever x is, so -inf logits need no special
// case; p > 0 with q = 0 gives +inf, as it must.
template <class A>
PYCDGKD_HD A kl_share(A p, A q, A x) {
  const bool near = x > A(-0.5) && x < A(0.5);
  const A y = near ? x : A(0);
  const A far_share = p == A(0) ? q : q - p - p * x;
  return near ? p * (y * y * expm1_remainder(y)) : far_share;
}

// q - p without cancellation near p = q: p (e^x - 1).
template <class A>
PYCDGKD_HD A probability_difference(A p, A q, A x) {
  const bool near = x > A(-0.5) && x < A(0.5);
  const A y = near ? x : A(0);
  return near ? p * (y + y * y * expm1_remainder(y)) : q - p;
}

// (a - b) - c for a c near the differences a - b that matter: the rounding of a - b is put back
// (Knuth's two-sum), so that logits far apart by a constant lose nothing to it.
template <class A>
PYCDGKD_HD A shifted_difference(A a, A b, A c) {
  const A difference = a - b;
  const A back = difference - a;
  const A lost = (a - (difference - back)) - (b + back);
  return (difference - c) + (lost == lost ? lost : A(0));  // NaN where a or b is infinite
}

// Cross-entropy of one row from m = max_k a_k, others = sum_{k != y} e^{a_k - m}, a_y and
// e_y = e^{a_y - m}. Where the true class is the largest, log1p keeps a small loss exact.
template <class A>
PYCDGKD_HD A cross_entropy(A maximum, A true_logit, A true_exp, A others) {
  const A margin = maximum - true_logit;
  return margin == A(0) ? std::log1p(others) : std::log(others + true_exp) + margin;
}

// Eq. 6 for any number of modalities: clip((max_j r_j - r_m) / r_m, 0, 1).
template <class A>
PYCDGKD_HD A modality_weight(A largest_rate, A rate) {
  const A gap = largest_rate - rate;
  const A ratio = gap / rate;
  const A clipped = ratio < A(0) ? A(0) : (ratio < A(1) ? ratio : A(1));
  return gap > A(0) ? clipped : (gap == gap ? A(0) : gap);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
