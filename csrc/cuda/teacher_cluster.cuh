// How one cluster of blocks works on a small batch (teacher_cluster.cu): what each block holds, and
// the steps between the cluster's barriers.
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

// Own rows' logits, and given prototypes where class sums would be. What a thread reads first is
// asked for before any label is waited for.
template <class A>
__device__ __forceinline__ void read_operands(const Arguments& a) {
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
    if (column.index >= part.D || !is_active(a.counts, k)) return 0.0;
    return load_element<double>(c.data, k * c.row_stride + column.index * c.col_stride, c.dtype);
  };
  const A first_logit = t < logits ? logit(t) : A(0);
  const double first_element = t < elements ? prototype(t) : 0.0;
  read_labels(a);
  if (t < logits) shared<A>(a.at.logits)[t] = first_logit;
  if (t < elements) shared<double>(a.at.sums)[t] = first_element;
#pragma unroll 1
  for (int at = t + threads; at < logits; at += threads) shared<A>(a.at.logits)[at] = logit(at);
#pragma unroll 1
  for (int at = t + threads; at < elements; at += threads) {
    shared<double>(a.at.sums)[at] = prototype(at);
  }
}

// What all threads know of the batch.
template <class A>
struct Batch {
  unsigned active;          // classes that take part, a bit each
  int rows, active_rows;    // with a class, with one that takes part
  double share;             // 1 / number of the classes that take part
  A logits_factor, factor;  // of the logits' gradient, of the features' without lambda
};

__device__ __forceinline__ int at_least_one(int count) { return count > 1 ? count : 1; }

// After a barrier, while the features are on their way. The first warp leaves what class sums are
// multiplied with.
template <class A>
__device__ __forceinline__ Batch<A> count_batch(const Arguments& a) {
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / 32;
  const bool means = a.batch_means;
  const bool given = lane < a.K && (means || is_active(a.counts, lane));
  const int seen = (a.N + 31) / 32 < warps ? (a.N + 31) / 32 : warps;
  int count = 0;
#pragma unroll 1
  for (int w = 0; lane < a.K && w < seen; ++w) {
    count += shared<int>(a.at.counted)[w * a.K + lane];
  }
  const bool active = given && (!means || count > 0);
  if (warp_id() == 0 && lane < a.K) {
    shared<double>(a.at.inverse)[lane] = means && count > 0 ? 1.0 / count : 1.0;
  }
  Batch<A> batch;
  batch.active = __ballot_sync(kAllLanes, active);
  batch.rows = warp_sum(count);
  batch.active_rows = warp_sum(active ? count : 0);
  batch.share = 1.0 / at_least_one(__popc(batch.active));
  batch.logits_factor = static_cast<A>((1.0 - a.proto_weight) / at_least_one(batch.rows));
  batch.factor = static_cast<A>(2.0 * a.scale * a.proto_weight / at_least_one(batch.active_rows));
  return batch;
}

// ---- Eq. 1 --------------------------------------------------------------------------------------

// Class sums of own columns, C classes at a time, of each chunk of rows apart: in the arithmetic
// type of 16 rows, of more in double.
template <int C, class A>
__device__ __forceinline__ void add_classes(const Arguments& a) {
  const auto* classes = shared<int8_t>(a.at.classes);
  const int work = a.columns * a.chunks, rows = (a.N + 3) / 4 * 4;
  for (int at = static_cast<int>(threadIdx.x); at < work; at += static_cast<int>(blockDim.x)) {
    const auto [chunk, column] = split(at, a.by_columns);
    const int begin = chunk * a.chunk, end = begin + a.chunk < rows ? begin + a.chunk : rows;
    const A* z = shared<A>(a.at.rows) + column;
#pragma unroll 1
    for (int first = 0; first < a.K; first += C) {
      double totals[C];
#pragma unroll
      for (int c = 0; c < C; ++c) totals[c] = 0.0;
#pragma unroll 1
      for (int some = begin; some < end; some += 16) {
        A sums[C];
#pragma unroll
        for (int c = 0; c < C; ++c) sums[c] = A(0);
#pragma unroll(C > 2 ? 1 : 4)
        for (int u = 0; u < 16; u += 4) {
          const int i = some + u;
          if (i >= end) continue;
          int8_t k[4];
          memcpy(k, classes + i, 4);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const A x = z[(i + r) * a.stride];
#pragma unroll
            for (int c = 0; c < C; ++c) sums[c] += k[r] == first + c ? x : A(0);
          }
        }
#pragma unroll
        for (int c = 0; c < C; ++c) totals[c] += static_cast<double>(sums[c]);
      }
      double* to = shared<double>(a.at.sums) + (chunk * a.K + first) * a.columns + column;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (first + c < a.K) to[c * a.columns] = totals[c];
      }
    }
  }
}

// Prototypes of own columns less their mean (../kernels.h: CentrePrototypes); the means of the
// batch are not rounded before.
template <class A>
__device__ __forceinline__ void centre_columns(const Arguments& a, const Batch<A>& batch) {
  const int chunks = a.batch_means ? a.chunks : 1, size = a.K * a.columns;
  const auto is_on = [&](int k) { return (batch.active >> k & 1u) != 0; };
#pragma unroll 1
  for (int column = static_cast<int>(threadIdx.x); column < a.columns;
       column += static_cast<int>(blockDim.x)) {
    double* sums = shared<double>(a.at.sums) + column;
    double total = 0.0;
#pragma unroll 2
    for (int k = 0; k < a.K; ++k) {
      double sum = 0.0;
#pragma unroll 4
      for (int chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * size + k * a.columns];
      sum *= shared<double>(a.at.inverse)[k];
      sums[k * a.columns] = sum;
      total += is_on(k) ? sum : 0.0;
    }
    const A mean = static_cast<A>(total * batch.share);
    shared<A>(a.at.mean)[column] = mean;
    A* rows = shared<A>(a.at.centred) + column;
#pragma unroll 2
    for (int k = 0; k < a.K; ++k) {
      const double shifted = sums[k * a.columns] - static_cast<double>(mean);
      rows[k * a.columns] = is_on(k) ? static_cast<A>(shifted) : A(0);
    }
    if (a.K == 2) rows[2 * a.columns] = rows[0] - rows[a.columns];
  }
}

// ---- Eqs. 2-3 -----------------------------------------------------------------------------------

// A row of up to `width` logits, of which each lane holds that of class lane % width, and its
// residual; all lanes know the rest.
template <class A>
struct LaneSoftmax {
  A residual = A(0), loss = A(0), true_prob = A(0);

  LaneSoftmax() = default;
  // The true class's residual is the complement of the others: p - 1 would cancel.
  __device__ __forceinline__ LaneSoftmax(A logit, int y, int width, int K) {
    const int k = lane_id() & (width - 1);
    A maximum = logit;
#pragma unroll 1
    for (int bits = width / 2; bits > 0; bits >>= 1) {
      const A other = __shfl_xor_sync(kAllLanes, maximum, bits);
      maximum = other > maximum ? other : maximum;
    }
    const A e = exp_nonpositive(logit - maximum);
    const A true_logit = __shfl_sync(kAllLanes, logit, y);
    const A true_exp = __shfl_sync(kAllLanes, e, y);
    const bool other = k < K && k != y;
    A others = other ? e : A(0);
#pragma unroll 1
    for (int bits = width / 2; bits > 0; bits >>= 1) {
      others += __shfl_xor_sync(kAllLanes, others, bits);
    }
    const A inverse = A(1) / (true_exp + others);
    residual = (other ? e : -others) * inverse;
    loss = cross_entropy(maximum, true_logit, true_exp, others);
    true_prob = true_exp * inverse;
  }
};

// Cross-entropy of own rows, a warp a row, the last warp first: the first have columns to centre.
// The gradient waits where the logits were: a barrier that passes on what was written would wait
// for memory.
template <class A>
__device__ __forceinline__ void cross_entropy_rows(const Arguments& a, const Batch<A>& batch) {
  const int warps = static_cast<int>(blockDim.x) / 32, k = lane_id() & (a.width - 1);
  const int first = static_cast<int>(cluster_rank()) * a.R;
#pragma unroll 1
  for (int r = warps - 1 - warp_id(); r < a.R && first + r < a.N; r += warps) {
    const int y = shared<int8_t>(a.at.classes)[first + r];
    A* own = shared<A>(a.at.logits) + r * a.K + k;
    LaneSoftmax<A> row;
    if (y >= 0) {
      row = LaneSoftmax<A>(k < a.K ? *own : -infinity<A>(), y, a.width, a.K);
    }
    __syncwarp();  // the logits have been read
    if (lane_id() < a.K) {
      *own = batch.logits_factor == A(0) ? A(0) : batch.logits_factor * row.residual;
    }
    if (lane_id() == 0) *in_block(shared<A>(a.at.ce) + first + r, 0) = row.loss;
  }
}

// (z_i - mean) . y_c over own columns, G products at a time, to the row's owner.
template <int G, class A>
__device__ __forceinline__ void give_products(const Arguments& a) {
  constexpr int V = kVector<A>;
  const int rank = static_cast<int>(cluster_rank()), work = a.N * a.M * ((a.C + G - 1) / G);
  for (int at = static_cast<int>(threadIdx.x); at < work; at += static_cast<int>(blockDim.x)) {
    const auto [rest, i] = split(at, a.by_N);
    const auto [group, m] = split(rest, a.by_M);
    const int first = group * G, count = a.C - first < G ? a.C - first : G;
    const Part& part = a.parts[m];
    const A* z = shared<A>(a.at.rows) + i * a.stride + part.first;
    const A* mean = shared<A>(a.at.mean) + part.first;
    const A* y = shared<A>(a.at.centred) + (a.K == 2 ? 2 : first) * a.columns + part.first;
    A sums[G];
#pragma unroll
    for (int g = 0; g < G; ++g) sums[g] = A(0);
#pragma unroll(G > 1 ? 1 : 4)
    for (int d = 0; d < part.W; d += V) {
      A x[V], shift[V];
      load_array<V>(z + d, x);
      load_array<V>(mean + d, shift);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] -= shift[v];
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (g >= count) continue;
        A w[V];
        load_array<V>(y + g * a.columns + d, w);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[g] += x[v] * w[v];
      }
    }
    const auto [owner, r] = split(i, a.by_R);
    A* to = in_block(shared<A>(a.at.products) + ((rank * a.R + r) * a.M + m) * a.C + first,
                     static_cast<unsigned>(owner));
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (g < count) to[g] = sums[g];
    }
  }
}

// |c_k - mean|^2 over own columns, to all blocks; the last threads first.
template <class A>
__device__ __forceinline__ void give_norms(const Arguments& a) {
  constexpr int V = kVector<A>;
  const int rank = static_cast<int>(cluster_rank()), threads = static_cast<int>(blockDim.x);
  const int each = a.M * a.K, work = each * static_cast<int>(cluster_size());
  for (int at = threads - 1 - static_cast<int>(threadIdx.x); at < work; at += threads) {
    const auto [to, mk] = split(at, a.by_MK);
    const auto [m, k] = split(mk, a.by_K);
    const Part& part = a.parts[m];
    const A* y = shared<A>(a.at.centred) + k * a.columns + part.first;
    A sum = A(0);
#pragma unroll 2
    for (int d = 0; d < part.W; d += V) {
      A x[V];
      load_array<V>(y + d, x);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += x[v] * x[v];
    }
    *in_block(shared<A>(a.at.norms) + rank * each + mk, static_cast<unsigned>(to)) = sum;
  }
}

// The logit of class lane % width from what all blocks gave: -scale |z - c_k|^2 but for a term that
// all classes share, 2 scale (z - mean).(c_k - mean) - scale |c_k - mean|^2. The lanes that share a
// class take the blocks' parts in turns. Of two classes only the difference matters.
template <class A>
__device__ __forceinline__ A lane_logit(const Arguments& a, int r, int m, unsigned active) {
  const int k = lane_id() & (a.width - 1), ranks = static_cast<int>(cluster_size());
  const bool has_class = k < a.K;
  A product = A(0), norm = A(0);
#pragma unroll 2
  for (int b = lane_id() / a.width; has_class && b < ranks; b += 32 / a.width) {
    product += shared<A>(a.at.products)[((b * a.R + r) * a.M + m) * a.C + (a.C == 1 ? 0 : k)];
    norm += shared<A>(a.at.norms)[(b * a.M + m) * a.K + k];
  }
#pragma unroll 1
  for (int bits = a.width; bits < 32; bits <<= 1) {
    product += __shfl_xor_sync(kAllLanes, product, bits);
    norm += __shfl_xor_sync(kAllLanes, norm, bits);
  }
  product *= static_cast<A>(2.0 * a.scale);
  const bool takes_part = has_class && (active >> k & 1u) != 0;
  const A bias = takes_part ? -static_cast<A>(a.scale) * norm : -infinity<A>();
  if (a.K != 2) return has_class ? product + bias : -infinity<A>();
  const A other = __shfl_xor_sync(kAllLanes, bias, 1);
  const bool both = bias - bias == A(0) && other - other == A(0);
  if (!both) return product + bias;
  return k == 0 ? product + (bias - other) : A(0);
}

// The distance softmax of own rows, a warp a row of a modality; what is found goes to all blocks,
// the loss to the first.
template <class A>
__device__ __forceinline__ void prototype_rows(const Arguments& a, unsigned active) {
  const int warps = static_cast<int>(blockDim.x) / 32, ranks = static_cast<int>(cluster_size());
  const int first = static_cast<int>(cluster_rank()) * a.R, k = lane_id() & (a.width - 1);
#pragma unroll 1
  for (int at = warp_id(); at < a.R * a.M; at += warps) {
    const auto [r, m] = split(at, a.by_M);
    const int i = first + r;
    if (i >= a.N) break;
    const int y = shared<int8_t>(a.at.classes)[i];
    LaneSoftmax<A> row;
    if (y >= 0 && (active >> y & 1u) != 0) {
      row = LaneSoftmax<A>(lane_logit<A>(a, r, m, active), y, a.width, a.K);
    }
#pragma unroll 1
    for (int b = lane_id() / a.width; b < ranks; b += 32 / a.width) {
      const auto to = static_cast<unsigned>(b);
      A* residual = in_block(shared<A>(a.at.residuals) + (m * a.N + i) * a.C, to);
      if (k < a.C) residual[k] = row.residual;
      if (k == 0) *in_block(shared<A>(a.at.rates) + m * a.N + i, to) = row.true_prob;
    }
    if (lane_id() == 0) *in_block(shared<A>(a.at.losses) + m * a.N + i, 0) = row.loss;
  }
}

// ---- Eqs. 4-6 -----------------------------------------------------------------------------------

// Sums over all rows, a warp each: the rates in every block, the losses in the first.
template <class A>
__device__ __forceinline__ void add_rows(const Arguments& a) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int values = cluster_rank() == 0 ? 2 * a.M + 1 : a.M;
#pragma unroll 1
  for (int v = warp_id(); v < values; v += warps) {
    const A* from = v < a.M       ? shared<A>(a.at.rates) + v * a.N
                    : v < 2 * a.M ? shared<A>(a.at.losses) + (v - a.M) * a.N
                                  : shared<A>(a.at.ce);
    double sum = 0.0;
#pragma unroll 4
    for (int i = lane_id(); i < a.N; i += 32) sum += static_cast<double>(from[i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) shared<double>(a.at.totals)[v] = sum;
  }
}

__device__ __forceinline__ double largest_rate(const Arguments& a) {
  const double* rates = shared<double>(a.at.totals);
  double largest = rates[0];
#pragma unroll 1
  for (int m = 1; m < a.M; ++m) {
    largest = rates[m] > largest || rates[m] != rates[m] ? rates[m] : largest;
  }
  return largest;
}

template <class A>
__device__ __forceinline__ void put(void* to, int at, double value) {
  static_cast<A*>(to)[at] = static_cast<A>(value);
}

// By one warp, a modality a lane.
template <class A>
__device__ __forceinline__ void give_results(const Arguments& a, const Batch<A>& batch,
                                             double largest) {
  const double* totals = shared<double>(a.at.totals);
  const int lane = lane_id(), m = lane < a.M ? lane : 0;
  const double rate = totals[m], mean = totals[a.M + m] / batch.active_rows;
  const double lambda = modality_weight(largest, rate), ce = totals[2 * a.M] / batch.rows;
  // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
  const double term = lambda != 0.0 ? a.proto_weight * lambda * mean : 0.0;
  double loss = (1.0 - a.proto_weight) * ce;
#pragma unroll 1
  for (int n = 0; n < a.M; ++n) loss += __shfl_sync(kAllLanes, term, n);
  if (lane < a.M) {
    put<A>(a.results.losses, m, mean);
    put<A>(a.results.rates, m, rate);
    put<A>(a.results.weights, m, lambda);
  }
  if (lane != 0) return;
  put<A>(a.results.cross_entropy, 0, ce);
  put<A>(a.results.loss, 0, loss);
}

// Of own rows' logits.
template <class A>
__device__ __forceinline__ void give_logits_gradient(const Arguments& a) {
  const int first = static_cast<int>(cluster_rank()) * a.R;
  const int rows = a.N - first < a.R ? a.N - first : a.R;
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); a.grad_logits != nullptr && at < rows * a.K;
       at += static_cast<int>(blockDim.x)) {
    static_cast<A*>(a.grad_logits)[first * a.K + at] = shared<A>(a.at.logits)[at];
  }
}

// grad_z_i = coefficient sum_c residual_ic y_c of own columns, four rows at a time; a coefficient
// of 0 writes zeros.
template <class A>
__device__ __forceinline__ void give_gradients(const Arguments& a, A factor, double largest) {
  constexpr int V = kVector<A>, U = 4;
  for_columns<V>(a, [&](int own, int row) {
    const Column column(a, own);
    const Part& part = a.parts[column.m];
    if (part.grad == nullptr || column.index >= part.D) return;
    const double rate = shared<double>(a.at.totals)[column.m];
    const A coefficient =
        factor * weight_of_gap(static_cast<A>(largest - rate), static_cast<A>(rate));
    const A* y = shared<A>(a.at.centred) + (a.K == 2 ? 2 * a.columns : 0) + own;
    const A* residuals = shared<A>(a.at.residuals) + column.m * a.N * a.C;
    A* grad = static_cast<A*>(part.grad) + column.index;
#pragma unroll 1
    for (int first = row; first < a.N; first += U * a.apart) {
      A sums[U][V];
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[u][v] = A(0);
      }
#pragma unroll 1
      for (int c = 0; coefficient != A(0) && c < a.C; ++c) {
        A w[V];
        load_array<V>(y + c * a.columns, w);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int i = first + u * a.apart;
          const A x = i < a.N ? coefficient * residuals[i * a.C + c] : A(0);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[u][v] += x * w[v];
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int i = first + u * a.apart;
        if (i >= a.N) continue;
        if (part.grad_vectors) {
          store_array<V>(grad + i * part.D, sums[u]);
          continue;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (column.index + v < part.D) grad[i * part.D + v] = sums[u][v];
        }
      }
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
