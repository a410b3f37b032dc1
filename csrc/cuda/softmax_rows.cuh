// Eqs. 2-4 of many classes, from products that come from a matrix product (many_classes.cu).
#pragma once

#include "centred.cuh"
#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int active_class_of(const Labels& labels, const ClassCounts& counts,
                                               int64_t i, int64_t K) {
  const int y = class_of(labels, i, K);
  return y >= 0 && is_active(counts, y) ? y : -1;
}

// What the residuals of all rows are multiplied with, and of row i.
template <class A>
struct RowFactors {
  const SoftmaxRows& s;
  double common;
  bool by_row;

  __device__ __forceinline__ explicit RowFactors(const SoftmaxRows& rows)
      : s(rows),
        common(rows.factor.constant * (rows.factor.one != nullptr ? *rows.factor.one : 1.0)),
        by_row(rows.factor.by_row.data != nullptr && rows.factor.by_row.stride != 0) {
    if (s.factor.by_row.data != nullptr && !by_row) common *= value_at<double>(s.factor.by_row, 0);
    if (s.rows != nullptr) common /= *s.rows > 1.0 ? *s.rows : 1.0;
  }
  __device__ __forceinline__ A of(int64_t i) const {
    return static_cast<A>(common) * (by_row ? value_at<A>(s.factor.by_row, i) : A(1));
  }
};

// What a row of logits a_k comes to: the true class is left out of the sum of the others, and its
// residual is their complement: p - 1 would cancel.
template <class A>
struct RowResult {
  A loss = A(0), true_prob = A(0), inverse = A(0), true_residual = A(0);

  RowResult() = default;
  __device__ __forceinline__ RowResult(A maximum, A true_logit, double others) {
    const A true_exp = exp_nonpositive(true_logit - maximum);
    const double total = others + static_cast<double>(true_exp);
    inverse = static_cast<A>(1.0 / total);
    true_residual = static_cast<A>(-others / total);
    loss = cross_entropy(maximum, true_logit, true_exp, static_cast<A>(others));
    true_prob = static_cast<A>(static_cast<double>(true_exp) / total);
  }
  __device__ __forceinline__ void leave(const SoftmaxRows& s, int64_t i) const {
    if (threadIdx.x != 0) return;
    if (s.row_loss != nullptr) static_cast<A*>(s.row_loss)[i] = loss;
    if (s.true_prob != nullptr) static_cast<A*>(s.true_prob)[i] = true_prob;
  }
};

// ---- rows that shared memory holds --------------------------------------------------------------

template <class A>
constexpr int kMostThreads = sizeof(A) == 8 ? 512 : 1024;
constexpr int kThreadClasses = 32;  // of a row, as long as there are threads enough

template <class A>
__device__ __forceinline__ A block_max(A value) {
  __shared__ A parts[32];
  value = warp_max(value);
  if (blockDim.x == 32) return value;
  __syncthreads();  // the parts of an earlier call have been read
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  return warp_max(lane_id() < static_cast<int>(blockDim.x) / 32 ? parts[lane_id()]
                                                                : -infinity<A>());
}

// Vectors of V classes, one of each V blockDim.x; `held` is a thread's own there.
template <int V, class A>
__device__ __forceinline__ void held_row(const SoftmaxRows& s, A* x, A* held, int y, A factor,
                                         int64_t i) {
  constexpr int ahead = 4;  // vectors loaded before the first is used
  const A* bias = static_cast<const A*>(s.bias);
  const A twice = static_cast<A>(2.0 * s.scale);
  const int K = static_cast<int>(s.K), first = static_cast<int>(threadIdx.x) * V;
  const int step = static_cast<int>(blockDim.x) * V;
  const A true_logit = twice * x[y] + bias[y];
  A maximum = -infinity<A>();
#pragma unroll 1
  for (int begin = first; begin < K; begin += ahead * step) {
    A a[ahead][V];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      if (begin + u * step < K) load_array<V>(x + begin + u * step, a[u]);
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int k = begin + u * step;
      if (k >= K) continue;
      A b[V];
      load_array<V>(bias + k, b);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        a[u][v] = twice * a[u][v] + b[v];
        maximum = a[u][v] > maximum ? a[u][v] : maximum;
      }
      store_array<V>(held + k, a[u]);
    }
  }
  maximum = block_max(maximum);
  double others = 0.0;
#pragma unroll 2
  for (int k = first; k < K; k += step) {
    A e[V], sum = A(0);
    load_array<V>(held + k, e);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      e[v] = exp_nonpositive(e[v] - maximum);
      sum += k + v == y ? A(0) : e[v];
    }
    others += static_cast<double>(sum);
    store_array<V>(held + k, e);
  }
  // From here on every thread has read the true class's product.
  const RowResult<A> row(maximum, true_logit, block_sum(others));
  row.leave(s, i);
  if (!s.need_grad) return;
#pragma unroll 2
  for (int k = first; k < K; k += step) {
    A e[V];
    load_array<V>(held + k, e);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A residual = k + v == y ? row.true_residual : e[v] * row.inverse;
      e[v] = factor == A(0) ? A(0) : factor * residual;
    }
    store_array<V>(x + k, e);
  }
}

template <class A>
__global__ void __launch_bounds__(kMostThreads<A>, 1)
    held_rows_kernel(const __grid_constant__ SoftmaxRows s) {
  constexpr int V = kVector<A>;
  A* held = reinterpret_cast<A*>(dynamic_shared());
  const RowFactors<A> factors(s);
  const bool vectors = s.K % V == 0 && reinterpret_cast<uintptr_t>(s.products) % 16 == 0;
  for (int64_t r = blockIdx.x; r < s.N; r += gridDim.x) {
    const int64_t i = s.first + r;
    const int y = active_class_of(s.labels, s.counts, i, s.K);
    A* x = static_cast<A*>(s.products) + r * s.K;
    if (y < 0) {
      RowResult<A>().leave(s, i);
      for (int64_t k = threadIdx.x; s.need_grad && k < s.K; k += blockDim.x) x[k] = A(0);
    } else if (vectors) {
      held_row<V>(s, x, held, y, factors.of(i), i);
    } else {
      held_row<1>(s, x, held, y, factors.of(i), i);
    }
  }
}

// ---- longer ones, which are read twice ----------------------------------------------------------

// A row's largest value and the sum of e^(a - largest) of all classes but the true one, found in
// one pass: what was summed under a smaller maximum is brought to the new one.
template <class A>
struct Softmax {
  A maximum;
  double others;
};

template <class A>
__device__ __forceinline__ void merge(Softmax<A>& s, A maximum, double others) {
  if (maximum > s.maximum) {
    s.others *= static_cast<double>(exp_nonpositive(s.maximum - maximum));
    s.maximum = maximum;
  } else if (maximum < s.maximum) {
    others *= static_cast<double>(exp_nonpositive(maximum - s.maximum));
  }
  s.others += others;
}

template <class A>
__device__ __forceinline__ Softmax<A> row_softmax(const A* x, const A* bias, A twice, int64_t K,
                                                  int y) {
  __shared__ Softmax<A> warps[kThreads / 32];
  Softmax<A> s{-infinity<A>(), 0.0};
  bool nan = false;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const A a = twice * x[k] + bias[k];
    nan = nan || a != a;
    if (a == -infinity<A>()) continue;
    if (a > s.maximum) {
      s.others *= static_cast<double>(exp_nonpositive(s.maximum - a));
      s.maximum = a;
    }
    if (k != y) s.others += static_cast<double>(exp_nonpositive(a - s.maximum));
  }
  if (nan) s.others = static_cast<double>(infinity<A>() - infinity<A>());
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) {
    const A maximum = __shfl_xor_sync(kAllLanes, s.maximum, bits);
    const double others = __shfl_xor_sync(kAllLanes, s.others, bits);
    merge(s, maximum, others);
  }
  __syncthreads();  // what an earlier row left has been read
  if (lane_id() == 0) warps[warp_id()] = s;
  __syncthreads();
  Softmax<A> all = warps[0];
  for (int w = 1; w < kThreads / 32; ++w) merge(all, warps[w].maximum, warps[w].others);
  return all;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    softmax_rows_kernel(const __grid_constant__ SoftmaxRows s) {
  const A* bias = static_cast<const A*>(s.bias);
  const A twice = static_cast<A>(2.0 * s.scale);
  const RowFactors<A> factors(s);
  for (int64_t r = blockIdx.x; r < s.N; r += gridDim.x) {
    const int64_t i = s.first + r;
    const int y = active_class_of(s.labels, s.counts, i, s.K);
    A* x = static_cast<A*>(s.products) + r * s.K;
    A maximum = A(0);
    RowResult<A> row;
    if (y >= 0) {
      const Softmax<A> sums = row_softmax(x, bias, twice, s.K, y);
      maximum = sums.maximum;
      row = RowResult<A>(maximum, twice * x[y] + bias[y], sums.others);
    }
    row.leave(s, i);
    if (!s.need_grad) continue;
    const A factor = y < 0 ? A(0) : factors.of(i);
    __syncthreads();  // the true class's product has been read by all
    for (int64_t k = threadIdx.x; k < s.K; k += kThreads) {
      const A a = twice * x[k] + bias[k];
      const A residual = k == y ? row.true_residual : exp_nonpositive(a - maximum) * row.inverse;
      x[k] = factor == A(0) ? A(0) : factor * residual;
    }
  }
}

template <class A>
void start_softmax(const SoftmaxRows& s, Stream stream) {
  const int64_t multiprocessors = device_limits().multiprocessors;
  // Beside the row: what the kernel declares itself.
  const size_t bytes = static_cast<size_t>(padded(s.K)) * sizeof(A);
  if (bytes + 2048 > device_limits().shared_bytes) {
    const unsigned blocks = blocks_for(s.N, 1, 8 * multiprocessors);
    return launch<softmax_rows_kernel<A>>(blocks, kThreads, 0, stream, s);
  }
  unsigned threads = 32;
  while (threads < kMostThreads<A> && threads * kThreadClasses < s.K) threads *= 2;
  launch<held_rows_kernel<A>>(blocks_for(s.N, 1, 32 * multiprocessors), threads, bytes, stream, s);
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
