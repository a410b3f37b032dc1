// Eq. 1: class means of all modalities in one launch. A thread owns a column and adds up its rows,
// class by class, in double; row chunks are added in a fixed order by the last block of a column.
#include "rows.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kColumns = 128;  // of a block, one a thread
constexpr int kGroup = 32;     // classes whose sums a block holds
constexpr int kAhead = 8;      // rows loaded before the first is used
constexpr int kMostModalities = 8;
constexpr int64_t kMostTiles = 1024;

struct Part {
  int64_t D, tiles;
  Matrix features;
  void* means;
  double* sums;        // (chunks, K, D); of one chunk: unused
  unsigned* counters;  // (tiles,)
};

struct Arguments {
  int64_t N, K, chunk_rows;
  int chunks;
  Labels labels;
  int64_t* counts;
  int64_t* chunk_counts;  // (chunks, K)
  Part parts[kMostModalities];
};

struct Plan {
  int64_t chunk_rows;
  int chunks;
};

// Many classes: every block looks at all labels and takes the rows of its own 32 classes.
Plan plan_of(int64_t N, int64_t K, const Averaged* averaged, int64_t M) {
  if (K > kGroup) return {N, 1};
  int64_t tiles = 0;
  for (int64_t m = 0; m < M; ++m) tiles += (averaged[m].D + kColumns - 1) / kColumns;
  const int64_t wanted = 6 * device_limits().multiprocessors / (tiles > 0 ? tiles : 1) + 1;
  int64_t rows = (N + wanted - 1) / wanted;
  rows = rows < 64 ? 64 : (rows + kAhead - 1) / kAhead * kAhead;
  const int64_t chunks = (N + rows - 1) / rows;
  return {rows, static_cast<int>(chunks < 1 ? 1 : chunks)};
}

int64_t tiles_of(int64_t D) {
  const int64_t tiles = (D + kColumns - 1) / kColumns;
  return tiles < 1 ? 1 : (tiles > kMostTiles ? kMostTiles : tiles);
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
  const Plan plan = plan_of(c.N, c.K, averaged, M);
  const bool few = c.K <= kGroup;
  size_t at = few ? static_cast<size_t>(plan.chunks * c.K) * 8 : 0;
  for (int64_t m = 0; m < M; ++m) {
    if (a != nullptr) {
      a->parts[m] = {averaged[m].D,
                     tiles_of(averaged[m].D),
                     averaged[m].features,
                     averaged[m].means,
                     reinterpret_cast<double*>(workspace + at),
                     nullptr};
    }
    if (few) at += static_cast<size_t>(plan.chunks * c.K * averaged[m].D) * 8;
  }
  const size_t counters = at;
  for (int64_t m = 0; m < M; ++m) at += static_cast<size_t>(tiles_of(averaged[m].D)) * 4;
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
  if (c.wide) {
    launch<means_kernel<double>>(grid, kColumns, 0, stream, a);
  } else {
    launch<means_kernel<float>>(grid, kColumns, 0, stream, a);
  }
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
