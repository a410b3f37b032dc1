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

// exp(x) for x <= 0, NaN for NaN, with a third fewer operations: one factor 2^n serves, and becomes
// 0 where e^x is less than 8e-39. e^r by the polynomial nearest to it on |r| <= ln(2)/2.
PYCDGKD_HD float exp_nonpositive(float x) {
  const float shift = 12582912.0f;
  const float clamped = x < -88.0f ? -88.0f : x;
  const float shifted = clamped * 1.44269504088896341f + shift;
  const float n = shifted - shift;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.390128514e-3f;
  p = p * r + 8.363141483e-3f;
  p = p * r + 4.166685336e-2f;
  p = p * r + 1.666657731e-1f;
  p = p * r + 4.999999955e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(shift);
  return p * bit_cast<float>((exponent + 127u) << 23);
}

PYCDGKD_HD double exp_nonpositive(double x) { return exp_(x); }

// log(x) = n ln 2 + log(1 + f), 1 + f = x / 2^n in [sqrt(1/2), sqrt(2)). With s = f / (2 + f),
// log(1 + f) = 2 artanh(s) = 2 s + s r(s^2), r by its series; written as f - (f^2/2 - s (f^2/2 +
// r)) only the correction to f is rounded. The error is tested: at most 1 unit in the last place.
PYCDGKD_HD float log_(float x) {
  const bool tiny = x < 1.17549435e-38f;  // subnormal: scaled up
  const uint32_t bits = bit_cast<uint32_t>(tiny ? x * 33554432.0f : x);
  const uint32_t above = bits - 0x3f3504f3u;  // over sqrt(1/2)
  const int32_t exponent = static_cast<int32_t>(above) >> 23;
  const float f = bit_cast<float>(bits - (above & 0xff800000u)) - 1.0f;
  const float n = static_cast<float>(exponent) - (tiny ? 25.0f : 0.0f);
  const float s = f / (2.0f + f);
  const float z = s * s;
  float r = 2.0f / 9.0f;
  r = r * z + 2.0f / 7.0f;
  r = r * z + 2.0f / 5.0f;
  r = r * z + 2.0f / 3.0f;
  const float half_square = 0.5f * f * f;
  const float correction = half_square - (s * (half_square + r * z) - n * 2.12194440e-4f);
  const float y = n * 0.693359375f - (correction - f);
  const float infinity = std::numeric_limits<float>::infinity();
  const float beyond =
      x == 0.0f ? -infinity : (x == infinity ? x : std::numeric_limits<float>::quiet_NaN());
  return x > 0.0f && x < infinity ? y : beyond;
}

PYCDGKD_HD double log_(double x) {
  const bool tiny = x < 2.2250738585072014e-308;
  const uint64_t bits = bit_cast<uint64_t>(tiny ? x * 18014398509481984.0 : x);
  const uint64_t above = bits - 0x3fe6a09e667f3bcdull;
  const double f = bit_cast<double>(bits - (above & 0xfff0000000000000ull)) - 1.0;
  // The exponent as a double without a conversion of 64-bit integers, which few machines have: in
  // the low bits of 2^52.
  const uint64_t biased = (above + 0x4000000000000000ull) >> 52;
  const double n = bit_cast<double>(0x4330000000000000ull | biased) -
                   (4503599627370496.0 + (tiny ? 1078.0 : 1024.0));
  const double s = f / (2.0 + f);
  const double z = s * s;
  double r = 2.0 / 21.0;
  r = r * z + 2.0 / 19.0;
  r = r * z + 2.0 / 17.0;
  r = r * z + 2.0 / 15.0;
  r = r * z + 2.0 / 13.0;
  r = r * z + 2.0 / 11.0;
  r = r * z + 2.0 / 9.0;
  r = r * z + 2.0 / 7.0;
  r = r * z + 2.0 / 5.0;
  r = r * z + 2.0 / 3.0;
  const double half_square = 0.5 * f * f;
  const double correction =
      half_square - (s * (half_square + r * z) + n * 1.42860682030941723212e-6);
  const double y = n * 6.93145751953125e-1 - (correction - f);
  const double infinity = std::numeric_limits<double>::infinity();
  const double beyond =
      x == 0.0 ? -infinity : (x == infinity ? x : std::numeric_limits<double>::quiet_NaN());
  return x > 0.0 && x < infinity ? y : beyond;
}

// log(a + b) of a, b >= 0; what the rounding of the sum loses (Knuth's two-sum) is put back, so
// that with a = 1 this is log1p(b).
template <class A>
PYCDGKD_HD A log_of_sum(A a, A b) {
  const A sum = a + b;
  const A back = sum - a;
  const A lost = ((a - (sum - back)) + (b - back)) / sum;
  return log_(sum) + (lost == lost ? lost : A(0));  // NaN where the sum is 0 or infinite
}

// (e^x - 1 - x) / x^2 for |x| <= 0.5, exact to rounding: in float the nearest polynomial (relative
// error 2.4e-8), in double the series sum_n x^n / (n + 2)!.
PYCDGKD_HD float expm1_remainder(float x) {
  float p = 1.98756284e-4f;
  p = p * x + 1.39819974e-3f;
  p = p * x + 8.33345217e-3f;
  p = p * x + 4.16657959e-2f;
  p = p * x + 1.66666655e-1f;
  return p * x + 0.500000012f;
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
  const A share = near ? p * (y * y * expm1_remainder(y)) : q - p - p * x;
  return p == A(0) ? q : share;
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
// e_y = e^{a_y - m}. Where the true class is the largest, e_y = 1 and a small loss stays exact.
template <class A>
PYCDGKD_HD A cross_entropy(A maximum, A true_logit, A true_exp, A others) {
  return log_of_sum(true_exp, others) + (maximum - true_logit);
}

// Eq. 6 for any number of modalities: clip(gap / r_m, 0, 1) with gap = max_j r_j - r_m.
template <class A>
PYCDGKD_HD A weight_of_gap(A gap, A rate) {
  const A ratio = gap / rate;
  const A clipped = ratio < A(0) ? A(0) : (ratio < A(1) ? ratio : A(1));
  return gap > A(0) ? clipped : (gap == gap ? A(0) : gap);
}

template <class A>
PYCDGKD_HD A modality_weight(A largest_rate, A rate) {
  return weight_of_gap(largest_rate - rate, rate);
}

// What a mean adds to the loss: with weight 0 nothing, even where it is infinite.
PYCDGKD_HD double weighted_mean(double weight, double mean) {
  const bool infinite = mean == mean && mean - mean != 0.0;
  return weight == 0.0 && infinite ? 0.0 : weight * mean;
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
