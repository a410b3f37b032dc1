// Eq. 1 for up to 8 classes (class_means.cu): the sums of all classes lie in registers.
//
// A block takes a tile of columns and a chunk of rows, a warp 32 rows of it at a time: it adds them
// up in the arithmetic type, and what comes of them in double. The chunks of a tile are added in a
// fixed order by the last of its blocks.
#pragma once

#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int64_t kFewMeans = 8;  // classes of this kernel at most
constexpr int kMostModalities = 8;

struct Part {
  int64_t D, tiles;
  Matrix features;
  void* means;
  double* sums;        // (chunks, K, D); of one chunk: unused
  unsigned* counters;  // (tiles,)
  bool vectors;        // of the few-class kernel's columns, in every row
};

struct Arguments {
  int64_t N, K, chunk_rows;
  int chunks;
  Labels labels;
  int64_t* counts;
  int64_t* chunk_counts;  // (chunks, K)
  Part parts[kMostModalities];
};

constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;

constexpr int kFewBlocks = 2;  // of a multiprocessor

// Columns of a thread for up to `most` classes.
template <class A>
constexpr int few_columns(int64_t most) {
  return (most > 4 ? 2 : 4) * 4 / static_cast<int>(sizeof(A));
}

// Column v of a lane within its tile.
template <int V>
__device__ __forceinline__ int column_of(bool vectors, int v, int lane) {
  return vectors ? lane * V + v : v * 32 + lane;
}

// Adds the rows of a warp's 32 labels, `mine` being that of its lane, to the sums of their classes.
// Everything is loaded, in the place of rows or columns that are not there others: so no load waits
// for a label.
template <class T, int V, int most, class A>
__device__ __forceinline__ void add_rows_of(const Part& part, int64_t first, int64_t N,
                                            int64_t column, int mine, A (&sums)[most][V]) {
  constexpr int ahead = V * static_cast<int>(sizeof(T)) >= 8 ? 8 : 16;
  const int last = static_cast<int>(N - first < 32 ? N - first : 32) - 1;
  const T* data = static_cast<const T*>(part.features.data) + first * part.features.row_stride +
                  (column < part.D ? column : 0);
#pragma unroll 1
  for (int begin = 0; begin <= last; begin += ahead) {
    Packed<T, V> raw[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      raw[u] = load_packed<V>(data);
      data += begin + u < last ? part.features.row_stride : 0;
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int k = __shfl_sync(kAllLanes, mine, begin + u);
      A z[V];
      unpack<T, V>(raw[u], z);
#pragma unroll
      for (int c = 0; c < most; ++c) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[c][v] += k == c ? z[v] : A(0);
      }
    }
  }
}

// The same at any strides, columns 32 apart.
template <class T, int V, int most, class A>
__device__ __forceinline__ void add_elements_of(const Part& part, int64_t first, int64_t tile,
                                                int mine, A (&sums)[most][V]) {
  constexpr int ahead = 4;
  const Matrix& f = part.features;
#pragma unroll 1
  for (int begin = 0; begin < 32; begin += ahead) {
    A z[ahead][V];
    int k[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      k[u] = __shfl_sync(kAllLanes, mine, begin + u);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int64_t column = tile + v * 32 + lane_id();
        z[u][v] = A(0);
        if (k[u] >= 0 && column < part.D) {
          z[u][v] = static_cast<A>(to_arithmetic(static_cast<const T*>(
              f.data)[(first + begin + u) * f.row_stride + column * f.col_stride]));
        }
      }
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
#pragma unroll
      for (int c = 0; c < most; ++c) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[c][v] += k[u] == c ? z[u][v] : A(0);
      }
    }
  }
}

// The sums of a warp's rows of one tile, each lane's 32 apart in shared memory, and how many of
// each class it has seen: lane k's is of class k.
template <class T, int V, int most, class A>
__device__ __forceinline__ int add_chunk(const Arguments& a, const Part& part, int64_t tile,
                                         double (&totals)[most * 32 * V]) {
  const int lane = lane_id();
  const int64_t begin = blockIdx.y * a.chunk_rows;
  const int64_t end = begin + a.chunk_rows < a.N ? begin + a.chunk_rows : a.N;
  const auto label = [&](int64_t i) { return i < end ? class_of(a.labels, i, a.K) : -1; };
#pragma unroll
  for (int at = 0; at < most * V; ++at) totals[at * 32 + lane] = 0.0;
  int count = 0;
  int64_t first = begin + warp_id() * 32;
  int next = label(first + lane);
  for (; first < end; first += kFewThreads) {
    const int mine = next;
    next = label(first + kFewThreads + lane);
#pragma unroll
    for (int c = 0; c < most; ++c) {
      const int of_class = __popc(__ballot_sync(kAllLanes, mine == c));
      count += lane == c ? of_class : 0;
    }
    A sums[most][V];
#pragma unroll
    for (int c = 0; c < most; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[c][v] = A(0);
    }
    if (part.vectors) {
      add_rows_of<T, V>(part, first, a.N, tile + lane * V, mine, sums);
    } else {
      add_elements_of<T, V>(part, first, tile, mine, sums);
    }
#pragma unroll
    for (int c = 0; c < most; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        totals[(c * V + v) * 32 + lane] += static_cast<double>(sums[c][v]);
      }
    }
  }
  return count;
}

// Means from the sums of all chunks, a column of a class a thread; the counts with the first tile.
template <class A, int V>
__device__ __forceinline__ void finish_tile(const Arguments& a, const Part& part, int64_t tile,
                                            bool with_counts) {
  __shared__ double rows[kFewMeans];
  const int t = static_cast<int>(threadIdx.x), K = static_cast<int>(a.K);
  __syncthreads();
  for (int k = warp_id(); k < K; k += kFewWarps) {
    double count = 0.0;
    for (int c = lane_id(); c < a.chunks; c += 32) {
      count += static_cast<double>(a.chunk_counts[static_cast<int64_t>(c) * K + k]);
    }
    count = warp_sum(count);
    if (lane_id() == 0) rows[k] = count;
  }
  __syncthreads();
  if (with_counts && t < K) a.counts[t] = static_cast<int64_t>(rows[t]);
  for (int at = t; at < K * 32 * V; at += kFewThreads) {
    const int k = at / (32 * V);
    const int64_t column = tile + at % (32 * V);
    if (column >= part.D) continue;
    const double* from = part.sums + k * part.D + column;
    double sum = 0.0;
#pragma unroll 8
    for (int c = 0; c < a.chunks; ++c) sum += from[c * K * part.D];
    static_cast<A*>(part.means)[k * part.D + column] =
        static_cast<A>(rows[k] > 0.0 ? sum / rows[k] : 0.0);
  }
}

template <class A, int most>
__global__ void __launch_bounds__(kFewThreads, kFewBlocks)
    few_means_kernel(const __grid_constant__ Arguments a) {
  constexpr int V = few_columns<A>(most);
  __shared__ double parts[kFewWarps][most * 32 * V];
  __shared__ int counts[kFewWarps][most];
  const Part& part = a.parts[blockIdx.z];
  if (blockIdx.x >= part.tiles) return;
  const int t = static_cast<int>(threadIdx.x), K = static_cast<int>(a.K);
  const bool with_counts = blockIdx.x == 0 && blockIdx.z == 0;
  const int64_t tiles = (part.D + 32 * V - 1) / (32 * V);
  // At least one round, for the counts.
  for (int64_t n = blockIdx.x; n == blockIdx.x || n < tiles; n += part.tiles) {
    const int64_t tile = n * 32 * V;
    __syncthreads();  // the sums of the tile before have been read
    auto& totals = parts[warp_id()];
    int count;
    if constexpr (sizeof(A) == 8) {
      count = add_chunk<double, V, most, A>(a, part, tile, totals);
    } else if (part.features.dtype == Dtype::float32) {
      count = add_chunk<float, V, most, A>(a, part, tile, totals);
    } else if (part.features.dtype == Dtype::bfloat16) {
      count = add_chunk<bfloat16, V, most, A>(a, part, tile, totals);
    } else {
      count = add_chunk<float16, V, most, A>(a, part, tile, totals);
    }
    if (lane_id() < most) counts[warp_id()][lane_id()] = count;
    __syncthreads();
    for (int at = t; at < K * 32 * V; at += kFewThreads) {
      const int k = at / (32 * V), v = at / 32 % V;
      const int64_t column = tile + column_of<V>(part.vectors, v, at % 32);
      if (column >= part.D) continue;
      double sum = 0.0;
#pragma unroll
      for (int w = 0; w < kFewWarps; ++w) sum += parts[w][at];
      part.sums[(blockIdx.y * a.K + k) * part.D + column] = sum;
    }
    if (t < K) {
      int64_t rows = 0;
      for (int w = 0; w < kFewWarps; ++w) rows += counts[w][t];
      a.chunk_counts[blockIdx.y * a.K + t] = rows;
    }
  }
  if (!is_last_block(part.counters + blockIdx.x, gridDim.y)) return;
  for (int64_t n = blockIdx.x; n == blockIdx.x || n < tiles; n += part.tiles) {
    finish_tile<A, V>(a, part, n * 32 * V, with_counts && n == 0);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
