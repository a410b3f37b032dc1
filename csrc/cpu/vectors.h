// Vectors of the widest kind that this file is compiled for, by the compiler's vector extension.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pycdgkd {
namespace PYCDGKD_ISA {

#if defined(__AVX512F__)
inline constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int64_t kVectorBytes = 32;
#else
inline constexpr int64_t kVectorBytes = 16;
#endif

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
inline constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(A));

template <class A>
inline Vector<A> load(const A* from) {
  Vector<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class A>
inline void store(Vector<A> v, A* to) {
  std::memcpy(to, &v, sizeof(v));
}

// The first `count` elements (fewer than a vector), the others 0; nothing behind them is touched.
template <class A>
inline Vector<A> load_part(const A* from, int64_t count) {
  Vector<A> v = {};
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(A));
  return v;
}

#if defined(__AVX512F__)
template <>
inline Vector<float> load_part(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
}
template <>
inline Vector<double> load_part(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), from);
}
#endif

// Of each four elements the first (Second = 0) or second half of a's and of b's: in turn, or one
// after the other. Spelt so that compilers see one shuffle.
template <size_t Second, class V, size_t... I>
inline V in_turn(const V& a, const V& b, std::index_sequence<I...>) {
  return V{(I % 2 == 0 ? a : b)[I / 4 * 4 + 2 * Second + I % 4 / 2]...};
}
template <size_t Second, class V, size_t... I>
inline V side_by_side(const V& a, const V& b, std::index_sequence<I...>) {
  return V{(I % 4 < 2 ? a : b)[I / 4 * 4 + 2 * Second + I % 2]...};
}

// Sums of the elements, halves added to halves.
template <class A, int64_t Bytes>
struct Halves {
  typedef A whole __attribute__((vector_size(Bytes)));
  typedef A half __attribute__((vector_size(Bytes / 2)));
  static constexpr int64_t width = Bytes / static_cast<int64_t>(sizeof(A));

  static half added(const whole& v) {
    half low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return low + high;
  }

  static A sum(const whole& v) {
    if constexpr (Bytes == 16) {
      A total = A(0);
      for (int64_t i = 0; i < width; ++i) total += v[i];
      return total;
    } else {
      return Halves<A, Bytes / 2>::sum(added(v));
    }
  }

  // The sums of four vectors, side by side.
  static void four(const whole& a, const whole& b, const whole& c, const whole& d, A* out) {
    if constexpr (width < 4) {
      const A sums[4] = {sum(a), sum(b), sum(c), sum(d)};
      std::memcpy(out, sums, sizeof(sums));
    } else if constexpr (Bytes == 64) {  // halves can be read from memory, which takes no shuffle
      Halves<A, Bytes / 2>::four(added(a), added(b), added(c), added(d), out);
    } else {
      constexpr auto all = std::make_index_sequence<width>();
      const whole ab = in_turn<0>(a, b, all) + in_turn<1>(a, b, all);
      const whole cd = in_turn<0>(c, d, all) + in_turn<1>(c, d, all);
      const whole fours = side_by_side<0>(ab, cd, all) + side_by_side<1>(ab, cd, all);
      if constexpr (width == 4) {
        std::memcpy(out, &fours, sizeof(fours));
      } else {
        const half sums = added(fours);
        std::memcpy(out, &sums, sizeof(sums));
      }
    }
  }
};

template <class A>
inline A sum_of(Vector<A> v) {
  return Halves<A, kVectorBytes>::sum(v);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
