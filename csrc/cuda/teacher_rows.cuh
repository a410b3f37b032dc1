// How the forward kernel of Eqs. 2-6 works on the rows of a modality (teacher.cu): the products
// with all prototypes, of a few rows at once by a warp, so that they share each load of a
// prototype, and the softmax of what comes of them.
#pragma once

#include "conversions.cuh"
#include "teacher.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

__device__ __forceinline__ int active_class_of(const Arguments& a, int64_t i) {
  const int y = class_of(a.labels, i, a.K);
  return y >= 0 && is_active(a.counts, y) ? y : -1;
}

// acc[r][c] += (z_r - mean) . y_c over V columns, the y_c `stride` apart; with many sums in
// registers, 4 columns at a time.
template <class T, int V, int R, int C, class A>
__device__ __forceinline__ void add_products(const Packed<T, V> (&raw)[R], const A* means,
                                             const A* y, int64_t stride, int count,
                                             A (&acc)[R][C]) {
  constexpr int H = V < 4 || C == 1 ? V : 4;
#pragma unroll
  for (int h = 0; h < V; h += H) {
    A mean[H], x[R][H];
    load_array<H>(means + h, mean);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Packed<T, H> part;
      memcpy(&part, reinterpret_cast<const char*>(&raw[r]) + h * sizeof(T), sizeof(part));
      unpack<T, H>(part, x[r]);
#pragma unroll
      for (int v = 0; v < H; ++v) x[r][v] -= mean[v];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (c < count) {
        A w[H];
        load_array<H>(y + c * stride + h, w);
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int v = 0; v < H; ++v) acc[r][c] += x[r][v] * w[v];
        }
      }
    }
  }
}

// R rows and what they are multiplied with, from a lane's first column on.
template <class T, class A>
struct Columns {
  const T* rows;
  int64_t row_stride, col_stride;
  const A *mean, *y;
  int64_t y_stride;
  int count;  // of y

  __device__ __forceinline__ void skip(int64_t columns) {
    rows += columns * col_stride;
    mean += columns;
    y += columns;
  }
};

// Every 32nd V columns, `pieces` of them: of U pieces of all rows everything is loaded before the
// first is used.
template <int V, int U, class T, int R, int C, class A>
__device__ __forceinline__ void add_pieces(Columns<T, A> at, int pieces, A (&acc)[R][C]) {
#pragma unroll 1
  for (; pieces >= U; pieces -= U) {
    Packed<T, V> raw[U][R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t column = u * 32 * V * (V == 1 ? at.col_stride : 1);
        raw[u][r] = load_packed<V>(at.rows + r * at.row_stride + column);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int column = u * 32 * V;
      add_products<T, V>(raw[u], at.mean + column, at.y + column, at.y_stride, at.count, acc);
    }
    at.skip(U * 32 * V);
  }
  if constexpr (U > 1) add_pieces<V, U / 2>(at, pieces, acc);
}

__device__ __forceinline__ int pieces_of(int64_t vectors) {
  return static_cast<int>((vectors - lane_id() + 31) / 32);
}

// Pieces in flight: of 16 bytes, 8 a lane, fewer where the sums take the registers.
template <class T, int R, int C, class A>
__device__ __forceinline__ void row_products(const Part& part, int64_t first, const Centred<A>& p,
                                             const A* y, int count, A (&acc)[R][C]) {
  constexpr int V = kVector<T>, U = C > 1 ? 1 : 8 / (R < 2 ? 2 : R);
  const Matrix& features = part.modality.features;
  const T* rows = static_cast<const T*>(features.data) + first * features.row_stride;
  const int64_t D = part.modality.D, whole = part.vectors ? D / V * V : 0;
  if (whole > 0) {
    Columns<T, A> at{rows, features.row_stride, 1, p.mean, y, p.stride, count};
    at.skip(lane_id() * V);
    add_pieces<V, U>(at, pieces_of(whole / V), acc);
  }
  if (whole == D) return;
  Columns<T, A> at{rows, features.row_stride, features.col_stride, p.mean, y, p.stride, count};
  at.skip(whole + lane_id());
  add_pieces<1, U>(at, pieces_of(D - whole), acc);
}

// Of rows `first` and the R - 1 after it.
template <int R, int C, class A>
__device__ __forceinline__ void products(const Part& part, int64_t first, const Centred<A>& p,
                                         const A* y, int count, A (&acc)[R][C]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] = A(0);
  }
  // In float64 everything is.
  if constexpr (sizeof(A) == 8) {
    row_products<double>(part, first, p, y, count, acc);
  } else if (part.modality.features.dtype == Dtype::float32) {
    row_products<float>(part, first, p, y, count, acc);
  } else if (part.modality.features.dtype == Dtype::bfloat16) {
    row_products<bfloat16>(part, first, p, y, count, acc);
  } else {
    row_products<float16>(part, first, p, y, count, acc);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] = warp_sum(acc[r][c]);
  }
}

// ---- up to 8 classes: a lane a row --------------------------------------------------------------

// A row of L logits, of which those of classes beyond K are -inf. The true class's residual is the
// complement of the others: p - 1 would cancel.
template <class A, int L>
struct RowSoftmax {
  A loss, true_prob, residual[L];

  __device__ __forceinline__ RowSoftmax(const A (&logit)[L], int64_t K, int y) {
    A maximum = logit[0], true_logit = logit[0], true_exp = A(0), others = A(0);
#pragma unroll
    for (int k = 1; k < L; ++k) maximum = logit[k] > maximum ? logit[k] : maximum;
#pragma unroll
    for (int k = 0; k < L; ++k) {
      residual[k] = exp_nonpositive(logit[k] - maximum);
      true_logit = k == y ? logit[k] : true_logit;
      true_exp = k == y ? residual[k] : true_exp;
      others += k == y || k >= K ? A(0) : residual[k];
    }
    const A inverse = A(1) / (true_exp + others);
#pragma unroll
    for (int k = 0; k < L; ++k) residual[k] = (k == y ? -others : residual[k]) * inverse;
    loss = cross_entropy(maximum, true_logit, true_exp, others);
    true_prob = true_exp * inverse;
  }
  __device__ __forceinline__ void leave_residual(void* to, int64_t i, int64_t K) const {
    if (to == nullptr) return;
#pragma unroll
    for (int k = 0; k < L; ++k) {
      if (k < K) static_cast<A*>(to)[i * K + k] = residual[k];
    }
  }
};

template <class A>
__device__ __forceinline__ void zero_residual(void* to, int64_t i, int64_t K) {
  for (int64_t k = 0; to != nullptr && k < K; ++k) static_cast<A*>(to)[i * K + k] = A(0);
}

// Logits from products: a_k = 2 scale (z - mean).(c_k - mean) - scale |c_k - mean|^2, which is
// -scale |z - c_k|^2 but for a term that all classes share. C = 1: of two classes only the
// difference matters, so that one product serves.
template <int C, int L, class A>
__device__ __forceinline__ void logits_of(const A (&products)[C], const Centred<A>& p, A twice,
                                          int64_t K, A (&logit)[L]) {
  if constexpr (C == 1) {
    const A first = p.bias[0], second = p.bias[1], product = twice * products[0];
    const bool both = first - first == A(0) && second - second == A(0);
    logit[0] = product + (both ? first - second : first);
    logit[1] = both ? A(0) : product + second;
  } else {
#pragma unroll
    for (int k = 0; k < L; ++k) {
      logit[k] = k < K ? twice * products[k] + p.bias[k] : -infinity<A>();
    }
  }
}

// A warp takes a.groups times R rows; when their products are known, each lane finishes a row. The
// warps of a block lie far apart among the rows: so every multiprocessor has as many of them.
template <class A, int C, int R>
__device__ __forceinline__ Sums lane_rows(const Arguments& a, const Part& part,
                                          const Centred<A>& p) {
  constexpr int L = C == 1 ? 2 : C;
  double losses = 0.0, rates = 0.0;
  int done = 0;
  const Modality& m = part.modality;
  const A* y = C == 1 ? p.rows + 2 * p.stride : p.rows;
  const int count = C == 1 ? 1 : static_cast<int>(a.K);
  const A twice = static_cast<A>(2.0 * a.scale);
  const int lane = lane_id(), chunk = a.groups * R;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * chunk;
  for (int64_t first = (static_cast<int64_t>(warp_id()) * gridDim.x + blockIdx.x) * chunk;
       first < a.N; first += step) {
    const int64_t mine = first + lane;
    const bool has_row = lane < chunk && mine < a.N;
    const int k = has_row ? active_class_of(a, mine) : -1;
    const unsigned active = __ballot_sync(kAllLanes, k >= 0);
    A kept[C];
#pragma unroll
    for (int c = 0; c < C; ++c) kept[c] = A(0);
#pragma unroll 1
    for (int begin = 0; begin < chunk; begin += R) {
      if ((active >> begin & ((1u << R) - 1u)) == 0) continue;
      // The last rows come with rows before them, whose products are the same once more.
      const int from = static_cast<int>(first + begin + R <= a.N ? begin : a.N - R - first);
      A acc[R][C];
      products(part, first + from, p, y, count, acc);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < C; ++c) kept[c] = lane == from + r ? acc[r][c] : kept[c];
      }
    }
    if (!has_row) continue;
    A loss = A(0), true_prob = A(0);
    if (k >= 0) {
      A logit[L];
      logits_of(kept, p, twice, a.K, logit);
      const RowSoftmax<A, L> row(logit, a.K, k);
      row.leave_residual(m.residual, mine, a.K);
      loss = row.loss;
      true_prob = row.true_prob;
      ++done;
    } else {
      zero_residual<A>(m.residual, mine, a.K);
    }
    if (m.row_loss != nullptr) static_cast<A*>(m.row_loss)[mine] = loss;
    if (m.true_prob != nullptr) static_cast<A*>(m.true_prob)[mine] = true_prob;
    losses += static_cast<double>(loss);
    rates += static_cast<double>(true_prob);
  }
  return sum_lanes({losses, rates, static_cast<double>(done)});
}

// ---- more classes: a warp a row -----------------------------------------------------------------

// Lane k < K holds logit a of class k; all others -inf. The true class's residual is the complement
// of the others: p - 1 would cancel.
template <class A>
__device__ __forceinline__ void softmax_row(const Arguments& a, const Modality& m, int64_t i, int y,
                                            A logit, Sums& sums) {
  const int lane = lane_id();
  const A maximum = warp_max(logit);
  const A e = exp_nonpositive(logit - maximum);
  const A true_logit = __shfl_sync(kAllLanes, logit, y);
  const A true_exp = __shfl_sync(kAllLanes, e, y);
  const bool other = lane < a.K && lane != y;
  const A others = warp_sum(other ? e : A(0));
  const A inverse = A(1) / (true_exp + others);
  const A loss = cross_entropy(maximum, true_logit, true_exp, others);
  const A true_prob = true_exp * inverse;
  if (m.residual != nullptr && lane < a.K) {
    static_cast<A*>(m.residual)[i * a.K + lane] = (other ? e : -others) * inverse;
  }
  if (lane == 0) {
    if (m.row_loss != nullptr) static_cast<A*>(m.row_loss)[i] = loss;
    if (m.true_prob != nullptr) static_cast<A*>(m.true_prob)[i] = true_prob;
  }
  sums.loss += static_cast<double>(loss);
  sums.rate += static_cast<double>(true_prob);
  sums.rows += 1.0;
}

template <class A>
__device__ __forceinline__ void ignore_row(const Arguments& a, const Modality& m, int64_t i) {
  const int lane = lane_id();
  if (m.residual != nullptr && lane < a.K) static_cast<A*>(m.residual)[i * a.K + lane] = A(0);
  if (lane == 0) {
    if (m.row_loss != nullptr) static_cast<A*>(m.row_loss)[i] = A(0);
    if (m.true_prob != nullptr) static_cast<A*>(m.true_prob)[i] = A(0);
  }
}

template <int C, class A>
__device__ __forceinline__ A lane_logit(const A (&acc)[C], const Centred<A>& p, A twice,
                                        int64_t K) {
  const int lane = lane_id();
  A mine = A(0);
#pragma unroll
  for (int c = 0; c < C; ++c) mine = lane == c ? acc[c] : mine;
  return lane < K ? twice * mine + p.bias[lane] : -infinity<A>();
}

template <class A, int C, int R>
__device__ __forceinline__ Sums warp_rows(const Arguments& a, const Part& part,
                                          const Centred<A>& p) {
  Sums sums;
  const int count = static_cast<int>(a.K);
  const A twice = static_cast<A>(2.0 * a.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * R;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * R; first < a.N;
       first += step) {
    // The last rows come with rows before them, which are done already.
    const int64_t from = first + R <= a.N ? first : a.N - R;
    int classes[R];
    bool any = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      classes[r] = active_class_of(a, from + r);
      any = any || classes[r] >= 0;
    }
    A acc[R][C];
    if (any) products(part, from, p, p.rows, count, acc);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (from + r < first) continue;
      if (classes[r] >= 0) {
        softmax_row(a, part.modality, from + r, classes[r], lane_logit(acc[r], p, twice, a.K),
                    sums);
      } else {
        ignore_row<A>(a, part.modality, from + r);
      }
    }
  }
  return sums;
}

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
