// Eq. 9 for rows of up to 32 classes, which stay in registers from the first load to the gradient:
// up to 8 classes a thread works on a row, beyond them a group of 16 or 32 lanes, one a class.
#include "distillation.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <int G, class T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int bits = G / 2; bits > 0; bits >>= 1) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

template <int G, class T>
__device__ __forceinline__ T group_max(T value) {
#pragma unroll
  for (int bits = G / 2; bits > 0; bits >>= 1) {
    const T other = __shfl_xor_sync(kAllLanes, value, bits);
    value = other > value ? other : value;
  }
  return value;
}

// The value of class k of the same row.
template <int G, class T>
__device__ __forceinline__ T at_class(T value, int k) {
  return __shfl_sync(kAllLanes, value, lane_id() / G * G + k);
}

// The first class whose value is the largest.
template <int G, class A>
__device__ __forceinline__ int likeliest(A value, A maximum) {
  const unsigned all = __ballot_sync(kAllLanes, value == maximum);
  const unsigned mine = G == 32 ? all : (all >> (lane_id() / G * G)) & ((1u << (G & 31)) - 1u);
  return mine == 0 ? 0 : __ffs(static_cast<int>(mine)) - 1;
}

// A softmax as a lane sees it.
template <class A>
struct Lane {
  A value, maximum, exp, total;
};

template <int G, class A>
__device__ __forceinline__ Lane<A> softmax_of(A value, A inverse_temperature, bool inside) {
  const A maximum = group_max<G>(inside ? value : -infinity<A>());
  const A e = inside ? fast_exp((value - maximum) * inverse_temperature) : A(0);
  return {value, maximum, e, group_sum<G>(e)};
}

template <int G, class A>
__device__ __forceinline__ void row(const DistillationArguments& d, const Factors<A>& factors,
                                    int64_t i, int y, const A* weights, double& ce, double& kl) {
  const int k = lane_id() % G;
  const bool inside = k < d.K, reverse = d.direction == Direction::reverse, on = y >= 0;
  const A temperature = static_cast<A>(d.temperature), inverse_temperature = A(1) / temperature;
  const Lane<A> s =
      softmax_of<G>(on && inside ? student_element<A>(d, i, k) : A(0), inverse_temperature, inside);
  const A p = s.exp * (A(1) / s.total);
  const int first = likeliest<G>(inside ? s.value : -infinity<A>(), s.maximum);
  A slope = A(0), share = A(0);
  bool any = false;
  for (int j = 0; j < d.S; ++j) {
    if (weights[j] == A(0)) continue;
    any = true;
    const Lane<A> t = softmax_of<G>(on && inside ? source_element<A>(d, j, i, k) : A(0),
                                    inverse_temperature, inside);
    const int likeliest_t = likeliest<G>(inside ? t.value : -infinity<A>(), t.maximum);
    const A anchor = reverse ? at_class<G>(t.value, first) : at_class<G>(s.value, likeliest_t);
    const Ratio<A> ratio = ratio_of(reverse, weights[j], s.maximum, s.total, t.maximum, t.total,
                                    anchor, inverse_temperature);
    if (inside) add_source(reverse, ratio, s.value, t.value, p, inverse_temperature, slope, share);
  }
  const A mean = group_sum<G>(!inside ? A(0) : (!reverse ? slope : (p == A(0) ? A(0) : p * slope)));
  const A divergence = group_sum<G>(share);
  A loss = A(0), residual = A(0);
  if (d.labels.data != nullptr) {
    const int truth = on ? y : 0;
    const A e = inside ? plain_exp(s.value - s.maximum, s.exp, temperature) : A(0);
    const A true_exp = at_class<G>(e, truth), true_logit = at_class<G>(s.value, truth);
    const A others = group_sum<G>(k == truth ? A(0) : e);
    residual = (k == truth ? -others : e) * (A(1) / (true_exp + others));
    loss = cross_entropy(s.maximum, true_logit, true_exp, others);
  }
  if (i >= d.N) return;
  if (d.grad != nullptr && inside) {
    A grad = any && factors.kl != A(0) ? factors.kl * centred_slope(reverse, p, slope, mean) : A(0);
    if (d.labels.data != nullptr) grad += factors.ce * residual;
    store_element(d.grad, i * d.K + k, d.grad_dtype, on ? grad : A(0));
  }
  if (k != 0) return;
  if (d.row_kl != nullptr) static_cast<A*>(d.row_kl)[i] = on ? divergence : A(0);
  if (!on) return;
  ce += static_cast<double>(loss);
  kl += static_cast<double>(divergence);
}

// ---- a thread a row ----

// A row's values, -inf beyond it. The dtype is asked once, so that its loads go out together.
template <int C, class A, class T>
__device__ __forceinline__ void load_values(const void* data, int64_t start, int64_t stride, int K,
                                            A (&to)[C]) {
  const T* row = static_cast<const T*>(data) + start;
#pragma unroll
  for (int k = 0; k < C; ++k) {
    to[k] = k < K ? static_cast<A>(to_arithmetic(row[k * stride])) : -infinity<A>();
  }
}

template <int C, class A>
__device__ __forceinline__ void load_row(const Matrix& m, int64_t i, int K, A (&to)[C]) {
  const int64_t start = i * m.row_stride;
  switch (m.dtype) {
    case Dtype::float32:
      return load_values<C, A, float>(m.data, start, m.col_stride, K, to);
    case Dtype::float64:
      return load_values<C, A, double>(m.data, start, m.col_stride, K, to);
    case Dtype::bfloat16:
      return load_values<C, A, bfloat16>(m.data, start, m.col_stride, K, to);
    default:
      return load_values<C, A, float16>(m.data, start, m.col_stride, K, to);
  }
}

// to[k] of a k known only now.
template <int C, class A>
__device__ __forceinline__ A element_of(const A (&values)[C], int k) {
  A found = values[0];
#pragma unroll
  for (int c = 1; c < C; ++c) found = c == k ? values[c] : found;
  return found;
}

// Exponentials e of the row's K values (0 beyond them), their sum, the largest value and where it
// is.
template <int C, class A>
struct Softmax {
  A e[C], maximum, total;
  int first;

  __device__ __forceinline__ Softmax(const A (&x)[C], int K, A inverse_temperature)
      : maximum(x[0]), total(A(0)), first(0) {
#pragma unroll
    for (int k = 1; k < C; ++k) {
      first = x[k] > maximum ? k : first;
      maximum = x[k] > maximum ? x[k] : maximum;
    }
#pragma unroll
    for (int k = 0; k < C; ++k) {
      e[k] = k < K ? fast_exp((x[k] - maximum) * inverse_temperature) : A(0);
      total += e[k];
    }
  }
};

// The first source from j on that has a weight; S where there is none.
template <class A>
__device__ __forceinline__ int next_active(const DistillationArguments& d, const A* weights,
                                           int j) {
  while (j < d.S && weights[j] == A(0)) ++j;
  return j;
}

template <int C, class A>
__device__ __forceinline__ void load_source(const DistillationArguments& d, int j, int64_t i,
                                            A (&to)[C]) {
  const Source& s = d.sources[j];
  load_row(Matrix{s.data, s.row_stride, s.col_stride, d.dtypes[j]}, i, static_cast<int>(d.K), to);
}

// s: the row's logits. Of the sources the next one is on its way while one is worked on.
template <int C, class A>
__device__ __forceinline__ void thread_row(const DistillationArguments& d,
                                           const Factors<A>& factors, int64_t i, int y,
                                           const A (&s)[C], const A* weights, double& ce,
                                           double& kl) {
  const int K = static_cast<int>(d.K);
  const bool reverse = d.direction == Direction::reverse;
  const A temperature = static_cast<A>(d.temperature), inverse_temperature = A(1) / temperature;
  A p[C], slope[C], next[C] = {}, divergence = A(0), mean = A(0);
  int j = next_active(d, weights, 0);
  const bool any = j < d.S;
  if (any) load_source(d, j, i, next);
  const Softmax<C, A> student(s, K, inverse_temperature);
#pragma unroll
  for (int k = 0; k < C; ++k) {
    p[k] = student.e[k] * (A(1) / student.total);
    slope[k] = A(0);
  }
  while (j < d.S) {
    A t[C];
#pragma unroll
    for (int k = 0; k < C; ++k) t[k] = next[k];
    const A weight = weights[j];
    j = next_active(d, weights, j + 1);
    if (j < d.S) load_source(d, j, i, next);
    const Softmax<C, A> source(t, K, inverse_temperature);
    const A anchor = reverse ? element_of(t, student.first) : element_of(s, source.first);
    const Ratio<A> ratio = ratio_of(reverse, weight, student.maximum, student.total, source.maximum,
                                    source.total, anchor, inverse_temperature);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if (k < K) {
        add_source(reverse, ratio, s[k], t[k], p[k], inverse_temperature, slope[k], divergence);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < C; ++k) mean += !reverse ? slope[k] : (p[k] == A(0) ? A(0) : p[k] * slope[k]);
  A e[C], loss = A(0), others = A(0), true_exp = A(0);
  const bool labelled = d.labels.data != nullptr, with_kl = any && factors.kl != A(0);
  if (labelled) {
#pragma unroll
    for (int k = 0; k < C; ++k) {
      e[k] = k < K ? plain_exp(s[k] - student.maximum, student.e[k], temperature) : A(0);
      true_exp = k == y ? e[k] : true_exp;
      others += k == y ? A(0) : e[k];
    }
    loss = cross_entropy(student.maximum, element_of(s, y), true_exp, others);
  }
  if (d.grad != nullptr) {
    const A inverse = A(1) / (true_exp + others);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      if (k >= K) continue;
      A grad = with_kl ? factors.kl * centred_slope(reverse, p[k], slope[k], mean) : A(0);
      if (labelled) grad += factors.ce * ((k == y ? -others : e[k]) * inverse);
      store_element(d.grad, i * d.K + k, d.grad_dtype, grad);
    }
  }
  if (d.row_kl != nullptr) static_cast<A*>(d.row_kl)[i] = divergence;
  ce += static_cast<double>(loss);
  kl += static_cast<double>(divergence);
}

template <class A>
__device__ __forceinline__ void ignore_row(const DistillationArguments& d, int64_t i) {
  if (d.row_kl != nullptr) static_cast<A*>(d.row_kl)[i] = A(0);
  for (int64_t k = 0; d.grad != nullptr && k < d.K; ++k) {
    store_element(d.grad, i * d.K + k, d.grad_dtype, A(0));
  }
}

template <class A, int C>
__global__ void __launch_bounds__(kRowThreads, sizeof(A) == 4 ? 4 : 2)
    thread_rows_kernel(const __grid_constant__ DistillationArguments d) {
  await_previous();
  let_next_begin();
  __shared__ A weights[kMostSources];
  for (int j = static_cast<int>(threadIdx.x); j < d.S; j += kRowThreads) {
    weights[j] = source_weight<A>(d, j);
  }
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  A s[C] = {};
  if (i < d.N) load_row(d.logits, i, static_cast<int>(d.K), s);  // arrives while rows are counted
  const double rows = rows_of_all(d);
  const Factors<A> factors = factors_of<A>(d, rows);
  double ce = 0.0, kl = 0.0;
  while (i < d.N) {
    const int y = class_of(d.labels, i, d.K);
    if (y < 0) {
      ignore_row<A>(d, i);
    } else {
      thread_row<C>(d, factors, i, y, s, weights, ce, kl);
    }
    i += step;
    if (i < d.N) load_row(d.logits, i, static_cast<int>(d.K), s);
  }
  combine_blocks<A>(d, rows, ce, kl);
}

// ---- a lane a class ----

template <class A, int G>
__global__ void __launch_bounds__(kThreads, 2)
    short_rows_kernel(const __grid_constant__ DistillationArguments d) {
  await_previous();
  let_next_begin();
  __shared__ A weights[kMostSources];
  for (int j = static_cast<int>(threadIdx.x); j < d.S; j += kThreads) {
    weights[j] = source_weight<A>(d, j);
  }
  __syncthreads();
  const double rows = rows_of_all(d);
  const Factors<A> factors = factors_of<A>(d, rows);
  constexpr int kRows = kThreads / G;
  double ce = 0.0, kl = 0.0;
  // All lanes of a warp go through the loop together: they meet in its shuffles.
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < d.N; first += step) {
    const int64_t i = first + threadIdx.x / G;
    const int y = i < d.N ? class_of(d.labels, i, d.K) : -1;
    row<G>(d, factors, i, y, weights, ce, kl);
  }
  combine_blocks<A>(d, rows, ce, kl);
}

template <class A>
void start(const DistillationArguments& d, unsigned blocks, Stream stream) {
  if (d.K <= 2) return launch_early<thread_rows_kernel<A, 2>>(blocks, kRowThreads, 0, stream, d);
  if (d.K <= 4) return launch_early<thread_rows_kernel<A, 4>>(blocks, kRowThreads, 0, stream, d);
  if (d.K <= 8) return launch_early<thread_rows_kernel<A, 8>>(blocks, kRowThreads, 0, stream, d);
  if (d.K <= 16) return launch_early<short_rows_kernel<A, 16>>(blocks, kThreads, 0, stream, d);
  launch_early<short_rows_kernel<A, 32>>(blocks, kThreads, 0, stream, d);
}

}  // namespace

void distill_short_rows(const DistillationArguments& d, bool wide, unsigned blocks, Stream stream) {
  wide ? start<double>(d, blocks, stream) : start<float>(d, blocks, stream);
}

}  // namespace cuda
}  // namespace pycdgkd
