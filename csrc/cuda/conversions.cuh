// Whole vectors of a storage type, as they are loaded and stored, and what they are in arithmetic
// precision. The device converts 16-bit types by its own instructions, two elements each; the
// formulas of ../row_math.h, which are the same function, stand in where there are none.
#pragma once

#include <type_traits>

#include "vectors.cuh"

namespace pycdgkd {
namespace cuda {

template <class T>
inline constexpr Dtype dtype_of = std::is_same_v<T, double>     ? Dtype::float64
                                  : std::is_same_v<T, float>    ? Dtype::float32
                                  : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
                                                                : Dtype::float16;

// What one access of so many bytes moves.
template <int bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

// V elements of T as they lie in memory.
template <class T, int V>
using Packed = typename WordOf<V* static_cast<int>(sizeof(T))>::type;

// Read once; the address is aligned for the whole.
template <int V, class T>
__device__ __forceinline__ Packed<T, V> load_packed(const T* from) {
  return __ldcs(reinterpret_cast<const Packed<T, V>*>(from));
}

#if defined(__CUDA_ARCH__)
template <class T>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  unsigned word;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

__device__ __forceinline__ float widen_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#else
template <class T>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  return from_arithmetic<T>(low).bits | static_cast<unsigned>(from_arithmetic<T>(high).bits) << 16;
}

__device__ __forceinline__ float widen_half(unsigned short bits) {
  return to_arithmetic(float16{bits});
}
#endif

template <class T, int V, class A>
__device__ __forceinline__ void unpack(const Packed<T, V>& packed, A (&to)[V]) {
  if constexpr (sizeof(T) == 2 && V > 1) {
    unsigned words[V / 2];
    memcpy(words, &packed, sizeof(packed));
#pragma unroll
    for (int w = 0; w < V / 2; ++w) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        to[2 * w] = bit_cast<float>(words[w] << 16);
        to[2 * w + 1] = bit_cast<float>(words[w] & 0xffff0000u);
      } else {
        to[2 * w] = widen_half(static_cast<unsigned short>(words[w]));
        to[2 * w + 1] = widen_half(static_cast<unsigned short>(words[w] >> 16));
      }
    }
  } else {
    T elements[V];
    memcpy(elements, &packed, sizeof(packed));
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
  }
}

// Written once, not read again before it has left the caches.
template <class T, int V, class A>
__device__ __forceinline__ void store_packed(T* to, const A (&values)[V]) {
  Packed<T, V> packed;
  if constexpr (sizeof(T) == 2 && V > 1) {
    unsigned words[V / 2];
#pragma unroll
    for (int w = 0; w < V / 2; ++w) {
      words[w] =
          narrow_pair<T>(static_cast<float>(values[2 * w]), static_cast<float>(values[2 * w + 1]));
    }
    memcpy(&packed, words, sizeof(packed));
  } else {
    T elements[V];
#pragma unroll
    for (int v = 0; v < V; ++v) elements[v] = from_arithmetic<T>(values[v]);
    memcpy(&packed, elements, sizeof(packed));
  }
  __stcs(reinterpret_cast<Packed<T, V>*>(to), packed);
}

}  // namespace cuda
}  // namespace pycdgkd
