// Eqs. 2-4 for many classes: what lies around the products with all prototypes, which come from a
// matrix product, a block of rows at a time.
#include "softmax_rows.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kWarps = kThreads / 32;

struct CentreArguments {
  Centre c;
  double* sums;  // (chunks, D + 1): of the active prototypes, and how many they are
};

// Prototypes of a block: enough for its warps, and so many that few sums are left to add.
int64_t chunk_of(int64_t K) { return K > 32 * 64 ? (K + 31) / 32 : 64; }
int64_t chunks_of(int64_t K) { return (K + chunk_of(K) - 1) / chunk_of(K); }

template <class T>
__device__ __forceinline__ double column_sum(const Centre& c, int64_t column, int64_t begin,
                                             int64_t end) {
  const T* data = static_cast<const T*>(c.prototypes.data) + column * c.prototypes.col_stride;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t k = begin + warp_id(); k < end; k += kWarps) {
    // Loaded in any case, so that no load waits for a count.
    const auto x = static_cast<double>(to_arithmetic(data[k * c.prototypes.row_stride]));
    sum += is_active(c.counts, k) ? x : 0.0;
  }
  return sum;
}

// Sums of a chunk of prototypes, a column a lane; column D counts.
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const __grid_constant__ CentreArguments a, int64_t chunk) {
  __shared__ double parts[kWarps][32];
  const Centre& c = a.c;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < c.K ? begin + chunk : c.K;
  double sum = 0.0;
  if (column == c.D) {
    for (int64_t k = begin + warp_id(); k < end; k += kWarps) {
      sum += is_active(c.counts, k) ? 1.0 : 0.0;
    }
  } else if (column < c.D) {
    const Dtype dtype = c.prototypes.dtype;
    sum = dtype == Dtype::float32    ? column_sum<float>(c, column, begin, end)
          : dtype == Dtype::float64  ? column_sum<double>(c, column, begin, end)
          : dtype == Dtype::bfloat16 ? column_sum<bfloat16>(c, column, begin, end)
                                     : column_sum<float16>(c, column, begin, end);
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() != 0 || column > c.D) return;
  sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w][lane_id()];
  a.sums[blockIdx.y * (c.D + 1) + column] = sum;
}

template <class A>
__global__ void __launch_bounds__(32)
    column_means_kernel(const __grid_constant__ CentreArguments a, int chunks) {
  const int64_t D = a.c.D, column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const Centred<A> out(a.c.centred, D, a.c.K);
  if (column >= out.stride) return;
  double sum = 0.0, active = 0.0;
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; ++chunk) {
    sum += column < D ? a.sums[chunk * (D + 1) + column] : 0.0;
    active += a.sums[chunk * (D + 1) + D];
  }
  out.mean[column] = active > 0.0 ? static_cast<A>(sum / active) : A(0);
}

// The rows less the mean and their bias, a warp a row or, of few rows, a block.
template <class A, bool block>
__global__ void __launch_bounds__(kThreads, 2)
    centred_rows_kernel(const __grid_constant__ Centre c, bool vectors) {
  constexpr int V = kVector<A>;
  const Centred<A> out(c.centred, c.D, c.K);
  constexpr int width = block ? kThreads : 32;
  const int own = block ? static_cast<int>(threadIdx.x) : lane_id();
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / width);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads / width);
  for (int64_t k = first + (block ? 0 : warp_id()); k < padded(c.K); k += step) {
    if (k >= c.K) {
      if (own == 0) out.bias[k] = A(0);
      continue;
    }
    A* to = out.rows + k * out.stride;
    const bool active = is_active(c.counts, k);
    const int64_t whole = vectors ? c.D / V * V : 0;
    A sum = A(0);
#pragma unroll 4
    for (int64_t d = own * V; d < whole; d += width * V) {
      A x[V], mean[V];
      load_array<V>(static_cast<const A*>(c.prototypes.data) + k * c.prototypes.row_stride + d, x);
      load_array<V>(out.mean + d, mean);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[v] = active ? x[v] - mean[v] : A(0);
        sum += x[v] * x[v];
      }
      store_array<V>(to + d, x);
    }
    for (int64_t d = whole + own; d < out.stride; d += width) {
      const A x = centred_element(c.prototypes, c.counts, c.D, k, d, out.mean[d]);
      to[d] = x;
      sum += x * x;
      if (c.K == 2 && k == 0) {
        to[2 * out.stride + d] =
            x - centred_element(c.prototypes, c.counts, c.D, 1, d, out.mean[d]);
      }
    }
    sum = block ? block_sum(sum) : warp_sum(sum);
    if (own == 0) out.bias[k] = active ? -static_cast<A>(c.scale) * sum : -infinity<A>();
  }
}

template <class A>
void centre(const Centre& c, double* sums, Stream stream) {
  const int64_t most = 16 * device_limits().multiprocessors;
  const int64_t chunk = chunk_of(c.K);
  const auto chunks = static_cast<unsigned>(chunks_of(c.K));
  const CentreArguments a{c, sums};
  const auto tiles = static_cast<unsigned>(c.D / 32 + 1);
  const auto mean_tiles = static_cast<unsigned>((padded(c.D) + 31) / 32);
  launch<column_sums_kernel>(dim3(tiles, chunks), kThreads, 0, stream, a, chunk);
  if (mean_tiles > 0) {
    launch<column_means_kernel<A>>(mean_tiles, 32, 0, stream, a, static_cast<int>(chunks));
  }
  // The difference of two is made by elements.
  const bool plain = c.prototypes.dtype == (c.wide ? Dtype::float64 : Dtype::float32);
  const bool vectors = plain && c.K != 2 && has_vector_rows(c.prototypes);
  if (c.K <= device_limits().multiprocessors) {
    launch<centred_rows_kernel<A, true>>(blocks_for(padded(c.K), 1, most), kThreads, 0, stream, c,
                                         vectors);
  } else {
    launch<centred_rows_kernel<A, false>>(blocks_for(padded(c.K), kWarps, most), kThreads, 0,
                                          stream, c, vectors);
  }
}

struct CountRows {
  int64_t N, K;
  Labels labels;
  ClassCounts counts;
  double* rows;
};

__global__ void __launch_bounds__(1024) count_kernel(const __grid_constant__ CountRows c) {
  constexpr int ahead = 4;
  double rows = 0.0;
  for (int64_t first = threadIdx.x; first < c.N; first += ahead * blockDim.x) {
    int k[ahead];
    int64_t counts[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int64_t i = first + u * blockDim.x;
      k[u] = i < c.N ? class_of(c.labels, i, c.K) : -1;
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      counts[u] = k[u] < 0 ? 0 : 1;
      if (k[u] >= 0 && c.counts.data != nullptr) counts[u] = c.counts.data[k[u] * c.counts.stride];
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) rows += counts[u] > 0 ? 1.0 : 0.0;
  }
  rows = block_sum(rows);
  if (threadIdx.x == 0) *c.rows = rows;
}

// A warp a row. Features are loaded whether their row takes part or not, so that they need not wait
// for its label; 0 times what an ignored row may hold is not always 0.
template <class T, class A>
__device__ __forceinline__ void centre_row(const CentreRows& c, int64_t r, bool vectors) {
  constexpr int V = kVector<T>;
  const T* from = static_cast<const T*>(c.features.data) + (c.first + r) * c.features.row_stride;
  const A* mean = static_cast<const A*>(c.mean);
  A* to = static_cast<A*>(c.rows) + r * c.D;
  const bool on = active_class_of(c.labels, c.counts, c.first + r, c.K) >= 0;
  const int64_t whole = vectors ? c.D / V * V : 0;
#pragma unroll 4
  for (int64_t d = lane_id() * V; d < whole; d += 32 * V) {
    A x[V], m[V];
    unpack<T, V>(load_packed<V>(from + d), x);
    load_array<V>(mean + d, m);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = on ? x[v] - m[v] : A(0);
    store_array<V>(to + d, x);
  }
#pragma unroll 4
  for (int64_t d = whole + lane_id(); d < c.D; d += 32) {
    const A x = static_cast<A>(to_arithmetic(from[d * c.features.col_stride]));
    to[d] = on ? x - mean[d] : A(0);
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    centre_rows_kernel(const __grid_constant__ CentreRows c, bool vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); r < c.N; r += step) {
    if constexpr (sizeof(A) == 8) {
      centre_row<double, A>(c, r, vectors);
    } else if (c.features.dtype == Dtype::float32) {
      centre_row<float, A>(c, r, vectors);
    } else if (c.features.dtype == Dtype::bfloat16) {
      centre_row<bfloat16, A>(c, r, vectors);
    } else {
      centre_row<float16, A>(c, r, vectors);
    }
  }
}

// A block takes 32 classes; its threads share out the rows, in the same order always.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_prototypes_kernel(const __grid_constant__ AddPrototypes t) {
  __shared__ double parts[kThreads / 32][32];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = warp_id(); k < t.K && i < t.N; i += kThreads / 32) {
    sum += static_cast<double>(static_cast<const A*>(t.residual)[i * t.K + k]);
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  for (int c = warp_id(); c < 32; c += kThreads / 32) {
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + c;
    if (mine >= t.K) continue;
    double total = 0.0;
    for (int w = 0; w < kThreads / 32; ++w) total += parts[w][c];
    const A* row = static_cast<const A*>(t.rows) + mine * padded(t.D);
    const A* product = static_cast<const A*>(t.product) + mine * t.D;
    A* grad = static_cast<A*>(t.grad) + mine * t.D;
    for (int64_t d = lane_id(); d < t.D; d += 32) {
      // A class without any residual takes nothing of its row, whatever that holds.
      const double taken = total == 0.0 ? 0.0 : total * static_cast<double>(row[d]);
      grad[d] =
          (t.first ? A(0) : grad[d]) + static_cast<A>(static_cast<double>(product[d]) - taken);
    }
  }
}

}  // namespace

size_t centre_bytes(int64_t D, int64_t K) {
  return static_cast<size_t>(chunks_of(K) * (D + 1)) * sizeof(double);
}

void centre_prototypes(const Centre& c, void* workspace, Stream stream) {
  auto* sums = static_cast<double*>(workspace);
  c.wide ? centre<double>(c, sums, stream) : centre<float>(c, sums, stream);
}

void count_rows(int64_t N, int64_t K, const Labels& labels, const ClassCounts& counts, double* rows,
                Stream stream) {
  launch<count_kernel>(1, 1024, 0, stream, CountRows{N, K, labels, counts, rows});
}

void centre_rows(const CentreRows& c, Stream stream) {
  if (c.N == 0) return;
  const unsigned blocks = blocks_for(c.N, kWarps, 16 * device_limits().multiprocessors);
  // Rows begin at whole vectors of the operand, too.
  const bool vectors = has_vector_rows(c.features) && c.D % 8 == 0;
  if (c.wide) {
    launch<centre_rows_kernel<double>>(blocks, kThreads, 0, stream, c, vectors);
  } else {
    launch<centre_rows_kernel<float>>(blocks, kThreads, 0, stream, c, vectors);
  }
}

void softmax_rows(const SoftmaxRows& s, Stream stream) {
  if (s.N == 0) return;
  s.wide ? start_softmax<double>(s, stream) : start_softmax<float>(s, stream);
}

void add_prototypes(const AddPrototypes& t, Stream stream) {
  const auto blocks = static_cast<unsigned>((t.K + 31) / 32);
  if (t.wide) {
    launch<add_prototypes_kernel<double>>(blocks, kThreads, 0, stream, t);
  } else {
    launch<add_prototypes_kernel<float>>(blocks, kThreads, 0, stream, t);
  }
}

}  // namespace cuda
}  // namespace pycdgkd
