// How the kernel of long rows reads them: by vectors where all of them allow it, else by elements.
#pragma once

#include <type_traits>

#include "vectors.cuh"

namespace pycdgkd {
namespace cuda {

// How a matrix's row is read, V elements at a time, the first chunk beginning where the row does:
// so a row's sums have the same bits wherever it lies. What the last chunk has beyond the row
// counts as -inf, which adds nothing.
//
// T, aligned: rows of one dtype, contiguous, whole chunks only. T, not aligned: contiguous rows of
// one dtype, wherever they begin. void: anything, an element at a time.
template <class A, class T, bool aligned>
struct Reader {
  static constexpr int V = kVector<T>;  // elements of a chunk
  static constexpr int size = sizeof(T);
  const T* row;
  int64_t K;

  __device__ __forceinline__ void chunk(int64_t k, A (&to)[V]) const {
    const auto shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    if (aligned || (shift == 0 && k + V <= K)) {
      load_vector(row + k, to);
    } else if (k >= shift && k - shift + 2 * V <= K) {
      load_across(row + k, to);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        to[v] = k + v < K ? static_cast<A>(to_arithmetic(row[k + v])) : -infinity<A>();
      }
    }
  }
  // `staged` is a multiple of V.
  __device__ __forceinline__ void keep(void* place, int64_t staged, int64_t k,
                                       const A (&values)[V]) const {
    if (k >= staged) return;
    T elements[V];
#pragma unroll
    for (int v = 0; v < V; ++v) elements[v] = from_arithmetic<T>(values[v]);
    memcpy(static_cast<T*>(place) + k, elements, 16);
  }
  // Once more.
  __device__ __forceinline__ void again(const void* kept, int64_t staged, int64_t k,
                                        A (&to)[V]) const {
    if (kept == nullptr || k >= staged) return chunk(k, to);
    T elements[V];
    memcpy(elements, static_cast<const T*>(kept) + k, 16);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
  }
};

template <class A, bool aligned>
struct Reader<A, void, aligned> {
  static constexpr int V = 1;
  static constexpr int size = sizeof(A);
  const void* data;
  int64_t start, col_stride;
  Dtype dtype;
  __device__ __forceinline__ void chunk(int64_t k, A (&to)[V]) const {
    to[0] = load_element<A>(data, start + k * col_stride, dtype);
  }
  __device__ __forceinline__ void keep(void* place, int64_t staged, int64_t k,
                                       const A (&values)[V]) const {
    if (k < staged) static_cast<A*>(place)[k] = values[0];
  }
  __device__ __forceinline__ void again(const void* kept, int64_t staged, int64_t k,
                                        A (&to)[V]) const {
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
