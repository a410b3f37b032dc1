// Prototypes moved to the mean of the active ones (../kernels.h: CentrePrototypes), by one block.
#pragma once

#include "vectors.cuh"

namespace pycdgkd {
namespace cuda {

template <class A>
struct Centred {
  __host__ __device__ Centred(const void* array, int64_t D, int64_t K)
      : stride(padded(D)),
        mean(static_cast<A*>(const_cast<void*>(array))),
        rows(mean + stride),
        bias(rows + centred_rows(K) * stride) {}
  int64_t stride;
  A *mean, *rows, *bias;
};

// Element of a row less the mean; zeros for absent classes and beyond the last column.
template <class A>
__device__ __forceinline__ A centred_element(const Matrix& prototypes, const ClassCounts& counts,
                                             int64_t D, int64_t k, int64_t column, A mean) {
  if (column >= D || !is_active(counts, k)) return A(0);
  const int64_t at = k * prototypes.row_stride + column * prototypes.col_stride;
  return load_element<A>(prototypes.data, at, prototypes.dtype) - mean;
}

// One column of all rows: the mean (in double, as on the CPU), the rows less it.
template <class A>
__device__ __forceinline__ void centre_column(const Matrix& prototypes, const ClassCounts& counts,
                                              int64_t D, int64_t K, int64_t column,
                                              const Centred<A>& out) {
  double sum = 0.0, active = 0.0;
  const bool inside = column < D;
  for (int64_t k = 0; inside && k < K; ++k) {
    if (!is_active(counts, k)) continue;
    active += 1.0;
    sum += load_element<double>(prototypes.data,
                                k * prototypes.row_stride + column * prototypes.col_stride,
                                prototypes.dtype);
  }
  const A mean = active > 0.0 ? static_cast<A>(sum / active) : A(0);
  out.mean[column] = mean;
  for (int64_t k = 0; k < K; ++k) {
    out.rows[k * out.stride + column] = centred_element(prototypes, counts, D, k, column, mean);
  }
  if (K == 2) {
    out.rows[2 * out.stride + column] = out.rows[column] - out.rows[out.stride + column];
  }
}

// -scale |c_k - mean|^2, -inf for absent classes, by one warp.
template <class A>
__device__ __forceinline__ void centred_bias(const ClassCounts& counts, int64_t k, A scale,
                                             const Centred<A>& out) {
  A sum = A(0);
  for (int64_t d = lane_id(); d < out.stride; d += 32) {
    const A x = out.rows[k * out.stride + d];
    sum += x * x;
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) out.bias[k] = is_active(counts, k) ? -scale * sum : -infinity<A>();
}

// The whole array, by a whole block.
template <class A>
__device__ __forceinline__ void centre_by_block(const Matrix& prototypes, const ClassCounts& counts,
                                                int64_t D, int64_t K, A scale,
                                                const Centred<A>& out) {
  for (int64_t column = threadIdx.x; column < out.stride; column += blockDim.x) {
    centre_column(prototypes, counts, D, K, column, out);
  }
  for (int64_t k = K + threadIdx.x; k < padded(K); k += blockDim.x) out.bias[k] = A(0);
  __syncthreads();
  for (int64_t k = warp_id(); k < K; k += blockDim.x / 32) centred_bias(counts, k, scale, out);
  __syncthreads();
}

}  // namespace cuda
}  // namespace pycdgkd
