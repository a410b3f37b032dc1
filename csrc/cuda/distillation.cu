// Eq. 9 on CUDA: which kernel serves which length of rows; the scaling of a gradient that is there.
#include <algorithm>

#include "distillation.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int64_t kShortRows = 32;

struct CountArguments {
  int64_t N;
  Labels labels;
  unsigned* counted;
};

__global__ void __launch_bounds__(256)
    count_labels_kernel(const __grid_constant__ CountArguments c) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const unsigned rows = block_sum(count_labelled(c.labels, c.N, first, step));
  if (threadIdx.x == 0) c.counted[blockIdx.x] = rows;
}

unsigned blocks_of(int64_t N, int64_t K) {
  const int64_t processors = device_limits().multiprocessors;
  if (K > kShortRows) {
    // Few blocks on each: what their rows leave to be read again fits the L2 cache.
    return blocks_for(N, 1, K > 8192 ? 2 * processors : 8 * processors);
  }
  if (K <= 8) return blocks_for(N, kRowThreads, 16 * processors);
  return blocks_for(N, K <= 16 ? 16 : 8, 8 * processors);
}

int threads_of(int64_t K) { return K <= 512 ? 64 : (K <= 2048 ? 128 : (K <= 8192 ? 256 : 512)); }

// Shared memory of a block for rows: so much that the blocks of `blocks_of` fit a multiprocessor.
size_t room_of(int64_t K) {
  const size_t shared = device_limits().shared_bytes;
  const size_t room = K > 8192 ? shared / 2 : shared / 8;
  const size_t own = 8192;  // what the kernel declares itself
  return room > own ? room - own : 0;
}

template <class A, class T>
__global__ void __launch_bounds__(256) scale_rows_kernel(const __grid_constant__ ScaleRows s) {
  await_previous();
  let_next_begin();
  const int64_t count = s.N * s.K, step = static_cast<int64_t>(gridDim.x) * 256;
  const T* unit = static_cast<const T*>(s.unit);
  const bool by_row = s.factors.stride != 0;
  const A factor = by_row ? A(1) : value_at<A>(s.factors, 0);
  if (!by_row && factor == A(1) && s.unit == s.grad) return;
  constexpr int V = kVector<T>;
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(s.unit) | reinterpret_cast<uintptr_t>(s.grad);
  const bool vectors = !by_row && s.grad_dtype == s.unit_dtype && places % 16 == 0;
  const int64_t whole = vectors ? count / V : 0;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  for (int64_t at = own; at < whole; at += step) {
    A x[V];
    load_vector(unit + at * V, x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] *= factor;
    store_packed<T, V>(static_cast<T*>(s.grad) + at * V, x);
  }
  for (int64_t at = whole * V + own; at < count; at += step) {
    const A by = by_row ? value_at<A>(s.factors, at / s.K) : factor;
    store_element(s.grad, at, s.grad_dtype, by * static_cast<A>(to_arithmetic(unit[at])));
  }
}

}  // namespace

size_t distillation_bytes(const Distillation& d) {
  const unsigned chunks = d.K > kShortRows ? blocks_for(d.N, 1, kMostChunks) : 0;
  const unsigned partials = std::max(blocks_of(d.N, d.K), chunks);
  return 16 + kCountBlocks * sizeof(unsigned) + 2 * sizeof(double) * partials;
}

void distillation(const Distillation& d, Stream stream) {
  auto* space = static_cast<char*>(d.workspace);
  auto* counted = reinterpret_cast<unsigned*>(space + 16);
  auto* partials = reinterpret_cast<double*>(space + 16 + kCountBlocks * sizeof(unsigned));
  DistillationArguments a{d.N,
                          d.K,
                          static_cast<int>(d.S),
                          d.temperature,
                          d.ce_weight,
                          d.kl_weight,
                          d.direction,
                          d.logits,
                          d.source_weights,
                          d.labels,
                          d.reduction,
                          d.row_kl,
                          d.grad,
                          d.loss,
                          d.cross_entropy,
                          d.kl,
                          d.grad_dtype,
                          nullptr,
                          partials,
                          take_counters(d.workspace, 2, stream),
                          1,
                          0,
                          0,
                          {},
                          {}};
  for (int64_t j = 0; j < d.S; ++j) {
    a.sources[j] = {d.sources[j].data, d.sources[j].row_stride, d.sources[j].col_stride};
    a.dtypes[j] = d.sources[j].dtype;
  }
  if (d.labels.data != nullptr && d.N > kCountedByEach) {
    launch<count_labels_kernel>(kCountBlocks, 256, 0, stream,
                                CountArguments{d.N, d.labels, counted});
    a.counted = counted;
  }
  const unsigned blocks = blocks_of(d.N, d.K);
  if (d.K > kShortRows && !d.wide && distill_cluster_rows(a, stream)) return;
  if (d.K <= kShortRows) {
    distill_short_rows(a, d.wide, blocks, stream);
  } else {
    distill_long_rows(a, d.wide, blocks, threads_of(d.K), room_of(d.K), stream);
  }
}

void scale_rows(const ScaleRows& s, Stream stream) {
  if (s.N == 0 || s.K == 0) return;
  const unsigned blocks = blocks_for(s.N * s.K, 2048, 16 * device_limits().multiprocessors);
  if (s.wide) {
    launch_early<scale_rows_kernel<double, double>>(blocks, 256, 0, stream, s);
  } else if (s.unit_dtype == Dtype::bfloat16) {
    launch_early<scale_rows_kernel<float, bfloat16>>(blocks, 256, 0, stream, s);
  } else {
    launch_early<scale_rows_kernel<float, float>>(blocks, 256, 0, stream, s);
  }
}

}  // namespace cuda
}  // namespace pycdgkd
