// Gradients of few classes from the residuals of the forward pass: of the logits and of the
// features of all modalities in one launch, of prototypes in one more.
//
// grad_z_i = factor_i sum_k residual_ik (c_k - mean), which needs no features.
#include "centred.cuh"
#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64, kTile = 32;  // whose residuals lie in shared memory: of the features'
                                       // gradient, of the prototypes'
constexpr int kMostModalities = 8;

struct Arguments {
  int64_t N, K;
  int logits;  // 1: blockIdx.y 0 is the logits, else 0
  Factor logits_factor;
  const void* logits_residual;
  void* grad_logits;
  Dtype logits_dtype;
  int rows;  // of a block at a time, at most kRows, whole fours
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
template <int rows_held, class A, int C>
__device__ __forceinline__ void load_residuals(const Factor& f, A common, const void* residual,
                                               int64_t K, int64_t first, int rows, A (*tile)[C]) {
  const int classes = K < C ? static_cast<int>(K) : C;
  __syncthreads();  // the tile before has been used
  for (int at = static_cast<int>(threadIdx.x); at < rows_held * C; at += kThreads) {
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

// Columns of V to a thread, from registers, to rows whose factors lie in shared memory: nothing but
// the gradient moves. Where the columns are fewer than the threads, groups of threads take rows of
// their own, four at a time. T is the gradient's dtype; void, with V = 1, any, at any alignment.
//
// C prototypes, or with C = 1 the difference of two, whose residuals sum to 0.
template <class T, int V, class A, int C>
__device__ __forceinline__ void columns_grad(const Arguments& a, const ModalityBackward& m,
                                             A (&tile)[kRows][C]) {
  const Centred<A> p(m.centred, m.D, a.K);
  const A common = static_cast<A>(common_factor(m.factor));
  const int64_t vectors = (m.D + V - 1) / V;
  int width =
      kThreads;  // threads of a row; at least kThreads / 16, so that four rows are a group's
  while (width > kThreads / 16 && width / 2 >= vectors) width /= 2;
  const int64_t tiles = (vectors + width - 1) / width;
  const int64_t row_blocks = gridDim.x / tiles > 0 ? gridDim.x / tiles : 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / width * 4, step = kThreads / width * 4;
  for (int64_t block = blockIdx.x; block < tiles * row_blocks; block += gridDim.x) {
    const int64_t column = (block % tiles * width + thread % width) * V;
    A c[C][V];
#pragma unroll
    for (int k = 0; k < C; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) c[k][v] = A(0);
      // A factor of 0 writes zeros, whatever the prototypes hold.
      if (common == A(0) || column >= m.D || (C > 1 && k >= a.K)) continue;
      const A* row = p.rows + (C == 1 ? 2 : k) * p.stride + column;
      load_array<V>(row, c[k]);
    }
    for (int64_t first = block / tiles * a.rows; first < a.N; first += row_blocks * a.rows) {
      const int rows = static_cast<int>(a.N - first < a.rows ? a.N - first : a.rows);
      load_residuals<kRows>(m.factor, common, m.residual, a.K, first, rows, tile);
      if (column >= m.D) continue;
#pragma unroll 1
      for (int r = group; r < rows; r += step) {
        A four[4];  // with C = 1, the factors of four rows by one load
        if constexpr (C == 1) load_array<4>(&tile[0][0] + r, four);
        int64_t at = (first + r) * m.D + column;
#pragma unroll
        for (int u = 0; u < 4; ++u, at += m.D) {
          A x[C], sums[V];
          if constexpr (C == 1) {
            x[0] = four[u];
          } else {
            load_array<C>(tile[r + u], x);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] = x[0] * c[0][v];
#pragma unroll
          for (int k = 1; k < C; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v] += x[k] * c[k][v];
          }
          if (r + u >= rows) continue;
          if constexpr (std::is_void_v<T>) {
            store_element(m.grad, at, m.grad_dtype, sums[0]);
          } else {
            store_packed<T>(static_cast<T*>(m.grad) + at, sums);
          }
        }
      }
    }
  }
}

// As many columns to a thread as 16 bytes hold, unless so many prototypes would not fit registers.
template <class T, int C>
constexpr int owned_columns() {
  const int most = (C > 16 ? 2 : (C > 8 ? 4 : 8)) / (sizeof(T) == 8 && C > 16 ? 2 : 1);
  return most < kVector<T> ? most : kVector<T>;
}

template <class T, int C>
__device__ __forceinline__ bool has_vectors(const ModalityBackward& m) {
  constexpr int V = owned_columns<T, C>();
  return m.grad_dtype == dtype_of<T> && m.D % V == 0 &&
         reinterpret_cast<uintptr_t>(m.grad) % (V * sizeof(T)) == 0;
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

template <class A, int C>
__global__ void __launch_bounds__(kThreads, C > 1 ? 4 : 8)
    backward_kernel(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) A tile[kRows][C];
  const int y = static_cast<int>(blockIdx.y);
  if (a.logits != 0 && y == 0) return logits_grad<A>(a);
  const ModalityBackward& m = a.parts[y - a.logits];
  if constexpr (sizeof(A) == 8) {
    if (has_vectors<double, C>(m))
      return columns_grad<double, owned_columns<double, C>()>(a, m, tile);
  } else {
    if (has_vectors<float, C>(m)) return columns_grad<float, owned_columns<float, C>()>(a, m, tile);
    if (has_vectors<bfloat16, C>(m)) {
      return columns_grad<bfloat16, owned_columns<bfloat16, C>()>(a, m, tile);
    }
    if (has_vectors<float16, C>(m)) {
      return columns_grad<float16, owned_columns<float16, C>()>(a, m, tile);
    }
  }
  columns_grad<void, 1>(a, m, tile);
}

// A factor alone, of whole vectors; what is left over is a thread's of the first block.
template <class T, class A>
__device__ __forceinline__ void scale_vectors(const Arguments& a, A common) {
  constexpr int V = kVector<A>;
  const auto* from = static_cast<const A*>(a.logits_residual);
  auto* to = static_cast<T*>(a.grad_logits);
  const int64_t count = a.N * a.K / V, step = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += step) {
    A x[V];
    unpack<A, V>(load_packed<V>(from + at * V), x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = common == A(0) ? A(0) : common * x[v];
    store_packed<T>(to + at * V, x);
  }
  const int64_t at = count * V + threadIdx.x;
  if (blockIdx.x != 0 || at >= a.N * a.K) return;
  to[at] = from_arithmetic<T>(common == A(0) ? A(0) : common * from[at]);
}

template <class A>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Arguments a) {
  await_previous();
  let_next_begin();
  const A common = static_cast<A>(common_factor(a.logits_factor));
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(a.logits_residual) | reinterpret_cast<uintptr_t>(a.grad_logits);
  if (places % 16 != 0) return logits_grad<A>(a);
  if constexpr (sizeof(A) == 8) {
    if (a.logits_dtype == Dtype::float64) return scale_vectors<double>(a, common);
  } else {
    if (a.logits_dtype == Dtype::float32) return scale_vectors<float>(a, common);
    if (a.logits_dtype == Dtype::bfloat16) return scale_vectors<bfloat16>(a, common);
    if (a.logits_dtype == Dtype::float16) return scale_vectors<float16>(a, common);
  }
  logits_grad<A>(a);
}

template <class A, int C>
void start(Arguments a, int parts, int modalities, Stream stream) {
  const int64_t most = 16 * device_limits().multiprocessors;
  int64_t blocks = a.logits != 0 ? blocks_for(a.N * a.K, 4 * kThreads, most) : 1;
  int64_t widest = 0;
  for (int m = 0; m < modalities; ++m) widest = a.parts[m].D > widest ? a.parts[m].D : widest;
  // At least the kernel's own tiles of columns. Few rows are spread over more blocks.
  const int64_t tiles = (widest + kThreads - 1) / kThreads;
  a.rows = a.N * tiles < kRows * most ? kRows / 4 : kRows;
  const int64_t wanted = tiles * ((a.N + a.rows - 1) / a.rows);
  blocks = wanted > blocks ? (wanted < most ? wanted : most) : blocks;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  launch<backward_kernel<A, C>>(grid, kThreads, 0, stream, a);
}

template <class A>
void start(const Arguments& a, int parts, int modalities, Stream stream) {
  if (modalities == 0) {
    constexpr int64_t per_block = 4 * kThreads * kVector<A>;
    const int64_t most = 32 * device_limits().multiprocessors;
    return launch_early<scale_kernel<A>>(blocks_for(a.N * a.K, per_block, most), kThreads, 0,
                                         stream, a);
  }
  if (a.K == 2) return start<A, 1>(a, parts, modalities, stream);
  if (a.K <= 4) return start<A, 4>(a, parts, modalities, stream);
  if (a.K <= 8) return start<A, 8>(a, parts, modalities, stream);
  if (a.K <= 16) return start<A, 16>(a, parts, modalities, stream);
  start<A, 32>(a, parts, modalities, stream);
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
    load_residuals<kTile>(g.factor, common, g.residual, g.K, first, rows, tile);
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
    Arguments a{t.N,
                t.K,
                logits ? 1 : 0,
                t.logits_factor,
                t.logits_residual,
                t.grad_logits,
                t.logits_dtype,
                kRows,
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
