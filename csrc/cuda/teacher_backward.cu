// Gradients of few classes from the residuals of the forward pass: of the logits and of the
// features of all modalities in one launch, of prototypes in one more.
//
// grad_z_i = factor_i sum_k residual_ik (c_k - mean): a thread keeps some columns of all prototypes
// in registers and writes them row by row, so that nothing but the gradient moves; it never reads
// the features.
#include "centred.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 32;  // rows whose residuals lie in shared memory
constexpr int kMostModalities = 8;

struct Arguments {
  int64_t N, K;
  int logits;  // 1: blockIdx.y 0 is the logits, else 0
  Factor logits_factor;
  const void* logits_residual;
  void* grad_logits;
  Dtype logits_dtype;
  ModalityBackward parts[kMostModalities];
};

// Of row i, without what is the same in all rows.
template <class A>
__device__ __forceinline__ A row_factor(const Factor& f, int64_t i) {
  return f.by_row.data != nullptr && f.by_row.stride != 0 ? value_at<A>(f.by_row, i) : A(1);
}

__device__ __forceinline__ double common_factor(const Factor& f) {
  const bool one = f.by_row.data != nullptr && f.by_row.stride == 0;
  return f.constant * (one ? value_at<double>(f.by_row, 0) : 1.0) *
         (f.one != nullptr ? *f.one : 1.0);
}

// factor_i residual_ik of `rows` rows from `first` on, the first C classes; zeros for a factor 0.
template <class A, int C>
__device__ __forceinline__ void load_residuals(const Factor& f, A common, const void* residual,
                                               int64_t K, int64_t first, int rows, A (*tile)[C]) {
  const int classes = K < C ? static_cast<int>(K) : C;
  __syncthreads();  // the tile before has been used
  for (int at = static_cast<int>(threadIdx.x); at < kTile * C; at += kThreads) {
    const int r = at / C, k = at - r * C;
    A value = A(0);
    if (r < rows && k < classes) {
      const A factor = common * row_factor<A>(f, first + r);
      const A x = static_cast<const A*>(residual)[(first + r) * K + k];
      value = factor == A(0) ? A(0) : factor * x;
    }
    tile[r][k] = value;
  }
  __syncthreads();
}

template <int V, class A>
__device__ __forceinline__ void store_columns(void* to, int64_t at, Dtype dtype, int64_t columns,
                                              const A (&values)[V]) {
  if constexpr (V > 1) {
    if (columns >= V && dtype == Dtype::float32 && V % 4 == 0 && at % 4 == 0) {
      float pieces[V];
#pragma unroll
      for (int v = 0; v < V; ++v) pieces[v] = static_cast<float>(values[v]);
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        uint4 raw;
        memcpy(&raw, pieces + v, 16);
        *reinterpret_cast<uint4*>(static_cast<float*>(to) + at + v) = raw;
      }
      return;
    }
    if (columns >= V && V == 4 && at % 4 == 0 &&
        (dtype == Dtype::bfloat16 || dtype == Dtype::float16)) {
      uint16_t pieces[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        pieces[v] = dtype == Dtype::bfloat16 ? from_arithmetic<bfloat16>(values[v]).bits
                                             : from_arithmetic<float16>(values[v]).bits;
      }
      uint2 raw;
      memcpy(&raw, pieces, sizeof(raw));
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + at) = raw;
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v < columns) store_element(to, at + v, dtype, values[v]);
  }
}

// Columns of a block: V a thread. C prototypes, or with C = 1 the difference of two, whose
// residuals sum to 0.
template <class A, int C, int V>
__device__ __forceinline__ void modality_grad(const Arguments& a, const ModalityBackward& m) {
  __shared__ __align__(16) A tile[kTile][C];
  const Centred<A> p(m.centred, m.D, a.K);
  const A common = static_cast<A>(common_factor(m.factor));
  const int64_t tiles = (m.D + kThreads * V - 1) / (kThreads * V);
  const int64_t row_blocks = gridDim.x / tiles;
  if (row_blocks == 0 || blockIdx.x >= tiles * row_blocks) return;
  const int64_t column = (blockIdx.x % tiles * kThreads + threadIdx.x) * V;
  const int64_t columns = m.D - column;
  A c[C][V];
#pragma unroll
  for (int k = 0; k < C; ++k) {
#pragma unroll
    for (int v = 0; v < V; ++v) c[k][v] = A(0);
    const int64_t row = C == 1 ? 2 : k;
    if ((C == 1 || k < a.K) && columns > 0) load_array<V>(p.rows + row * p.stride + column, c[k]);
  }
  const int64_t step = row_blocks * kTile;
  for (int64_t first = blockIdx.x / tiles * kTile; first < a.N; first += step) {
    const int rows = static_cast<int>(a.N - first < kTile ? a.N - first : kTile);
    load_residuals<A, C>(m.factor, common, m.residual, a.K, first, rows, tile);
    if (columns <= 0) continue;
#pragma unroll 2
    for (int r = 0; r < rows; ++r) {
      A sums[V];
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] = A(0);
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const A x = tile[r][k];
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v] += x * c[k][v];
      }
      // A factor of 0 writes zeros, whatever the prototypes hold.
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] = common == A(0) ? A(0) : sums[v];
      store_columns<V>(m.grad, (first + r) * m.D + column, m.grad_dtype, columns, sums);
    }
  }
}

template <class A>
__device__ __forceinline__ void logits_grad(const Arguments& a) {
  const A common = static_cast<A>(common_factor(a.logits_factor));
  const int64_t count = a.N * a.K, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += step) {
    const A value = common == A(0) ? A(0) : common * static_cast<const A*>(a.logits_residual)[at];
    store_element(a.grad_logits, at, a.logits_dtype, value);
  }
}

template <class A, int C, int V>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Arguments a) {
  const int y = static_cast<int>(blockIdx.y);
  if (a.logits != 0 && y == 0) return logits_grad<A>(a);
  modality_grad<A, C, V>(a, a.parts[y - a.logits]);
}

template <class A, int C, int V>
void start(const Arguments& a, int parts, int modalities, Stream stream) {
  const int64_t most = 16 * device_limits().multiprocessors;
  int64_t blocks = a.logits != 0 ? blocks_for(a.N * a.K, 4 * kThreads, most) : 1;
  for (int m = 0; m < modalities; ++m) {
    const int64_t tiles = (a.parts[m].D + kThreads * V - 1) / (kThreads * V);
    const int64_t rows = blocks_for(a.N, kTile, tiles < most ? most / tiles : 1);
    if (tiles > 0 && tiles * rows > blocks) blocks = tiles * rows;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  launch<backward_kernel<A, C, V>>(grid, kThreads, 0, stream, a);
}

template <class A>
void start(const Arguments& a, int parts, int modalities, Stream stream) {
  constexpr int wide = sizeof(A) / 4;
  if (a.K == 2) return start<A, 1, 4 / wide>(a, parts, modalities, stream);
  if (a.K <= 4) return start<A, 4, 4 / wide>(a, parts, modalities, stream);
  if (a.K <= 8) return start<A, 8, 4 / wide>(a, parts, modalities, stream);
  if (a.K <= 16) return start<A, 16, 4 / wide>(a, parts, modalities, stream);
  start<A, 32, 2 / wide>(a, parts, modalities, stream);
}

// ---- the prototypes' gradient -------------------------------------------------------------------

struct PrototypeArguments {
  PrototypeGrad p;
  int64_t chunk_rows;
  double* sums;        // (chunks, K, D)
  unsigned* counters;  // (column tiles,)
};

// A thread owns a column: sum_i residual_ik (z_i - mean), less what all of them share.
template <class A, int C>
__global__ void __launch_bounds__(kThreads, 1)
    prototype_grad_kernel(const __grid_constant__ PrototypeArguments a) {
  __shared__ __align__(16) A tile[kTile][C];
  __shared__ double totals[C];
  const PrototypeGrad& g = a.p;
  const Centred<A> p(g.centred, g.D, g.K);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + t;
  const A common = static_cast<A>(common_factor(g.factor));
  const A mean = column < g.D ? p.mean[column] : A(0);
  double sums[C];
#pragma unroll
  for (int k = 0; k < C; ++k) sums[k] = 0.0;
  double total = 0.0;
  const int64_t begin = blockIdx.y * a.chunk_rows;
  const int64_t end = begin + a.chunk_rows < g.N ? begin + a.chunk_rows : g.N;
  for (int64_t first = begin; first < end; first += kTile) {
    const int rows = static_cast<int>(end - first < kTile ? end - first : kTile);
    load_residuals<A, C>(g.factor, common, g.residual, g.K, first, rows, tile);
    for (int r = 0; t < C && r < rows; ++r) total += static_cast<double>(tile[r][t]);
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      if (column >= g.D) continue;
      const A z = load_element<A>(
          g.features.data, (first + r) * g.features.row_stride + column * g.features.col_stride,
          g.features.dtype);
      const A x = z - mean;
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const A weight = tile[r][k];
        // A row of weight 0 takes no part, whatever it holds.
        sums[k] += weight == A(0) ? 0.0 : static_cast<double>(weight) * static_cast<double>(x);
      }
    }
  }
  if (t < C) totals[t] = total;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < C; ++k) {
    if (k < g.K && column < g.D) {
      const A c = p.rows[k * p.stride + column];
      a.sums[(blockIdx.y * g.K + k) * g.D + column] =
          totals[k] == 0.0 ? sums[k] : sums[k] - totals[k] * static_cast<double>(c);
    }
  }
  if (!is_last_block(a.counters + blockIdx.x, gridDim.y) || column >= g.D) return;
  for (int64_t k = 0; k < g.K; ++k) {
    double sum = 0.0;
    for (unsigned chunk = 0; chunk < gridDim.y; ++chunk) {
      sum += a.sums[(chunk * g.K + k) * g.D + column];
    }
    static_cast<A*>(g.grad)[k * g.D + column] = static_cast<A>(sum);
  }
}

int64_t column_tiles(const PrototypeGrad& g) { return (g.D + kThreads - 1) / kThreads; }

int64_t chunk_rows_of(const PrototypeGrad& g) {
  const int64_t tiles = column_tiles(g);
  const int64_t wanted = 6 * device_limits().multiprocessors / (tiles > 0 ? tiles : 1) + 1;
  const int64_t rows = (g.N + wanted - 1) / wanted;
  return rows < 2 * kTile ? 2 * kTile : (rows + kTile - 1) / kTile * kTile;
}

int64_t chunks_of(const PrototypeGrad& g) {
  const int64_t rows = chunk_rows_of(g);
  return g.N > rows ? (g.N + rows - 1) / rows : 1;
}

template <class A>
void start_prototypes(const PrototypeArguments& a, dim3 grid, Stream stream) {
  const int64_t K = a.p.K;
  if (K <= 2) return launch<prototype_grad_kernel<A, 2>>(grid, kThreads, 0, stream, a);
  if (K <= 8) return launch<prototype_grad_kernel<A, 8>>(grid, kThreads, 0, stream, a);
  launch<prototype_grad_kernel<A, 32>>(grid, kThreads, 0, stream, a);
}

}  // namespace

void teacher_backward(const TeacherBackward& t, Stream stream) {
  if (t.N == 0) return;
  bool logits = t.grad_logits != nullptr;
  int64_t next = 0;
  do {
    Arguments a{
        t.N, t.K, logits ? 1 : 0, t.logits_factor, t.logits_residual, t.grad_logits, t.logits_dtype,
        {}};
    int modalities = 0;
    while (next < t.M && modalities < kMostModalities) {
      const ModalityBackward& m = t.modalities[next++];
      if (m.grad != nullptr && m.D > 0) a.parts[modalities++] = m;
    }
    const int parts = modalities + a.logits;
    if (parts > 0) {
      t.wide ? start<double>(a, parts, modalities, stream)
             : start<float>(a, parts, modalities, stream);
    }
    logits = false;
  } while (next < t.M);
}

size_t prototype_grad_bytes(const PrototypeGrad& g) {
  return static_cast<size_t>(chunks_of(g) * g.K * g.D) * sizeof(double) +
         static_cast<size_t>(column_tiles(g)) * sizeof(unsigned);
}

void prototype_grad(const PrototypeGrad& g, void* workspace, Stream stream) {
  if (g.D == 0) return;
  const int64_t tiles = column_tiles(g), chunks = chunks_of(g);
  auto* sums = static_cast<double*>(workspace);
  unsigned* counters =
      take_counters(sums + chunks * g.K * g.D, static_cast<unsigned>(tiles), stream);
  const PrototypeArguments a{g, chunk_rows_of(g), sums, counters};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(chunks));
  g.wide ? start_prototypes<double>(a, grid, stream) : start_prototypes<float>(a, grid, stream);
}

}  // namespace cuda
}  // namespace pycdgkd
