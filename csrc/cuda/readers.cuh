// How the kernel of long rows reads them: by vectors where all of them allow it, else by elements.
#pragma once

#include <type_traits>

#include "vectors.cuh"

namespace pycdgkd {
namespace cuda {

// How a matrix's row is read, V elements at a time. Chunks of V begin where 16 bytes do, so that
// the first and the last of a row may reach beyond it: what lies there counts as -inf, which adds
// nothing.
//
// T, aligned: rows of one dtype, contiguous, whole chunks only. T, not aligned: contiguous rows of
// one dtype, wherever they begin. void: anything, an element at a time.
template <class A, class T, bool aligned>
struct Reader {
  static constexpr int V = kVector<T>;       // elements of a chunk
  static constexpr int W = aligned ? V : 1;  // elements that are read again together
  static constexpr int size = sizeof(T);
  const T* row;
  int64_t K;

  // Elements between the beginning of the first chunk and that of the row.
  __device__ __forceinline__ int64_t before() const {
    if constexpr (aligned) return 0;
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  }
  __device__ __forceinline__ void chunk(int64_t k, A (&to)[V]) const {
    if constexpr (aligned) {
      load_vector(row + k, to);
    } else if (k >= 0 && k + V <= K) {
      load_vector(row + k, to);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool inside = k + v >= 0 && k + v < K;
        to[v] = inside ? static_cast<A>(to_arithmetic(row[k + v])) : -infinity<A>();
      }
    }
  }
  __device__ __forceinline__ void keep(void* place, int64_t staged, int64_t k,
                                       const A (&values)[V]) const {
    T* to = static_cast<T*>(place);
    if constexpr (aligned) {
      if (k >= staged) return;
      T elements[V];
#pragma unroll
      for (int v = 0; v < V; ++v) elements[v] = from_arithmetic<T>(values[v]);
      memcpy(to + k, elements, 16);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (k + v >= 0 && k + v < staged && k + v < K) to[k + v] = from_arithmetic<T>(values[v]);
      }
    }
  }
  // W elements from k on, which is within the row, once more.
  __device__ __forceinline__ void again(const void* kept, int64_t staged, int64_t k,
                                        A (&to)[W]) const {
    const bool here = kept != nullptr && k < staged;
    if constexpr (aligned) {
      if (!here) return load_vector(row + k, to);
      T elements[V];
      memcpy(elements, static_cast<const T*>(kept) + k, 16);
#pragma unroll
      for (int v = 0; v < V; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
    } else {
      to[0] = static_cast<A>(to_arithmetic(here ? static_cast<const T*>(kept)[k] : row[k]));
    }
  }
};

template <class A, bool aligned>
struct Reader<A, void, aligned> {
  static constexpr int V = 1, W = 1;
  static constexpr int size = sizeof(A);
  const void* data;
  int64_t start, col_stride;
  Dtype dtype;
  __device__ __forceinline__ int64_t before() const { return 0; }
  __device__ __forceinline__ void chunk(int64_t k, A (&to)[V]) const {
    to[0] = load_element<A>(data, start + k * col_stride, dtype);
  }
  __device__ __forceinline__ void keep(void* place, int64_t staged, int64_t k,
                                       const A (&values)[V]) const {
    if (k < staged) static_cast<A*>(place)[k] = values[0];
  }
  __device__ __forceinline__ void again(const void* kept, int64_t staged, int64_t k,
                                        A (&to)[W]) const {
    if (kept != nullptr && k < staged) {
      to[0] = static_cast<const A*>(kept)[k];
    } else {
      chunk(k, to);
    }
  }
};

template <class A, class T, bool aligned>
__device__ __forceinline__ Reader<A, T, aligned> reader_of(const void* data, int64_t row_stride,
                                                           int64_t col_stride, Dtype dtype,
                                                           int64_t i, int64_t K) {
  if constexpr (std::is_void_v<T>) {
    return {data, i * row_stride, col_stride, dtype};
  } else {
    return {static_cast<const T*>(data) + i * row_stride, K};
  }
}

}  // namespace cuda
}  // namespace pycdgkd
