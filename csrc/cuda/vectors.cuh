// 16 bytes of a row at once, in arithmetic precision.
#pragma once

#include "rows.cuh"

namespace pycdgkd {
namespace cuda {

template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// kVector<T> elements from an address of 16-byte alignment, read once.
template <class T, class A>
__device__ __forceinline__ void load_vector(const T* from, A (&to)[kVector<T>]) {
  const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
  T elements[kVector<T>];
  static_assert(sizeof(elements) == sizeof(raw));
  memcpy(elements, &raw, sizeof(raw));
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
}

// The same from any address of an element, by two vectors of which the neighbour reads one as well.
// Those 32 bytes must be readable.
template <class T, class A>
__device__ __forceinline__ void load_across(const T* from, A (&to)[kVector<T>]) {
  const unsigned shift = reinterpret_cast<uintptr_t>(from) % 16;
  const auto* vectors = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(from) - shift);
  const uint4 low = __ldg(vectors), high = __ldg(vectors + 1);
  unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int w = 0; w < 6; ++w) words[w] = (shift & 8) != 0 ? words[w + 2] : words[w];
#pragma unroll
  for (int w = 0; w < 5; ++w) words[w] = (shift & 4) != 0 ? words[w + 1] : words[w];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = (shift & 2) != 0 ? words[w] >> 16 | words[w + 1] << 16 : words[w];
  }
  T elements[kVector<T>];
  memcpy(elements, words, 16);
#pragma unroll
  for (int v = 0; v < kVector<T>; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
}

// V consecutive elements of an array of A whose address is aligned for them, V sizeof(A) being a
// multiple of 16 or a single element.
template <int V, class A>
__device__ __forceinline__ void load_array(const A* from, A (&to)[V]) {
  if constexpr (V * sizeof(A) % 16 == 0) {
    constexpr int piece = 16 / static_cast<int>(sizeof(A));
#pragma unroll
    for (int v = 0; v < V; v += piece) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + v);
      memcpy(to + v, &raw, 16);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = from[v];
  }
}

// The way back.
template <int V, class A>
__device__ __forceinline__ void store_array(A* to, const A (&from)[V]) {
  if constexpr (V * sizeof(A) % 16 == 0) {
    constexpr int piece = 16 / static_cast<int>(sizeof(A));
#pragma unroll
    for (int v = 0; v < V; v += piece) {
      uint4 raw;
      memcpy(&raw, from + v, 16);
      *reinterpret_cast<uint4*>(to + v) = raw;
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = from[v];
  }
}

inline bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

// Whether every row can be read by vectors.
inline bool has_vector_rows(const Matrix& m) {
  return m.col_stride == 1 && is_aligned(m.data, 16) &&
         m.row_stride * element_size(m.dtype) % 16 == 0;
}

}  // namespace cuda
}  // namespace pycdgkd
