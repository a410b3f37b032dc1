// Eq. 1: class means of all modalities in one launch. Of more classes than few_class_means.cuh is
// for, a thread owns a column and adds up its rows, class by class, in double; row chunks are added
// in a fixed order by the last block of a column.
#include "few_class_means.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kColumns = 128;  // of a block, one a thread
constexpr int kGroup = 32;     // classes whose sums a block holds
constexpr int kAhead = 8;      // rows loaded before the first is used
constexpr int64_t kMostTiles = 1024;

struct Plan {
  int64_t chunk_rows;
  int chunks;
};

int most_of(int64_t K) { return K > 4 ? 8 : (K > 2 ? 4 : 2); }

int tile_columns(int64_t K, bool wide) {
  if (K > kFewMeans) return kColumns;
  return 32 * (wide ? few_columns<double>(most_of(K)) : few_columns<float>(most_of(K)));
}

// Many classes: every block looks at all labels and takes the rows of its own 32 classes.
Plan plan_of(const ClassMeans& c, const Averaged* averaged, int64_t M) {
  if (c.K > kGroup) return {c.N, 1};
  const int columns = tile_columns(c.K, c.wide);
  int64_t tiles = 0;
  for (int64_t m = 0; m < M; ++m) tiles += (averaged[m].D + columns - 1) / columns;
  tiles = tiles > 0 ? tiles : 1;
  const int64_t multiprocessors = device_limits().multiprocessors;
  int64_t rows;
  if (c.K <= kFewMeans) {
    // All blocks at once on the device, whole warps of rows each.
    const int64_t wanted = kFewBlocks * multiprocessors / tiles;
    rows = (c.N + (wanted > 1 ? wanted : 1) - 1) / (wanted > 1 ? wanted : 1);
    rows = rows < 64 ? 64 : (rows + 31) / 32 * 32;
  } else {
    const int64_t wanted = 6 * multiprocessors / tiles + 1;
    rows = (c.N + wanted - 1) / wanted;
    rows = rows < 64 ? 64 : (rows + kAhead - 1) / kAhead * kAhead;
  }
  const int64_t chunks = (c.N + rows - 1) / rows;
  return {rows, static_cast<int>(chunks < 1 ? 1 : chunks)};
}

int64_t tiles_of(int64_t D, int columns) {
  const int64_t tiles = (D + columns - 1) / columns;
  return tiles < 1 ? 1 : (tiles > kMostTiles ? kMostTiles : tiles);
}

// Whether every row can be read by the vectors of the few-class kernel.
bool has_column_vectors(const ClassMeans& c, const Averaged& averaged) {
  if (c.K > kFewMeans || averaged.D == 0) return false;
  const Matrix& f = averaged.features;
  const int64_t columns = tile_columns(c.K, c.wide) / 32, bytes = columns * element_size(f.dtype);
  return f.col_stride == 1 && averaged.D % columns == 0 && is_aligned(f.data, bytes) &&
         f.row_stride % columns == 0;
}

// sums[k][thread] over rows [begin, end) of classes [first, first + kGroup) of one column.
template <class A>
__device__ void add_rows(const Arguments& a, const Part& part, int64_t begin, int64_t end,
                         int64_t first, int64_t column, double (*sums)[kColumns], int* counts) {
  __shared__ int classes[kColumns];
  const int t = static_cast<int>(threadIdx.x);
  const bool has_column = column < part.D;
  for (int64_t start = begin; start < end; start += kColumns) {
    const int rows = static_cast<int>(end - start < kColumns ? end - start : kColumns);
    __syncthreads();  // the classes before these have been used
    int mine = -1;
    if (t < rows) mine = class_of(a.labels, start + t, a.K);
    classes[t] = mine >= first && mine < first + kGroup ? static_cast<int>(mine - first) : -1;
    __syncthreads();
    if (t < kGroup) {
      for (int r = 0; r < rows; ++r) counts[t] += classes[r] == t ? 1 : 0;
    }
    for (int r = 0; has_column && r < rows; r += kAhead) {
      A z[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const bool wanted = r + u < rows && classes[r + u < rows ? r + u : 0] >= 0;
        z[u] = wanted ? load_element<A>(part.features.data,
                                        (start + r + u) * part.features.row_stride +
                                            column * part.features.col_stride,
                                        part.features.dtype)
                      : A(0);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (r + u < rows && classes[r + u] >= 0) {
          sums[classes[r + u]][t] += static_cast<double>(z[u]);
        }
      }
    }
  }
  __syncthreads();
}

// What all chunks hold of a tile of columns becomes means; the counts with the first tile.
template <class A>
__device__ void finish(const Arguments& a, const Part& part, int64_t tile, bool with_counts) {
  __shared__ double totals[kGroup];
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (t < a.K) {
    int64_t total = 0;
    for (int c = 0; c < a.chunks; ++c) total += a.chunk_counts[c * a.K + t];
    totals[t] = static_cast<double>(total);
    if (with_counts) a.counts[t] = total;
  }
  __syncthreads();
  const int64_t column = tile * kColumns + t;
  if (column >= part.D) return;
  for (int64_t k = 0; k < a.K; ++k) {
    double sum = 0.0;
    for (int c = 0; c < a.chunks; ++c) sum += part.sums[(c * a.K + k) * part.D + column];
    static_cast<A*>(part.means)[k * part.D + column] =
        static_cast<A>(totals[k] > 0.0 ? sum / totals[k] : 0.0);
  }
}

template <class A>
__global__ void __launch_bounds__(kColumns) means_kernel(const __grid_constant__ Arguments a) {
  __shared__ double sums[kGroup][kColumns];
  __shared__ int counts[kGroup];
  const Part& part = a.parts[blockIdx.z];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t tiles = (part.D + kColumns - 1) / kColumns;
  const bool few = a.K <= kGroup;
  const bool with_counts = blockIdx.x == 0 && blockIdx.z == 0;
  if (blockIdx.x >= part.tiles) return;
  // Few classes: blockIdx.y is the chunk of rows. Many: the group of classes.
  const int64_t begin = few ? blockIdx.y * a.chunk_rows : 0;
  const int64_t end = begin + a.chunk_rows < a.N ? begin + a.chunk_rows : a.N;
  const int64_t groups = (a.K + kGroup - 1) / kGroup;
  const int64_t last_group = few ? 1 : groups;
  for (int64_t group = few ? 0 : blockIdx.y; group < last_group; group += gridDim.y) {
    const int64_t first = group * kGroup;
    const int64_t classes = a.K - first < kGroup ? a.K - first : kGroup;
    // At least one round, for the counts.
    for (int64_t tile = blockIdx.x; tile == blockIdx.x || tile < tiles; tile += part.tiles) {
      const int64_t column = tile * kColumns + t;
      __syncthreads();
      for (int k = 0; k < kGroup; ++k) sums[k][t] = 0.0;
      if (t < kGroup) counts[t] = 0;
      __syncthreads();
      add_rows<A>(a, part, begin, end, first, column, sums, counts);
      if (few && t < classes) a.chunk_counts[blockIdx.y * a.K + t] = counts[t];
      if (!few && with_counts && tile == 0 && t < classes) a.counts[first + t] = counts[t];
      if (column >= part.D) continue;
      for (int64_t k = 0; k < classes; ++k) {
        const double sum = sums[k][t], count = static_cast<double>(counts[k]);
        if (few) {
          part.sums[(blockIdx.y * a.K + k) * part.D + column] = sum;
        } else {
          static_cast<A*>(part.means)[(first + k) * part.D + column] =
              static_cast<A>(count > 0.0 ? sum / count : 0.0);
        }
      }
    }
    if (few) break;
  }
  if (!few || !is_last_block(part.counters + blockIdx.x, gridDim.y)) return;
  for (int64_t tile = blockIdx.x; tile == blockIdx.x || tile < tiles; tile += part.tiles) {
    finish<A>(a, part, tile, with_counts && tile == 0);
  }
}

// Every tile's blocks write the same counts of their chunk; sums follow, 8-byte aligned.
size_t bytes_of_parts(const ClassMeans& c, const Averaged* averaged, int64_t M, Arguments* a,
                      char* workspace) {
  const Plan plan = plan_of(c, averaged, M);
  const bool few = c.K <= kGroup;
  const int columns = tile_columns(c.K, c.wide);
  size_t at = few ? static_cast<size_t>(plan.chunks * c.K) * 8 : 0;
  for (int64_t m = 0; m < M; ++m) {
    if (a != nullptr) {
      a->parts[m] = {averaged[m].D,
                     tiles_of(averaged[m].D, columns),
                     averaged[m].features,
                     averaged[m].means,
                     reinterpret_cast<double*>(workspace + at),
                     nullptr,
                     has_column_vectors(c, averaged[m])};
    }
    if (few) at += static_cast<size_t>(plan.chunks * c.K * averaged[m].D) * 8;
  }
  const size_t counters = at;
  for (int64_t m = 0; m < M; ++m) at += static_cast<size_t>(tiles_of(averaged[m].D, columns)) * 4;
  if (a != nullptr) {
    a->N = c.N;
    a->K = c.K;
    a->chunk_rows = plan.chunk_rows;
    a->chunks = plan.chunks;
    a->labels = c.labels;
    a->counts = c.counts;
    a->chunk_counts = reinterpret_cast<int64_t*>(workspace);
    a->parts[0].counters = reinterpret_cast<unsigned*>(workspace + counters);
  }
  return at;
}

template <class A>
void start(const Arguments& a, dim3 grid, Stream stream) {
  if (a.K <= 2) return launch<few_means_kernel<A, 2>>(grid, kFewThreads, 0, stream, a);
  if (a.K <= 4) return launch<few_means_kernel<A, 4>>(grid, kFewThreads, 0, stream, a);
  if (a.K <= kFewMeans) return launch<few_means_kernel<A, 8>>(grid, kFewThreads, 0, stream, a);
  launch<means_kernel<A>>(grid, kColumns, 0, stream, a);
}

void launch_group(const ClassMeans& c, const Averaged* averaged, int64_t M, void* workspace,
                  Stream stream) {
  Arguments a{};
  bytes_of_parts(c, averaged, M, &a, static_cast<char*>(workspace));
  int64_t tiles = 0, widest = 1;
  for (int64_t m = 0; m < M; ++m) {
    tiles += a.parts[m].tiles;
    widest = a.parts[m].tiles > widest ? a.parts[m].tiles : widest;
  }
  unsigned* counters = take_counters(a.parts[0].counters, static_cast<unsigned>(tiles), stream);
  for (int64_t m = 0; m < M; ++m) {
    a.parts[m].counters = counters;
    counters += a.parts[m].tiles;
  }
  const int64_t groups = (c.K + kGroup - 1) / kGroup;
  const int64_t y = c.K <= kGroup ? a.chunks : (groups < 65535 ? groups : 65535);
  const dim3 grid(static_cast<unsigned>(widest), static_cast<unsigned>(y),
                  static_cast<unsigned>(M));
  c.wide ? start<double>(a, grid, stream) : start<float>(a, grid, stream);
}

template <class A>
__global__ void __launch_bounds__(256)
    backward_kernel(const __grid_constant__ ClassMeansBackward b) {
  const int64_t count = b.N * b.D;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count;
       at += step) {
    const int64_t i = at / b.D, d = at - i * b.D;
    const int k = class_of(b.labels, i, b.K);
    A value = A(0);
    if (k >= 0) {
      value = load_element<A>(b.grad_means.data,
                              k * b.grad_means.row_stride + d * b.grad_means.col_stride,
                              b.grad_means.dtype) /
              static_cast<A>(b.counts[k]);
    }
    store_element(b.grad, at, b.grad_dtype, value);
  }
}

}  // namespace

size_t class_means_bytes(const ClassMeans& c, const Averaged* averaged, int64_t M) {
  size_t most = 0;
  for (int64_t first = 0; first < M; first += kMostModalities) {
    const int64_t count = M - first < kMostModalities ? M - first : kMostModalities;
    const size_t bytes = bytes_of_parts(c, averaged + first, count, nullptr, nullptr);
    most = bytes > most ? bytes : most;
  }
  return most;
}

void class_means(const ClassMeans& c, const Averaged* averaged, int64_t M, void* workspace,
                 Stream stream) {
  for (int64_t first = 0; first < M; first += kMostModalities) {
    const int64_t count = M - first < kMostModalities ? M - first : kMostModalities;
    launch_group(c, averaged + first, count, workspace, stream);
  }
}

void class_means_backward(const ClassMeansBackward& b, Stream stream) {
  if (b.N == 0 || b.D == 0) return;
  const unsigned blocks = blocks_for(b.N * b.D, 1024, 16 * device_limits().multiprocessors);
  if (b.wide) {
    launch<backward_kernel<double>>(blocks, 256, 0, stream, b);
  } else {
    launch<backward_kernel<float>>(blocks, 256, 0, stream, b);
  }
}

}  // namespace cuda
}  // namespace pycdgkd
