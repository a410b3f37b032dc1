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

// The same of at most `most` rows of the arithmetic type, U columns a thread at once, so that no
// load waits for another.
template <int most, int U, class A>
__device__ __forceinline__ void centre_columns(const Matrix& prototypes, const ClassCounts& counts,
                                               int64_t D, int64_t K, const Centred<A>& out) {
  const A* data = static_cast<const A*>(prototypes.data);
  unsigned on = 0;
#pragma unroll
  for (int k = 0; k < most; ++k) on |= k < K && is_active(counts, k) ? 1u << k : 0u;
  const auto active = static_cast<double>(__popc(on));
  for (int64_t first = threadIdx.x; first < out.stride; first += U * blockDim.x) {
    A x[U][most];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t column = first + u * blockDim.x;
#pragma unroll
      for (int k = 0; k < most; ++k) {
        const bool there = column < D && (on >> k & 1u) != 0;
        x[u][k] = there ? data[k * prototypes.row_stride + column * prototypes.col_stride] : A(0);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t column = first + u * blockDim.x;
      if (column >= out.stride) continue;
      double sum = 0.0;
#pragma unroll
      for (int k = 0; k < most; ++k) sum += static_cast<double>(x[u][k]);
      const A mean = column < D && on != 0 ? static_cast<A>(sum / active) : A(0);
      out.mean[column] = mean;
#pragma unroll
      for (int k = 0; k < most; ++k) {
        x[u][k] = column < D && (on >> k & 1u) != 0 ? x[u][k] - mean : A(0);
        if (k < K) out.rows[k * out.stride + column] = x[u][k];
      }
      if (K == 2) out.rows[2 * out.stride + column] = x[u][0] - x[u][1];
    }
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
  const bool plain = prototypes.dtype == (sizeof(A) == 8 ? Dtype::float64 : Dtype::float32);
  if (plain && K <= 2) {
    centre_columns<2, 4>(prototypes, counts, D, K, out);
  } else if (plain && K <= 8) {
    centre_columns<8, 1>(prototypes, counts, D, K, out);
  } else {
    for (int64_t column = threadIdx.x; column < out.stride; column += blockDim.x) {
      centre_column(prototypes, counts, D, K, column, out);
    }
  }
  for (int64_t k = K + threadIdx.x; k < padded(K); k += blockDim.x) out.bias[k] = A(0);
  __syncthreads();
  for (int64_t k = warp_id(); k < K; k += blockDim.x / 32) centred_bias(counts, k, scale, out);
  __syncthreads();
}

}  // namespace cuda
}  // namespace pycdgkd
