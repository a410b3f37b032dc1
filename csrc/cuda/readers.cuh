// How the kernel of long rows reads them: by vectors where all of them allow it, else by elements.
#pragma once

#include "vectors.cuh"

namespace pycdgkd {
namespace cuda {

// Where a matrix's row is read. T: every row is contiguous and aligned to 16 bytes, and so is the
// number of classes. void: anything.
template <class A, class T>
struct Reader {
  static constexpr int V = kVector<T>;
  static constexpr int size = sizeof(T);
  const T* row;
  __device__ __forceinline__ void load(int64_t k, A (&to)[V]) const { load_vector(row + k, to); }
  __device__ __forceinline__ void keep(void* place, int64_t k, const A (&values)[V]) const {
    T elements[V];
#pragma unroll
    for (int v = 0; v < V; ++v) elements[v] = from_arithmetic<T>(values[v]);
    memcpy(static_cast<T*>(place) + k, elements, 16);
  }
  __device__ __forceinline__ void kept(const void* place, int64_t k, A (&to)[V]) const {
    T elements[V];
    memcpy(elements, static_cast<const T*>(place) + k, 16);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = static_cast<A>(to_arithmetic(elements[v]));
  }
};

template <class A>
struct Reader<A, void> {
  static constexpr int V = 1;
  static constexpr int size = sizeof(A);
  const void* data;
  int64_t start, col_stride;
  Dtype dtype;
  __device__ __forceinline__ void load(int64_t k, A (&to)[V]) const {
    to[0] = load_element<A>(data, start + k * col_stride, dtype);
  }
  __device__ __forceinline__ void keep(void* place, int64_t k, const A (&values)[V]) const {
    static_cast<A*>(place)[k] = values[0];
  }
  __device__ __forceinline__ void kept(const void* place, int64_t k, A (&to)[V]) const {
    to[0] = static_cast<const A*>(place)[k];
  }
};

template <class A, class T>
__device__ __forceinline__ Reader<A, T> reader_of(const void* data, int64_t row_stride,
                                                  int64_t col_stride, Dtype dtype, int64_t i) {
  if constexpr (sizeof(Reader<A, T>) == sizeof(void*)) {
    return {static_cast<const T*>(data) + i * row_stride};
  } else {
    return {data, i * row_stride, col_stride, dtype};
  }
}

}  // namespace cuda
}  // namespace pycdgkd
