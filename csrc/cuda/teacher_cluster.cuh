// A small batch of Eqs. 1-6 on one cluster of blocks (teacher_cluster.cu): what each block holds,
// and how it comes there.
//
// A block owns some columns of every modality, of all rows, so that the class means of its columns
// are its own affair. The blocks meet twice: the products of all rows with its part of the
// prototypes go to the block that owns the row, and what the row's softmax makes of them comes back
// to all. Whatever crosses blocks is written to where it is read.
#pragma once

#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

inline constexpr int kMostThreads = 512;

// Divides by what a launch knows, without a division: exactly where the product of both is below
// 2^32, which shared memory sees to.
struct Divisor {
  unsigned by, inverse;  // 2^32 / by, rounded up
  Divisor() = default;
  explicit Divisor(int count)
      : by(count > 0 ? static_cast<unsigned>(count) : 1u),
        inverse(by > 1 ? static_cast<unsigned>(((uint64_t{1} << 32) + by - 1) / by) : 0u) {}
};

struct Split {
  int quotient, rest;
};

__device__ __forceinline__ Split split(int n, const Divisor& d) {
  const auto product = static_cast<uint64_t>(static_cast<unsigned>(n)) * d.inverse;
  const int quotient = d.by == 1 ? n : static_cast<int>(product >> 32);
  return {quotient, n - quotient * static_cast<int>(d.by)};
}

// A modality of which a block owns W columns, which begin at `first` of its rows in shared memory.
struct Part {
  int D, W, first;
  bool vectors;       // rows can be read 16 bytes at a time
  bool grad_vectors;  // the gradient's be written so
  Matrix features, prototypes;
  void* grad;
};

// Places in a block's shared memory, in bytes.
struct Places {
  int rows;       // A (N, stride): own columns of the features
  int sums;       // double (chunks, K, columns): of the classes
  int mean;       // A (columns)
  int centred;    // A (centred_rows(K), columns)
  int logits;     // A (R, K): of own rows, then their gradient
  int inverse;    // double (K): 1 / rows of the class
  int counted;    // int (warps, K): rows of each class that a warp has seen
  int batch;      // Batch
  int classes;    // int8 (N, in whole fours)
  int products;   // A (ranks, R, M, C): of own rows, from each block
  int norms;      // A (ranks, M, K)
  int residuals;  // A (M, N, C): from the rows' owners
  int rates;      // A (M, N): probabilities of the true classes
  int losses;     // A (M, N); of the first block alone
  int ce;         // A (N); of the first block alone
  int totals;     // double (2 M + 1): rates, losses, cross-entropy
};

struct Arguments {
  int N, K, M;
  int C;              // products a row: those of two classes differ by one alone
  int R;              // rows of a block
  int width;          // lanes of a row's classes, a power of 2
  int columns;        // of a block, of all modalities
  int stride;         // of its rows: an odd number of vectors
  int chunk, chunks;  // of rows whose class sums are kept apart
  int wide, apart;    // threads side by side along a row's vectors, rows of them
  Divisor by_wide, by_columns, by_N, by_K, by_M, by_MK, by_R;
  double scale, proto_weight;
  bool batch_means;  // Eq. 1, else prototypes are given
  Matrix logits;
  void* grad_logits;
  Labels labels;
  ClassCounts counts;
  Results results;
  Places at;
  Part parts[kMostSmallModalities];
};

template <class T>
__device__ __forceinline__ T* shared(int place) {
  return reinterpret_cast<T*>(dynamic_shared() + place);
}

// A vector's column of a block's rows, and what it is a column of.
struct Column {
  __device__ __forceinline__ Column(const Arguments& a, int own) : m(0) {
    while (m + 1 < a.M && a.parts[m + 1].first <= own) ++m;
    index = static_cast<int>(cluster_rank()) * a.parts[m].W + own - a.parts[m].first;
  }
  int m, index;  // modality, column of its matrix
};

// f(own column, first row) for each vector of columns that a thread has; its rows are `apart`.
template <int V, class F>
__device__ __forceinline__ void for_columns(const Arguments& a, const F& f) {
  const Split place = split(static_cast<int>(threadIdx.x), a.by_wide);
  if (place.quotient >= a.apart) return;
#pragma unroll 1
  for (int own = place.rest * V; own < a.columns; own += a.wide * V) f(own, place.quotient);
}

// Asks for the features; they are there once await_copies and a barrier have passed.
template <class A>
__device__ __forceinline__ void ask_for_rows(const Arguments& a) {
  constexpr int V = kVector<A>;
  for_columns<V>(a, [&](int own, int row) {
    const Column column(a, own);
    const Part& part = a.parts[column.m];
    const Matrix& z = part.features;
    const int64_t step = a.apart * z.row_stride;
    const A* from =
        static_cast<const A*>(z.data) + row * z.row_stride + column.index * z.col_stride;
    A* to = shared<A>(a.at.rows) + row * a.stride + own;
    if (part.vectors && column.index + V <= part.D) {
#pragma unroll 4
      for (int i = row; i < a.N; i += a.apart, from += step, to += a.apart * a.stride) {
        copy_async(to, from);
      }
      return;
    }
#pragma unroll 1
    for (int i = row; i < a.N; i += a.apart, from += step, to += a.apart * a.stride) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        to[v] = column.index + v < part.D ? from[v * z.col_stride] : A(0);
      }
    }
  });
}

// The classes of all rows, and how many rows of each a warp has seen.
__device__ __forceinline__ void read_labels(const Arguments& a) {
  auto* classes = shared<int8_t>(a.at.classes);
  const int lane = lane_id(), rows = (a.N + 3) / 4 * 4;
  int mine = 0;
  for (int first = warp_id() * 32; first < a.N; first += static_cast<int>(blockDim.x)) {
    const int i = first + lane, y = i < a.N ? class_of(a.labels, i, a.K) : -1;
    if (i < rows) classes[i] = static_cast<int8_t>(y);
#pragma unroll 1
    for (int k = 0; k < a.K; ++k) {
      const int count = __popc(__ballot_sync(kAllLanes, y == k));
      mine += lane == k ? count : 0;
    }
  }
  if (lane < a.K) shared<int>(a.at.counted)[warp_id() * a.K + lane] = mine;
}

// What all threads know of the batch.
template <class A>
struct Batch {
  unsigned active;          // classes that take part, a bit each
  int rows, active_rows;    // with a class, with one that takes part
  double share;             // 1 / number of the classes that take part
  A logits_factor, factor;  // of the logits' gradient, of the features' without lambda
};

// Own rows' logits, and given prototypes where class sums would be; returns the given count of the
// lane's class, 1 without. What a thread reads first is asked for before any of it is waited for.
template <class A>
__device__ __forceinline__ int64_t read_operands(const Arguments& a) {
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int first_row = static_cast<int>(cluster_rank()) * a.R;
  const int logits = (a.N - first_row < a.R ? a.N - first_row : a.R) * a.K;
  const int elements = a.batch_means ? 0 : a.K * a.columns;
  const auto logit = [&](int at) {
    const auto [r, k] = split(at, a.by_K);
    return load_element<A>(a.logits.data,
                           (first_row + r) * a.logits.row_stride + k * a.logits.col_stride,
                           a.logits.dtype);
  };
  const auto prototype = [&](int at) {
    const auto [k, own] = split(at, a.by_columns);
    const Column column(a, own);
    const Part& part = a.parts[column.m];
    const Matrix& c = part.prototypes;
    if (column.index >= part.D) return A(0);
    return load_element<A>(c.data, k * c.row_stride + column.index * c.col_stride, c.dtype);
  };
  const bool counted = !a.batch_means && a.counts.data != nullptr && lane_id() < a.K;
  const int64_t count = counted ? a.counts.data[lane_id() * a.counts.stride] : 1;
  const A first_logit = t < logits ? logit(t) : A(0);
  const A first_element = t < elements ? prototype(t) : A(0);
  read_labels(a);
  if (t < logits) shared<A>(a.at.logits)[t] = first_logit;
  if (t < elements) shared<double>(a.at.sums)[t] = static_cast<double>(first_element);
#pragma unroll 1
  for (int at = t + threads; at < logits; at += threads) shared<A>(a.at.logits)[at] = logit(at);
#pragma unroll 1
  for (int at = t + threads; at < elements; at += threads) {
    shared<double>(a.at.sums)[at] = static_cast<double>(prototype(at));
  }
  return count;
}

__device__ __forceinline__ int at_least_one(int count) { return count > 1 ? count : 1; }

// By one warp, after a barrier, while the features are on their way; `given` as read_operands
// returns it. Also leaves what class sums are multiplied with.
template <class A>
__device__ __forceinline__ void count_batch(const Arguments& a, int64_t given) {
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / 32;
  const int seen = (a.N + 31) / 32 < warps ? (a.N + 31) / 32 : warps;
  int count = 0;
#pragma unroll 4
  for (int w = 0; w < seen; ++w) {
    count += lane < a.K ? shared<int>(a.at.counted)[w * a.K + lane] : 0;
  }
  const bool active = lane < a.K && given > 0 && (!a.batch_means || count > 0);
  if (lane < a.K) {
    shared<double>(a.at.inverse)[lane] = a.batch_means ? 1.0 / at_least_one(count) : 1.0;
  }
  Batch<A> batch;
  batch.active = __ballot_sync(kAllLanes, active);
  batch.rows = warp_sum(count);
  batch.active_rows = warp_sum(active ? count : 0);
  batch.share = 1.0 / at_least_one(__popc(batch.active));
  batch.logits_factor = static_cast<A>((1.0 - a.proto_weight) / at_least_one(batch.rows));
  batch.factor = static_cast<A>(2.0 * a.scale * a.proto_weight / at_least_one(batch.active_rows));
  if (lane == 0) *shared<Batch<A>>(a.at.batch) = batch;
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
