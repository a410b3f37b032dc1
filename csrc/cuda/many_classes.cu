// Eqs. 2-4 for many classes: what lies around the products with all prototypes, which come from a
// matrix product, a block of rows at a time.
#include "centred.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 256;

constexpr int64_t kChunk = 256;  // prototypes of a block

struct CentreArguments {
  Centre c;
  double* sums;  // (chunks, D + 1): of the active prototypes, and how many they are
};

int64_t chunks_of(int64_t K) { return (K + kChunk - 1) / kChunk; }

// Sums of a chunk of prototypes, a column a thread; column D counts.
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const __grid_constant__ CentreArguments a) {
  const Centre& c = a.c;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column > c.D) return;
  const int64_t begin = blockIdx.y * kChunk;
  const int64_t end = begin + kChunk < c.K ? begin + kChunk : c.K;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) {
    if (!is_active(c.counts, k)) continue;
    sum += column == c.D ? 1.0
                         : load_element<double>(
                               c.prototypes.data,
                               k * c.prototypes.row_stride + column * c.prototypes.col_stride,
                               c.prototypes.dtype);
  }
  a.sums[blockIdx.y * (c.D + 1) + column] = sum;
}

// A chunk's rows less the mean of all.
template <class A>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(const __grid_constant__ CentreArguments a) {
  const Centre& c = a.c;
  const Centred<A> out(c.centred, c.D, c.K);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= out.stride) return;
  double sum = 0.0, active = 0.0;
  for (unsigned chunk = 0; column < c.D && chunk < gridDim.y; ++chunk) {
    sum += a.sums[chunk * (c.D + 1) + column];
    active += a.sums[chunk * (c.D + 1) + c.D];
  }
  const A mean = active > 0.0 ? static_cast<A>(sum / active) : A(0);
  const int64_t begin = blockIdx.y * kChunk;
  const int64_t end = begin + kChunk < c.K ? begin + kChunk : c.K;
  if (begin == 0) out.mean[column] = mean;
#pragma unroll 4
  for (int64_t k = begin; k < end; ++k) {
    out.rows[k * out.stride + column] =
        centred_element(c.prototypes, c.counts, c.D, k, column, mean);
  }
  if (c.K == 2) {
    out.rows[2 * out.stride + column] = out.rows[column] - out.rows[out.stride + column];
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) bias_kernel(const __grid_constant__ Centre c) {
  const Centred<A> out(c.centred, c.D, c.K);
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id(); k < padded(c.K);
       k += step) {
    if (k < c.K) {
      centred_bias(c.counts, k, static_cast<A>(c.scale), out);
    } else if (lane_id() == 0) {
      out.bias[k] = A(0);
    }
  }
}

template <class A>
void centre(const Centre& c, double* sums, Stream stream) {
  const int64_t most = 16 * device_limits().multiprocessors;
  const auto chunks = static_cast<unsigned>(chunks_of(c.K));
  const auto sum_tiles = static_cast<unsigned>((c.D + kThreads) / kThreads);
  const auto tiles = static_cast<unsigned>((padded(c.D) + kThreads - 1) / kThreads);
  const CentreArguments a{c, sums};
  launch<column_sums_kernel>(dim3(sum_tiles, chunks), kThreads, 0, stream, a);
  if (tiles > 0) launch<columns_kernel<A>>(dim3(tiles, chunks), kThreads, 0, stream, a);
  launch<bias_kernel<A>>(blocks_for(padded(c.K), kThreads / 32, most), kThreads, 0, stream, c);
}

__device__ __forceinline__ int active_class_of(const Labels& labels, const ClassCounts& counts,
                                               int64_t i, int64_t K) {
  const int y = class_of(labels, i, K);
  return y >= 0 && is_active(counts, y) ? y : -1;
}

struct CountRows {
  int64_t N, K;
  Labels labels;
  ClassCounts counts;
  double* rows;
};

__global__ void __launch_bounds__(1024) count_kernel(const __grid_constant__ CountRows c) {
  double rows = 0.0;
  for (int64_t i = threadIdx.x; i < c.N; i += blockDim.x) {
    rows += active_class_of(c.labels, c.counts, i, c.K) >= 0 ? 1.0 : 0.0;
  }
  rows = block_sum(rows);
  if (threadIdx.x == 0) *c.rows = rows;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    centre_rows_kernel(const __grid_constant__ CentreRows c) {
  const int64_t step = gridDim.x;
  for (int64_t r = blockIdx.x; r < c.N; r += step) {
    const bool on = active_class_of(c.labels, c.counts, c.first + r, c.K) >= 0;
    for (int64_t d = threadIdx.x; d < c.D; d += kThreads) {
      A value = A(0);  // 0 times what an ignored row may hold is not always 0
      if (on) {
        value = load_element<A>(c.features.data,
                                (c.first + r) * c.features.row_stride + d * c.features.col_stride,
                                c.features.dtype) -
                static_cast<const A*>(c.mean)[d];
      }
      static_cast<A*>(c.rows)[r * c.D + d] = value;
    }
  }
}

// A row's largest value and the sum of e^(a - largest) of all classes but the true one, found in
// one pass: what was summed under a smaller maximum is brought to the new one.
template <class A>
struct Softmax {
  A maximum;
  double others;
};

template <class A>
__device__ __forceinline__ void merge(Softmax<A>& s, A maximum, double others) {
  if (maximum > s.maximum) {
    s.others *= static_cast<double>(exp_nonpositive(s.maximum - maximum));
    s.maximum = maximum;
  } else if (maximum < s.maximum) {
    others *= static_cast<double>(exp_nonpositive(maximum - s.maximum));
  }
  s.others += others;
}

template <class A>
__device__ __forceinline__ Softmax<A> row_softmax(const A* x, const A* bias, A twice, int64_t K,
                                                  int y) {
  __shared__ Softmax<A> warps[kThreads / 32];
  Softmax<A> s{-infinity<A>(), 0.0};
  bool nan = false;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const A a = twice * x[k] + bias[k];
    nan = nan || a != a;
    if (a == -infinity<A>()) continue;
    if (a > s.maximum) {
      s.others *= static_cast<double>(exp_nonpositive(s.maximum - a));
      s.maximum = a;
    }
    if (k != y) s.others += static_cast<double>(exp_nonpositive(a - s.maximum));
  }
  if (nan) s.others = static_cast<double>(infinity<A>() - infinity<A>());
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) {
    const A maximum = __shfl_xor_sync(kAllLanes, s.maximum, bits);
    const double others = __shfl_xor_sync(kAllLanes, s.others, bits);
    merge(s, maximum, others);
  }
  __syncthreads();  // what an earlier row left has been read
  if (lane_id() == 0) warps[warp_id()] = s;
  __syncthreads();
  Softmax<A> all = warps[0];
  for (int w = 1; w < kThreads / 32; ++w) merge(all, warps[w].maximum, warps[w].others);
  return all;
}

// A block a row. The true class is left out of the sum of the others, and its residual is their
// complement: p - 1 would cancel.
template <class A>
__global__ void __launch_bounds__(kThreads)
    softmax_rows_kernel(const __grid_constant__ SoftmaxRows s) {
  const A* bias = static_cast<const A*>(s.bias);
  const A twice = static_cast<A>(2.0 * s.scale);
  const bool by_row = s.factor.by_row.data != nullptr;
  double common = s.factor.constant * (s.factor.one != nullptr ? *s.factor.one : 1.0);
  if (by_row && s.factor.by_row.stride == 0) common *= value_at<double>(s.factor.by_row, 0);
  if (s.rows != nullptr) common /= *s.rows > 1.0 ? *s.rows : 1.0;
  const int64_t step = gridDim.x;
  for (int64_t r = blockIdx.x; r < s.N; r += step) {
    const int64_t i = s.first + r;
    const int y = active_class_of(s.labels, s.counts, i, s.K);
    A* x = static_cast<A*>(s.products) + r * s.K;
    A loss = A(0), true_prob = A(0), maximum = A(0), inverse = A(0);
    A factor = static_cast<A>(common);
    if (by_row && s.factor.by_row.stride != 0) factor *= value_at<A>(s.factor.by_row, i);
    if (y < 0) factor = A(0);
    A true_residual = A(0);
    if (y >= 0) {
      const Softmax<A> sums = row_softmax(x, bias, twice, s.K, y);
      maximum = sums.maximum;
      const A true_logit = twice * x[y] + bias[y];
      const A true_exp = exp_nonpositive(true_logit - maximum);
      const double total = sums.others + static_cast<double>(true_exp);
      inverse = static_cast<A>(1.0 / total);
      true_residual = static_cast<A>(-sums.others / total);
      loss = cross_entropy(maximum, true_logit, true_exp, static_cast<A>(sums.others));
      true_prob = static_cast<A>(static_cast<double>(true_exp) / total);
    }
    if (threadIdx.x == 0) {
      if (s.row_loss != nullptr) static_cast<A*>(s.row_loss)[i] = loss;
      if (s.true_prob != nullptr) static_cast<A*>(s.true_prob)[i] = true_prob;
    }
    if (!s.need_grad) continue;
    __syncthreads();  // the true class's product has been read by all
    for (int64_t k = threadIdx.x; k < s.K; k += kThreads) {
      const A a = twice * x[k] + bias[k];
      const A residual = k == y ? true_residual : exp_nonpositive(a - maximum) * inverse;
      x[k] = factor == A(0) ? A(0) : factor * residual;
    }
  }
}

// A block takes 32 classes; its threads share out the rows, in the same order always.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_prototypes_kernel(const __grid_constant__ AddPrototypes t) {
  __shared__ double parts[kThreads / 32][32];
  const int64_t k = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
  double sum = 0.0;
  for (int64_t i = warp_id(); k < t.K && i < t.N; i += kThreads / 32) {
    sum += static_cast<double>(static_cast<const A*>(t.residual)[i * t.K + k]);
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  for (int c = warp_id(); c < 32; c += kThreads / 32) {
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + c;
    if (mine >= t.K) continue;
    double total = 0.0;
    for (int w = 0; w < kThreads / 32; ++w) total += parts[w][c];
    const A* row = static_cast<const A*>(t.rows) + mine * padded(t.D);
    const A* product = static_cast<const A*>(t.product) + mine * t.D;
    A* grad = static_cast<A*>(t.grad) + mine * t.D;
    for (int64_t d = lane_id(); d < t.D; d += 32) {
      // A class without any residual takes nothing of its row, whatever that holds.
      const double taken = total == 0.0 ? 0.0 : total * static_cast<double>(row[d]);
      grad[d] =
          (t.first ? A(0) : grad[d]) + static_cast<A>(static_cast<double>(product[d]) - taken);
    }
  }
}

}  // namespace

size_t centre_bytes(int64_t D, int64_t K) {
  return static_cast<size_t>(chunks_of(K) * (D + 1)) * sizeof(double);
}

void centre_prototypes(const Centre& c, void* workspace, Stream stream) {
  auto* sums = static_cast<double*>(workspace);
  c.wide ? centre<double>(c, sums, stream) : centre<float>(c, sums, stream);
}

void count_rows(int64_t N, int64_t K, const Labels& labels, const ClassCounts& counts, double* rows,
                Stream stream) {
  launch<count_kernel>(1, 1024, 0, stream, CountRows{N, K, labels, counts, rows});
}

void centre_rows(const CentreRows& c, Stream stream) {
  if (c.N == 0) return;
  const unsigned blocks = blocks_for(c.N, 1, 32 * device_limits().multiprocessors);
  if (c.wide) {
    launch<centre_rows_kernel<double>>(blocks, kThreads, 0, stream, c);
  } else {
    launch<centre_rows_kernel<float>>(blocks, kThreads, 0, stream, c);
  }
}

void softmax_rows(const SoftmaxRows& s, Stream stream) {
  if (s.N == 0) return;
  const unsigned blocks = blocks_for(s.N, 1, 8 * device_limits().multiprocessors);
  if (s.wide) {
    launch<softmax_rows_kernel<double>>(blocks, kThreads, 0, stream, s);
  } else {
    launch<softmax_rows_kernel<float>>(blocks, kThreads, 0, stream, s);
  }
}

void add_prototypes(const AddPrototypes& t, Stream stream) {
  const auto blocks = static_cast<unsigned>((t.K + 31) / 32);
  if (t.wide) {
    launch<add_prototypes_kernel<double>>(blocks, kThreads, 0, stream, t);
  } else {
    launch<add_prototypes_kernel<float>>(blocks, kThreads, 0, stream, t);
  }
}

}  // namespace cuda
}  // namespace pycdgkd
