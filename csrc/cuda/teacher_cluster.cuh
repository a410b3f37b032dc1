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
  int logits;     // A (R, K)
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
  double scale, proto_weight;
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

__device__ __forceinline__ bool has_means(const Arguments& a) {
  return a.parts[0].prototypes.data == nullptr;
}

// A vector's column of a block's rows, and what it is a column of.
struct Column {
  __device__ __forceinline__ Column(const Arguments& a, int own) : m(0) {
    while (m + 1 < a.M && a.parts[m + 1].first <= own) ++m;
    index = static_cast<int>(cluster_rank()) * a.parts[m].W + own - a.parts[m].first;
  }
  int m, index;  // modality, column of its matrix
};

// f(own column, row, rows apart) for each vector of columns that a thread has, and its first row.
template <int V, class F>
__device__ __forceinline__ void for_columns(const Arguments& a, const F& f) {
  const int vectors = a.columns / V, threads = static_cast<int>(blockDim.x);
  const int t = static_cast<int>(threadIdx.x), wide = vectors < threads ? vectors : threads;
  const int row = t / wide, apart = threads / wide;
  if (row >= apart) return;
  for (int v = t - row * wide; v < vectors; v += wide) f(v * V, row, apart);
}

// Asks for the features; they are there once await_copies and a barrier have passed.
template <class A>
__device__ __forceinline__ void ask_for_rows(const Arguments& a) {
  constexpr int V = kVector<A>;
  for_columns<V>(a, [&](int own, int row, int apart) {
    const Column column(a, own);
    const Part& part = a.parts[column.m];
    const Matrix& z = part.features;
    const bool whole = part.vectors && column.index + V <= part.D;
    const A* from = static_cast<const A*>(z.data) + column.index * z.col_stride;
    A* to = shared<A>(a.at.rows) + own;
#pragma unroll 4
    for (int i = row; i < a.N; i += apart) {
      if (whole) {
        copy_async(to + i * a.stride, from + i * z.row_stride);
        continue;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool there = column.index + v < part.D;
        to[i * a.stride + v] = there ? from[i * z.row_stride + v * z.col_stride] : A(0);
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
  const int elements = has_means(a) ? 0 : a.K * a.columns;
  const auto logit = [&](int at) {
    const int r = at / a.K, k = at - r * a.K;
    return load_element<A>(a.logits.data,
                           (first_row + r) * a.logits.row_stride + k * a.logits.col_stride,
                           a.logits.dtype);
  };
  const auto prototype = [&](int at) {
    const int k = at / a.columns;
    const Column column(a, at - k * a.columns);
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
  for (int at = t + threads; at < logits; at += threads) shared<A>(a.at.logits)[at] = logit(at);
  for (int at = t + threads; at < elements; at += threads) {
    shared<double>(a.at.sums)[at] = prototype(at);
  }
}

// What all lanes know of the batch.
struct Batch {
  unsigned active;        // classes that take part, a bit each
  int rows, active_rows;  // with a class, with one that takes part
};

// After a barrier. The first warp leaves what class sums are multiplied with.
__device__ __forceinline__ Batch count_batch(const Arguments& a) {
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / 32;
  const bool means = has_means(a), given = lane < a.K && (means || is_active(a.counts, lane));
  const int seen = (a.N + 31) / 32 < warps ? (a.N + 31) / 32 : warps;
  int count = 0;
  for (int w = 0; w < seen; ++w) {
    count += lane < a.K ? shared<int>(a.at.counted)[w * a.K + lane] : 0;
  }
  const bool active = given && (!means || count > 0);
  if (warp_id() == 0 && lane < a.K) {
    shared<double>(a.at.inverse)[lane] = means && count > 0 ? 1.0 / count : 1.0;
  }
  return {__ballot_sync(kAllLanes, active), warp_sum(count), warp_sum(active ? count : 0)};
}

// ---- Eq. 1 --------------------------------------------------------------------------------------

// Class sums of own columns, C classes at a time, of each chunk of rows apart: in the arithmetic type
// of 16 rows, of more in double.
template <int C, class A>
__device__ __forceinline__ void add_classes(const Arguments& a) {
  const auto* classes = shared<int8_t>(a.at.classes);
  const int work = a.columns * a.chunks, rows = (a.N + 3) / 4 * 4;
  for (int at = static_cast<int>(threadIdx.x); at < work; at += static_cast<int>(blockDim.x)) {
    const int chunk = at / a.columns, column = at - chunk * a.columns;
    const int begin = chunk * a.chunk, end = begin + a.chunk < rows ? begin + a.chunk : rows;
    const A* z = shared<A>(a.at.rows) + column;
    for (int first = 0; first < a.K; first += C) {
      double totals[C];
#pragma unroll
      for (int c = 0; c < C; ++c) totals[c] = 0.0;
#pragma unroll 1
      for (int some = begin; some < end; some += 16) {
        A sums[C];
#pragma unroll
        for (int c = 0; c < C; ++c) sums[c] = A(0);
#pragma unroll
        for (int i = some; i < some + 16; i += 4) {
          if (i >= end) continue;
          int8_t k[4];
          memcpy(k, classes + i, 4);
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            const A x = z[(i + u) * a.stride];
#pragma unroll
            for (int c = 0; c < C; ++c) sums[c] += k[u] == first + c ? x : A(0);
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
__device__ __forceinline__ void centre_columns(const Arguments& a, unsigned active) {
  const int chunks = has_means(a) ? a.chunks : 1, size = a.K * a.columns;
  const double share = active != 0 ? 1.0 / __popc(active) : 0.0;
  for (int column = static_cast<int>(threadIdx.x); column < a.columns;
       column += static_cast<int>(blockDim.x)) {
    double* sums = shared<double>(a.at.sums) + column;
    double total = 0.0;
    for (int k = 0; k < a.K; ++k) {
      double sum = 0.0;
#pragma unroll 4
      for (int chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * size + k * a.columns];
      sum *= shared<double>(a.at.inverse)[k];
      sums[k * a.columns] = sum;
      total += (active >> k & 1u) != 0 ? sum : 0.0;
    }
    const A mean = static_cast<A>(total * share);
    shared<A>(a.at.mean)[column] = mean;
    A* rows = shared<A>(a.at.centred) + column;
    for (int k = 0; k < a.K; ++k) {
      const double sum = sums[k * a.columns];
      rows[k * a.columns] =
          (active >> k & 1u) != 0 ? static_cast<A>(sum - static_cast<double>(mean)) : A(0);
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
    for (int bits = width / 2; bits > 0; bits >>= 1) {
      const A other = __shfl_xor_sync(kAllLanes, maximum, bits);
      maximum = other > maximum ? other : maximum;
    }
    const A e = exp_nonpositive(logit - maximum);
    const A true_logit = __shfl_sync(kAllLanes, logit, y);
    const A true_exp = __shfl_sync(kAllLanes, e, y);
    const bool other = k < K && k != y;
    A others = other ? e : A(0);
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
template <class A>
__device__ __forceinline__ void cross_entropy_rows(const Arguments& a, const Batch& batch) {
  const int warps = static_cast<int>(blockDim.x) / 32, k = lane_id() & (a.width - 1);
  const int first = static_cast<int>(cluster_rank()) * a.R;
  const A factor = static_cast<A>((1.0 - a.proto_weight) / (batch.rows > 1 ? batch.rows : 1));
  for (int r = warps - 1 - warp_id(); r < a.R && first + r < a.N; r += warps) {
    const int i = first + r, y = shared<int8_t>(a.at.classes)[i];
    LaneSoftmax<A> row;
    if (y >= 0) {
      const A logit = k < a.K ? shared<A>(a.at.logits)[r * a.K + k] : -infinity<A>();
      row = LaneSoftmax<A>(logit, y, a.width, a.K);
    }
    if (lane_id() == 0) *in_block(shared<A>(a.at.ce) + i, 0) = row.loss;
    if (a.grad_logits != nullptr && lane_id() < a.K) {
      static_cast<A*>(a.grad_logits)[i * a.K + k] = factor == A(0) ? A(0) : factor * row.residual;
    }
  }
}

// (z_i - mean) . y_c over own columns, G products at a time, to the row's owner.
template <int G, class A>
__device__ __forceinline__ void give_products(const Arguments& a) {
  constexpr int V = kVector<A>;
  const int rank = static_cast<int>(cluster_rank()), work = a.N * a.M * ((a.C + G - 1) / G);
  for (int at = static_cast<int>(threadIdx.x); at < work; at += static_cast<int>(blockDim.x)) {
    const int rest = at / a.N, i = at - rest * a.N, group = rest / a.M, m = rest - group * a.M;
    const int first = group * G, count = a.C - first < G ? a.C - first : G;
    const Part& part = a.parts[m];
    const A* z = shared<A>(a.at.rows) + i * a.stride + part.first;
    const A* mean = shared<A>(a.at.mean) + part.first;
    const A* y = shared<A>(a.at.centred) + (a.K == 2 ? 2 : first) * a.columns + part.first;
    A sums[G];
#pragma unroll
    for (int g = 0; g < G; ++g) sums[g] = A(0);
#pragma unroll 4
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
    const int owner = i / a.R, r = i - owner * a.R;
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
    const int to = at / each, mk = at - to * each, m = mk / a.K, k = mk - m * a.K;
    const Part& part = a.parts[m];
    const A* y = shared<A>(a.at.centred) + k * a.columns + part.first;
    A sum = A(0);
#pragma unroll 4
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
  for (int b = lane_id() / a.width; has_class && b < ranks; b += 32 / a.width) {
    product += shared<A>(a.at.products)[((b * a.R + r) * a.M + m) * a.C + (a.C == 1 ? 0 : k)];
    norm += shared<A>(a.at.norms)[(b * a.M + m) * a.K + k];
  }
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
  for (int at = warp_id(); at < a.R * a.M; at += warps) {
    const int r = at / a.M, m = at - r * a.M, i = first + r;
    if (i >= a.N) break;
    const int y = shared<int8_t>(a.at.classes)[i];
    LaneSoftmax<A> row;
    if (y >= 0 && (active >> y & 1u) != 0) {
      row = LaneSoftmax<A>(lane_logit<A>(a, r, m, active), y, a.width, a.K);
    }
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
  for (int v = warp_id(); v < values; v += warps) {
    const A* from = v < a.M       ? shared<A>(a.at.rates) + v * a.N
                    : v < 2 * a.M ? shared<A>(a.at.losses) + (v - a.M) * a.N
                                  : shared<A>(a.at.ce);
    double sum = 0.0;
    for (int i = lane_id(); i < a.N; i += 32) sum += static_cast<double>(from[i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) shared<double>(a.at.totals)[v] = sum;
  }
}

__device__ __forceinline__ double largest_rate(const Arguments& a) {
  const double* rates = shared<double>(a.at.totals);
  double largest = rates[0];
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
__device__ __forceinline__ void give_results(const Arguments& a, const Batch& batch,
                                             double largest) {
  const double* totals = shared<double>(a.at.totals);
  const int lane = lane_id(), m = lane < a.M ? lane : 0;
  const double rate = totals[m], mean = totals[a.M + m] / batch.active_rows;
  const double lambda = modality_weight(largest, rate), ce = totals[2 * a.M] / batch.rows;
  // A modality of weight 0 takes no part, even where its own loss is NaN for want of rows.
  const double term = lambda != 0.0 ? a.proto_weight * lambda * mean : 0.0;
  double loss = (1.0 - a.proto_weight) * ce;
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

// grad_z_i = coefficient sum_c residual_ic y_c of own columns, four rows at a time; a coefficient
// of 0 writes zeros.
template <class A>
__device__ __forceinline__ void give_gradients(const Arguments& a, A factor, double largest) {
  constexpr int V = kVector<A>, U = 4;
  for_columns<V>(a, [&](int own, int row, int apart) {
    const Column column(a, own);
    const Part& part = a.parts[column.m];
    if (part.grad == nullptr || column.index >= part.D) return;
    const double rate = shared<double>(a.at.totals)[column.m];
    const A coefficient =
        factor * weight_of_gap(static_cast<A>(largest - rate), static_cast<A>(rate));
    const A* y = shared<A>(a.at.centred) + (a.K == 2 ? 2 * a.columns : 0) + own;
    const A* residuals = shared<A>(a.at.residuals) + column.m * a.N * a.C;
    A* grad = static_cast<A*>(part.grad) + column.index;
    for (int first = row; first < a.N; first += U * apart) {
      A sums[U][V];
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[u][v] = A(0);
      }
      for (int c = 0; coefficient != A(0) && c < a.C; ++c) {
        A w[V];
        load_array<V>(y + c * a.columns, w);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int i = first + u * apart;
          const A x = i < a.N ? coefficient * residuals[i * a.C + c] : A(0);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[u][v] += x * w[v];
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int i = first + u * apart;
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
