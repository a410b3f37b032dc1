// Eqs. 2-6, forward: the distance softmax of every modality and the cross-entropy in one launch,
// whose last block combines what all blocks found. A warp reads a few rows of features at once, so
// that they share each load of a prototype.
#include "teacher.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

// acc[r][c] += (z_r - mean) . y_c over V columns from d on.
template <int V, int R, int C, class A>
__device__ __forceinline__ void add_products(const A (&z)[R][V], const Centred<A>& p, const A* y,
                                             int64_t d, int count, A (&acc)[R][C]) {
  A mean[V], x[R][V];
  load_array<V>(p.mean + d, mean);
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[r][v] = z[r][v] - mean[v];
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < count) {
      A w[V];
      load_array<V>(y + c * p.stride + d, w);
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[r][c] += x[r][v] * w[v];
      }
    }
  }
}

template <class T, int R, int C, class A>
__device__ __forceinline__ void vector_products(const Matrix& features, const int64_t (&rows)[R],
                                                int64_t D, const Centred<A>& p, const A* y,
                                                int count, A (&acc)[R][C]) {
  constexpr int V = kVector<T>;
  const T* data = static_cast<const T*>(features.data);
  const int64_t whole = D / V * V;
  for (int64_t d = lane_id() * V; d < whole; d += 32 * V) {
    A z[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) load_vector(data + rows[r] * features.row_stride + d, z[r]);
    add_products<V>(z, p, y, d, count, acc);
  }
  const int64_t d = whole + lane_id();
  if (d < D) {
    A z[R][1];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      z[r][0] = static_cast<A>(to_arithmetic(data[rows[r] * features.row_stride + d]));
    }
    add_products<1>(z, p, y, d, count, acc);
  }
}

// Any strides and any alignment.
template <int R, int C, class A>
__device__ __forceinline__ void element_products(const Matrix& features, const int64_t (&rows)[R],
                                                 int64_t D, const Centred<A>& p, const A* y,
                                                 int count, A (&acc)[R][C]) {
#pragma unroll 2
  for (int64_t d = lane_id(); d < D; d += 32) {
    A z[R][1];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      z[r][0] = load_element<A>(
          features.data, rows[r] * features.row_stride + d * features.col_stride, features.dtype);
    }
    add_products<1>(z, p, y, d, count, acc);
  }
}

template <int R, int C, class A>
__device__ __forceinline__ void products(const Part& part, const int64_t (&rows)[R],
                                         const Centred<A>& p, const A* y, int count,
                                         A (&acc)[R][C]) {
  const Matrix& features = part.modality.features;
  const int64_t D = part.modality.D;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] = A(0);
  }
  if (!part.vectors) {
    element_products(features, rows, D, p, y, count, acc);
  } else if constexpr (sizeof(A) == 8) {
    vector_products<double>(features, rows, D, p, y, count, acc);
  } else if (features.dtype == Dtype::float32) {
    vector_products<float>(features, rows, D, p, y, count, acc);
  } else if (features.dtype == Dtype::bfloat16) {
    vector_products<bfloat16>(features, rows, D, p, y, count, acc);
  } else {
    vector_products<float16>(features, rows, D, p, y, count, acc);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) acc[r][c] = warp_sum(acc[r][c]);
  }
}

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

__device__ __forceinline__ int active_class_of(const Arguments& a, int64_t i) {
  const int y = class_of(a.labels, i, a.K);
  return y >= 0 && is_active(a.counts, y) ? y : -1;
}

// Lane k's logit: a_k = 2 scale (z - mean).(c_k - mean) - scale |c_k - mean|^2, which is
// -scale |z - c_k|^2 but for a term that all classes share. C = 1: of two classes only the
// difference matters, so that one product serves.
template <int C, class A>
__device__ __forceinline__ A lane_logit(const A (&acc)[C], const Centred<A>& p, A twice,
                                        int64_t K) {
  const int lane = lane_id();
  if constexpr (C == 1) {
    const A first = p.bias[0], second = p.bias[1];
    const A product = twice * acc[0];
    if (first - first == A(0) && second - second == A(0)) {
      return lane == 0 ? product + (first - second) : (lane == 1 ? A(0) : -infinity<A>());
    }
    return lane < 2 ? product + (lane == 0 ? first : second) : -infinity<A>();
  } else {
    A mine = A(0);
#pragma unroll
    for (int c = 0; c < C; ++c) mine = lane == c ? acc[c] : mine;
    return lane < K ? twice * mine + p.bias[lane] : -infinity<A>();
  }
}

template <class A, int C, int R>
__device__ __forceinline__ Sums modality_rows(const Arguments& a, const Part& part,
                                              const Centred<A>& p) {
  Sums sums;
  const A* y = C == 1 ? p.rows + 2 * p.stride : p.rows;
  const int count = C == 1 ? 1 : static_cast<int>(a.K);
  const A twice = static_cast<A>(2.0 * a.scale);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * R;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * R; first < a.N;
       first += step) {
    int64_t rows[R];
    int classes[R];
    bool any = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      rows[r] = first + r < a.N ? first + r : a.N - 1;
      classes[r] = first + r < a.N ? active_class_of(a, rows[r]) : -1;
      any = any || classes[r] >= 0;
    }
    A acc[R][C];
    if (any) products(part, rows, p, y, count, acc);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r >= a.N) continue;
      if (classes[r] >= 0) {
        softmax_row(a, part.modality, rows[r], classes[r], lane_logit(acc[r], p, twice, a.K), sums);
      } else {
        ignore_row<A>(a, part.modality, rows[r]);
      }
    }
  }
  return sums;
}

// Rows that many_classes has worked on are only summed, a lane a row.
template <class A>
__device__ __forceinline__ Sums finished_rows(const Arguments& a, const Modality& m) {
  Sums sums;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.N; i += step) {
    if (active_class_of(a, i) < 0) continue;
    if (m.row_loss != nullptr) sums.loss += static_cast<double>(static_cast<A*>(m.row_loss)[i]);
    if (m.true_prob != nullptr) sums.rate += static_cast<double>(static_cast<A*>(m.true_prob)[i]);
    sums.rows += 1.0;
  }
  sums.loss = warp_sum(sums.loss);
  sums.rate = warp_sum(sums.rate);
  sums.rows = warp_sum(sums.rows);
  return sums;
}

// Cross-entropy of the logits, a warp a row; the residual stays without its factor.
template <class A>
__device__ __forceinline__ Sums cross_entropy_rows(const Arguments& a) {
  Sums sums;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); i < a.N; i += step) {
    const int y = class_of(a.labels, i, a.K);
    const int64_t row = i * a.logits.row_stride;
    A* residual =
        a.logits_residual == nullptr ? nullptr : static_cast<A*>(a.logits_residual) + i * a.K;
    const auto logit = [&](int64_t k) {
      return load_element<A>(a.logits.data, row + k * a.logits.col_stride, a.logits.dtype);
    };
    A inverse = A(0), maximum = A(0), others = A(0);
    if (y >= 0) {
      maximum = -infinity<A>();
      for (int64_t k = lane_id(); k < a.K; k += 32) {
        const A x = logit(k);
        maximum = x > maximum ? x : maximum;
      }
      maximum = warp_max(maximum);
      double sum = 0.0;
      for (int64_t k = lane_id(); k < a.K; k += 32) {
        if (k != y) sum += static_cast<double>(exp_nonpositive(logit(k) - maximum));
      }
      others = static_cast<A>(warp_sum(sum));
      const A true_logit = logit(y);
      const A true_exp = exp_nonpositive(true_logit - maximum);
      inverse = A(1) / (true_exp + others);
      sums.loss += static_cast<double>(cross_entropy(maximum, true_logit, true_exp, others));
      sums.rows += 1.0;
    }
    for (int64_t k = lane_id(); residual != nullptr && k < a.K; k += 32) {
      const A p = k == y ? -others : exp_nonpositive(logit(k) - maximum);
      residual[k] = y >= 0 ? p * inverse : A(0);
    }
  }
  return sums;
}

template <class A>
__device__ __forceinline__ void copy_out(const A* from, void* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) static_cast<A*>(to)[i] = from[i];
}

// C products a row, R rows a warp; C = 0: rows of many classes, which are finished already.
template <class A, int C, int R>
__global__ void __launch_bounds__(kThreads, 1) teacher_kernel(const __grid_constant__ Arguments a) {
  const int part = a.first_part + static_cast<int>(blockIdx.y);
  Sums sums;
  if (part == 0) {
    sums = cross_entropy_rows<A>(a);
  } else {
    const Part& mine = a.parts[blockIdx.y - (a.first_part == 0 ? 1 : 0)];
    if constexpr (C == 0) {
      sums = finished_rows<A>(a, mine.modality);
    } else {
      const Modality& m = mine.modality;
      const Centred<A> p(a.in_shared ? dynamic_shared() : m.centred, m.D, a.K);
      if (a.in_shared) {
        centre_by_block(m.prototypes, a.counts, m.D, a.K, static_cast<A>(a.scale), p);
        if (blockIdx.x == 0 && m.centred != nullptr) {
          copy_out(p.mean, m.centred, centred_size(m.D, a.K));
        }
      }
      sums = modality_rows<A, C, R>(a, mine, p);
    }
  }
  leave(a, part, sums);
  if (a.counter == nullptr) return;
  if (is_last_block(a.counter, gridDim.x * gridDim.y)) finish<A>(a);
}

template <class A, int C, int R>
void start(const Arguments& a, dim3 grid, size_t shared, Stream stream) {
  launch<teacher_kernel<A, C, R>>(grid, kThreads, shared, stream, a);
}

// Few rows are spread over as many warps as there are; many share their loads.
template <class A>
void start(const Arguments& a, bool few_rows, dim3 grid, size_t shared, Stream stream) {
  if (a.K > kFewClasses || a.M == 0) return start<A, 0, 1>(a, grid, shared, stream);
  if (a.K > 16) return start<A, 32, 2 / (sizeof(A) / 4)>(a, grid, shared, stream);
  if (a.K > 8) return start<A, 16, 4 / (sizeof(A) / 4)>(a, grid, shared, stream);
  if (a.K == 2) {
    return few_rows ? start<A, 1, 1>(a, grid, shared, stream)
                    : start<A, 1, 4>(a, grid, shared, stream);
  }
  if (a.K > 4) {
    return few_rows ? start<A, 8, 1>(a, grid, shared, stream)
                    : start<A, 8, 4>(a, grid, shared, stream);
  }
  few_rows ? start<A, 4, 1>(a, grid, shared, stream) : start<A, 4, 4>(a, grid, shared, stream);
}

unsigned blocks_of(const Teacher& t, bool& few_rows) {
  const int64_t blocks = 4 * device_limits().multiprocessors;
  few_rows = t.N <= blocks * kWarps;
  return blocks_for(t.N, few_rows ? kWarps : 4 * kWarps, blocks);
}

// Shared memory for the widest modality, 0 if it does not fit.
size_t shared_bytes_of(const Teacher& t) {
  if (t.K > kFewClasses) return 0;
  int64_t most = 0;
  for (int64_t m = 0; m < t.M; ++m) {
    const int64_t size = centred_size(t.modalities[m].D, t.K);
    most = size > most ? size : most;
  }
  const size_t bytes = static_cast<size_t>(most) * (t.wide ? 8 : 4);
  // Beside it: what the kernel declares itself. More than two blocks should fit a multiprocessor.
  return bytes + 4096 <= device_limits().shared_bytes / 2 ? bytes : 0;
}

size_t partial_bytes(const Teacher& t, unsigned blocks) {
  return 16 + static_cast<size_t>((1 + t.M) * blocks * 3) * sizeof(double);
}

template <class A>
__global__ void weights_kernel(Values rates, int64_t M, void* weights) {
  double largest = value_at<double>(rates, 0);
  for (int64_t m = 1; m < M; ++m) {
    const double rate = value_at<double>(rates, m);
    largest = rate > largest || rate != rate ? rate : largest;
  }
  for (int64_t m = threadIdx.x; m < M; m += blockDim.x) {
    static_cast<A*>(weights)[m] =
        static_cast<A>(modality_weight(largest, value_at<double>(rates, m)));
  }
}

}  // namespace

size_t teacher_bytes(const Teacher& t) {
  bool few_rows;
  size_t centring = 0;
  for (int64_t m = 0; m < t.M; ++m) {
    const size_t bytes = centre_bytes(t.modalities[m].D, t.K);
    centring = bytes > centring ? bytes : centring;
  }
  return partial_bytes(t, blocks_of(t, few_rows)) + centring;
}

void modality_weights(const Values& rates, int64_t M, bool wide, void* weights, Stream stream) {
  if (wide) {
    launch<weights_kernel<double>>(1, 32, 0, stream, rates, M, weights);
  } else {
    launch<weights_kernel<float>>(1, 32, 0, stream, rates, M, weights);
  }
}

void teacher(const Teacher& t, void* workspace, Stream stream) {
  bool few_rows;
  const unsigned blocks = blocks_of(t, few_rows);
  const size_t shared = shared_bytes_of(t);
  Arguments a{t.N,
              t.K,
              t.M,
              t.scale,
              t.proto_weight,
              t.logits,
              t.logits_residual,
              t.labels,
              t.counts,
              t.reduction,
              t.results,
              reinterpret_cast<double*>(static_cast<char*>(workspace) + 16),
              nullptr,
              0,
              shared > 0,
              {}};
  const bool with_logits = t.logits.data != nullptr;
  int64_t next = 0;
  do {
    const bool first = next == 0;
    const int64_t count = t.M - next < kMostModalities ? t.M - next : kMostModalities;
    a.first_part = first && with_logits ? 0 : static_cast<int>(1 + next);
    for (int64_t m = 0; m < count; ++m) {
      const Modality& modality = t.modalities[next + m];
      a.parts[m] = {modality, has_vector_rows(modality.features)};
      if (t.K <= kFewClasses && shared == 0) {
        centre_prototypes(
            {modality.D, t.K, t.wide, t.scale, modality.prototypes, t.counts, modality.centred},
            static_cast<char*>(workspace) + partial_bytes(t, blocks), stream);
      }
    }
    next += count;
    a.counter = next == t.M ? take_counters(workspace, 1, stream) : nullptr;
    const dim3 grid(blocks, static_cast<unsigned>(count + (first && with_logits ? 1 : 0)));
    t.wide ? start<double>(a, few_rows, grid, shared, stream)
           : start<float>(a, few_rows, grid, shared, stream);
  } while (next < t.M);
}

}  // namespace cuda
}  // namespace pycdgkd
