// What the kernels share: loads of any dtype, labels, sums over a warp and a block, the last block.
#pragma once

#include "../row_math.h"
#include "kernels.h"

namespace pycdgkd {
namespace cuda {

using namespace PYCDGKD_ISA;  // the formulas of row_math.h

inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class A>
__device__ __forceinline__ A infinity() {
  return static_cast<A>(INFINITY);
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

template <class A>
__device__ __forceinline__ A load_element(const void* data, int64_t at, Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<A>(static_cast<const float*>(data)[at]);
    case Dtype::float64:
      return static_cast<A>(static_cast<const double*>(data)[at]);
    case Dtype::bfloat16:
      return static_cast<A>(to_arithmetic(static_cast<const bfloat16*>(data)[at]));
    default:
      return static_cast<A>(to_arithmetic(static_cast<const float16*>(data)[at]));
  }
}

template <class A>
__device__ __forceinline__ void store_element(void* data, int64_t at, Dtype dtype, A value) {
  switch (dtype) {
    case Dtype::float32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      break;
    case Dtype::float64:
      static_cast<double*>(data)[at] = static_cast<double>(value);
      break;
    case Dtype::bfloat16:
      static_cast<bfloat16*>(data)[at] = from_arithmetic<bfloat16>(value);
      break;
    default:
      static_cast<float16*>(data)[at] = from_arithmetic<float16>(value);
  }
}

// Element i of a vector of Values.
template <class A>
__device__ __forceinline__ A value_at(const Values& v, int64_t i) {
  return load_element<A>(v.data, i * v.stride, v.dtype);
}

// body(data), with the labels' data as what it is.
template <class Body>
__device__ __forceinline__ auto with_labels(const Labels& labels, const Body& body) {
  switch (labels.type) {
    case LabelType::int64:
      return body(static_cast<const int64_t*>(labels.data));
    case LabelType::int32:
      return body(static_cast<const int32_t*>(labels.data));
    default:
      return body(static_cast<const uint8_t*>(labels.data));
  }
}

// Class of row i, -1 where it is ignored; a label out of range ends the kernel.
__device__ __forceinline__ int class_of(const Labels& labels, int64_t i, int64_t K) {
  if (labels.data == nullptr) return 0;
  const int64_t at = i * labels.stride;
  const int64_t label =
      labels.type == LabelType::int64   ? static_cast<const int64_t*>(labels.data)[at]
      : labels.type == LabelType::int32 ? static_cast<const int32_t*>(labels.data)[at]
                                        : static_cast<const uint8_t*>(labels.data)[at];
  if (label == labels.ignore_index) return -1;
  require(label >= 0 && label < K);
  return static_cast<int>(label);
}

// Of every `step`th row those that are not ignored. No label is judged here, so that the loads need
// not wait for each other.
__device__ __forceinline__ unsigned count_labelled(const Labels& labels, int64_t N, int64_t first,
                                                   int64_t step) {
  return with_labels(labels, [&](const auto* data) {
    unsigned rows = 0;
#pragma unroll 8
    for (int64_t i = first; i < N; i += step) {
      rows += static_cast<int64_t>(data[i * labels.stride]) != labels.ignore_index ? 1u : 0u;
    }
    return rows;
  });
}

__device__ __forceinline__ bool is_active(const ClassCounts& counts, int64_t k) {
  return counts.data == nullptr || counts.data[k * counts.stride] > 0;
}

// All lanes get the same bits: at each step both partners add the same two numbers.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) {
    const T other = __shfl_xor_sync(kAllLanes, value, bits);
    value = other > value ? other : value;
  }
  return value;
}

// The same of numbers (no NaN) in one instruction: in this order of bits floats compare as
// integers.
__device__ __forceinline__ float warp_largest(float number) {
  const auto ordered = [](int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  return bit_cast<float>(ordered(__reduce_max_sync(kAllLanes, ordered(bit_cast<int>(number)))));
}

// The sum over a block of whole warps, in a fixed order; every thread calls it and gets it.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T parts[32];
  value = warp_sum(value);
  __syncthreads();  // the parts of an earlier call have been read
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  T sum = T(0);
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += parts[w];
  return sum;
}

// Whether this block is the last of `blocks` to come here: then it sees what all others wrote. The
// counter is zero again afterwards.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

inline unsigned blocks_for(int64_t work, int64_t per_block, int64_t most) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks > most ? most : blocks));
}

}  // namespace cuda
}  // namespace pycdgkd
