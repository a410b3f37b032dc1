// The steps of teacher_cluster.cu between the barriers, equation by equation.
#pragma once

#include "teacher_cluster.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

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
          memcpy(k, __builtin_assume_aligned(classes + i, 4), 4);
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
  double loss = weighted_mean(1.0 - a.proto_weight, ce);
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
