// Vectors of the widest kind that this file is compiled for, by the compiler's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

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

// The sum of the elements, halves added to halves.
template <class A, int64_t Bytes>
struct Halves {
  typedef A whole __attribute__((vector_size(Bytes)));
  typedef A half __attribute__((vector_size(Bytes / 2)));
  static A sum(const whole& v) {
    half low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return Halves<A, Bytes / 2>::sum(low + high);
  }
};
template <class A>
struct Halves<A, 16> {
  typedef A whole __attribute__((vector_size(16)));
  static A sum(const whole& v) {
    A x[16 / sizeof(A)];
    std::memcpy(x, &v, sizeof(v));
    A total = A(0);
    for (const A& element : x) total += element;
    return total;
  }
};

template <class A>
inline A sum_of(Vector<A> v) {
  return Halves<A, kVectorBytes>::sum(v);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
