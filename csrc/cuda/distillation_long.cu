// Eq. 9 for longer rows: a block works on one row at a time. A pass over the student and one over
// each active source find their softmaxes; the last pass writes the gradient. What the first passes
// read stays in shared memory for the last, as far as there is room; beyond, the rows of all blocks
// together are few enough to be read again from the L2 cache.
#include "distillation.cuh"
#include "readers.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kMostThreads = 512;

// The largest value, where it is first, and two sums of exponentials less it.
template <class A>
struct Peak {
  A maximum;
  int64_t at;
  double total, others, slope;
};

// All of a block's: the sums brought to the common maximum.
template <class A>
__device__ __forceinline__ Peak<A> block_peak(Peak<A> mine, A inverse_temperature) {
  __shared__ A maxima[kMostThreads / 32];
  __shared__ long long places[kMostThreads / 32];
  A maximum = mine.maximum;
  long long at = mine.at;
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) {
    const A other = __shfl_xor_sync(kAllLanes, maximum, bits);
    const long long place = __shfl_xor_sync(kAllLanes, at, bits);
    const bool better = other > maximum || (other == maximum && place < at);
    maximum = better ? other : maximum;
    at = better ? place : at;
  }
  __syncthreads();  // what an earlier call left has been read
  if (lane_id() == 0) {
    maxima[warp_id()] = maximum;
    places[warp_id()] = at;
  }
  __syncthreads();
  maximum = maxima[0];
  at = places[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) {
    const bool better = maxima[w] > maximum || (maxima[w] == maximum && places[w] < at);
    maximum = better ? maxima[w] : maximum;
    at = better ? places[w] : at;
  }
  // A thread whose values are all -inf has added nothing.
  const A less = mine.maximum == maximum ? A(0) : mine.maximum - maximum;
  const double scaled = static_cast<double>(fast_exp(less * inverse_temperature));
  const double plain = static_cast<double>(fast_exp(less));
  const auto part = [](double sum, double factor) { return sum == 0.0 ? 0.0 : sum * factor; };
  return {maximum, at, block_sum(part(mine.total, scaled)), block_sum(part(mine.others, plain)),
          block_sum(mine.slope)};
}

// Shared memory through which the lanes write the gradient together.
template <class A, int V, bool aligned>
constexpr size_t writing_bytes(unsigned threads) {
  return aligned ? 0 : threads * V * sizeof(A);
}

template <class A, class T, bool aligned, bool reverse>
class Row {
  using Read = Reader<A, T, aligned>;
  static constexpr int V = Read::V;

 public:
  __device__ __forceinline__ Row(const DistillationArguments& d, const A* weights, Ratio<A>* ratios,
                                 int64_t i, int y)
      : d_(d),
        weights_(weights),
        ratios_(ratios),
        i_(i),
        y_(y),
        temperature_(static_cast<A>(d.temperature)),
        inverse_temperature_(A(1) / temperature_),
        step_(static_cast<int64_t>(blockDim.x) * V) {}

  // Everything of the row; the sums are the same in all threads.
  __device__ __forceinline__ void work(const Factors<A>& factors, double& ce, double& kl) {
    student_pass();
    const A true_logit = student_element<A>(d_, i_, y_);
    const A true_exp = fast_exp(true_logit - student_.maximum);
    const A others = static_cast<A>(student_.others);
    residual_factor_ = A(1) / (true_exp + others);
    true_residual_ = -others * residual_factor_;
    inverse_total_ = A(1) / static_cast<A>(student_.total);
    any_ = false;
    int slot = 1;
    double mean = 0.0;
    for (int j = 0; j < d_.S; ++j) {
      if (weights_[j] != A(0)) mean += source_pass(j, slot++);
    }
    double divergence = 0.0;
    if (!reverse && any_) {
      // The sum of the slopes is known only after all log-ratios are.
      double sum = 0.0;
      classes([&](int64_t, const A(&)[V], const A(&)[V], const A(&slope)[V], const A(&)[V]) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum += static_cast<double>(slope[v]);
      });
      mean = block_sum(sum);
    }
    const A centre = static_cast<A>(mean);
    double shares = 0.0;
    const bool with_kl = any_ && factors.kl != A(0);
    classes([&](int64_t k, const A(&s)[V], const A(&p)[V], const A(&slope)[V], const A(&share)[V]) {
      A values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        shares += static_cast<double>(share[v]);
        A value = with_kl ? factors.kl * centred_slope(reverse, p[v], slope[v], centre) : A(0);
        if (d_.labels.data != nullptr) {
          const A less = s[v] - student_.maximum;
          const A e = plain_exp(less, fast_exp(less * inverse_temperature_), temperature_);
          value += factors.ce * (k + v == y_ ? true_residual_ : e * residual_factor_);
        }
        values[v] = value;
      }
      if (d_.grad != nullptr) store(k, values);
    });
    divergence = block_sum(shares);
    if (threadIdx.x == 0 && d_.row_kl != nullptr) {
      static_cast<A*>(d_.row_kl)[i_] = static_cast<A>(divergence);
    }
    if (threadIdx.x != 0) return;
    if (d_.labels.data != nullptr) {
      ce += static_cast<double>(cross_entropy(student_.maximum, true_logit, true_exp, others));
    }
    kl += divergence;
  }

 private:
  __device__ __forceinline__ Read student_reader() const {
    return reader_of<A, T, aligned>(d_.logits.data, d_.logits.row_stride, d_.logits.col_stride,
                                    d_.logits.dtype, i_, d_.K);
  }
  __device__ __forceinline__ Read source_reader(int j) const {
    const Source& s = d_.sources[j];
    return reader_of<A, T, aligned>(s.data, s.row_stride, s.col_stride, d_.dtypes[j], i_, d_.K);
  }
  // Shared memory of the student (0) or the slot-th active source; null: there is no room.
  __device__ __forceinline__ char* place(int slot) const {
    if (slot >= d_.rows_staged) return nullptr;
    return dynamic_shared() + writing_bytes<A, V, aligned>(blockDim.x) +
           slot * d_.staged * Read::size;
  }
  // Adds V values to a running peak.
  __device__ __forceinline__ void add(const A (&x)[V], int64_t k, bool student, Peak<A>& peak) {
    A largest = x[0];
    int64_t at = k;
#pragma unroll
    for (int v = 1; v < V; ++v) {
      at = x[v] > largest ? k + v : at;
      largest = x[v] > largest ? x[v] : largest;
    }
    if (largest > peak.maximum) {
      const A less = peak.maximum - largest;
      peak.total *= static_cast<double>(fast_exp(less * inverse_temperature_));
      peak.others *= static_cast<double>(fast_exp(less));
      peak.maximum = largest;
      peak.at = at;
    }
    A total = A(0), others = A(0);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // Nothing larger than -inf so far: no exponential is defined, and each is 0.
      const A less = x[v] == -infinity<A>() ? x[v] : x[v] - peak.maximum;
      const A e = fast_exp(less * inverse_temperature_);
      total += e;
      if (student) others += k + v == y_ ? A(0) : plain_exp(less, e, temperature_);
    }
    peak.total += static_cast<double>(total);
    peak.others += static_cast<double>(others);
  }

  __device__ __forceinline__ void student_pass() {
    Peak<A> peak{-infinity<A>(), d_.K, 0.0, 0.0, 0.0};
    const Read reader = student_reader();
    char* to = place(0);
#pragma unroll 2
    for (int64_t k = static_cast<int64_t>(threadIdx.x) * V; k < d_.K; k += step_) {
      A x[V];
      reader.chunk(k, x);
      if (to != nullptr) reader.keep(to, d_.staged, k, x);
      add(x, k, true, peak);
    }
    student_ = block_peak(peak, inverse_temperature_);
    // All -inf: no distribution.
    if (student_.maximum == -infinity<A>()) student_.total = student_.others = NAN;
    if (student_.at >= d_.K) student_.at = 0;
  }

  // The source's softmax and its Ratio; of the reverse divergence also the sum of p times its
  // slope.
  __device__ __forceinline__ double source_pass(int j, int slot) {
    any_ = true;
    const Read reader = source_reader(j), student = student_reader();
    char* to = place(slot);
    const char* kept = place(0);
    Peak<A> peak{-infinity<A>(), d_.K, 0.0, 0.0, 0.0};
    const A weight = weights_[j];
    A offset = A(0);
    if (reverse) {
      const A gap = student_.maximum - source_element<A>(d_, j, i_, student_.at);
      offset = gap - gap == A(0) ? gap : A(0);
    }
#pragma unroll 2
    for (int64_t k = static_cast<int64_t>(threadIdx.x) * V; k < d_.K; k += step_) {
      A t[V];
      reader.chunk(k, t);
      if (to != nullptr) reader.keep(to, d_.staged, k, t);
      add(t, k, false, peak);
      if (reverse) peak.slope += static_cast<double>(weighted_slope(student, kept, k, t, offset));
    }
    peak = block_peak(peak, inverse_temperature_);
    if (peak.maximum == -infinity<A>()) peak.total = NAN;
    const int64_t at = peak.at < d_.K ? peak.at : 0;
    const A anchor =
        reverse ? source_element<A>(d_, j, i_, student_.at) : student_element<A>(d_, i_, at);
    const Ratio<A> ratio =
        ratio_of(reverse, weight, student_.maximum, static_cast<A>(student_.total), peak.maximum,
                 static_cast<A>(peak.total), anchor, inverse_temperature_);
    if (threadIdx.x == 0) ratios_[j] = ratio;
    __syncthreads();
    return static_cast<double>(weight * inverse_temperature_) * peak.slope;
  }

  // Sum of p (s - t - offset) over a chunk of the source.
  __device__ __forceinline__ A weighted_slope(const Read& student, const char* kept, int64_t k,
                                              const A (&t)[V], A offset) const {
    A s[V], sum = A(0);
    student.again(kept, d_.staged, k, s);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A p = fast_exp((s[v] - student_.maximum) * inverse_temperature_) * inverse_total_;
      sum += p == A(0) ? A(0) : p * shifted_difference(s[v], t[v], offset);
    }
    return sum;
  }

  // body(k, s, p, slope, share) of V classes each, all of this thread; of what lies beyond the row
  // slope and share are 0. A warp's threads call it together.
  template <class Body>
  __device__ __forceinline__ void classes(const Body& body) {
    const Read student = student_reader();
    const char* kept = place(0);
    const int64_t before = lane_id() * V;
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * V - before; first < d_.K;
         first += step_) {
      const int64_t k = first + before;
      if (aligned && k >= d_.K) return;
      A s[V], p[V], slope[V], share[V];
      student.again(kept, d_.staged, k, s);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        p[v] = fast_exp((s[v] - student_.maximum) * inverse_temperature_) * inverse_total_;
        slope[v] = share[v] = A(0);
      }
      int slot = 1;
      for (int j = 0; j < d_.S; ++j) {
        if (weights_[j] == A(0)) continue;
        A t[V];
        source_reader(j).again(place(slot++), d_.staged, k, t);
        const Ratio<A> ratio = ratios_[j];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (!aligned && k + v >= d_.K) continue;
          add_source(reverse, ratio, s[v], t[v], p[v], inverse_temperature_, slope[v], share[v]);
        }
      }
      body(k, s, p, slope, share);
    }
  }

  // Where the rows are not aligned the lanes hand their values to each other, so that neighbours
  // write neighbours.
  __device__ __forceinline__ void store(int64_t k, const A (&values)[V]) const {
    const int64_t row = i_ * d_.K;
    if constexpr (aligned) {
      store_gradient(d_, row + k, values);
    } else {
      A* shared = reinterpret_cast<A*>(dynamic_shared()) + warp_id() * 32 * V;
      store_array(shared + lane_id() * V, values);
      __syncwarp();
      const int64_t first = k - lane_id() * V;
#pragma unroll
      for (int e = lane_id(); e < 32 * V; e += 32) {
        if (first + e < d_.K) store_element(d_.grad, row + first + e, d_.grad_dtype, shared[e]);
      }
      __syncwarp();  // before the next values come
    }
  }

  const DistillationArguments& d_;
  const A* weights_;
  Ratio<A>* ratios_;
  int64_t i_;
  int y_;
  A temperature_, inverse_temperature_;
  int64_t step_;
  Peak<A> student_;
  A residual_factor_, true_residual_, inverse_total_;
  bool any_;
};

template <class A>
__device__ __forceinline__ void ignore_row(const DistillationArguments& d, int64_t i) {
  if (threadIdx.x == 0 && d.row_kl != nullptr) static_cast<A*>(d.row_kl)[i] = A(0);
  if (d.grad == nullptr) return;
  for (int64_t k = threadIdx.x; k < d.K; k += blockDim.x) {
    store_element(d.grad, i * d.K + k, d.grad_dtype, A(0));
  }
}

template <class A, class T, bool aligned, bool reverse>
__global__ void __launch_bounds__(kMostThreads / (sizeof(A) / 4), 1)
    long_rows_kernel(const __grid_constant__ DistillationArguments d) {
  __shared__ A weights[kMostSources];
  __shared__ Ratio<A> ratios[kMostSources];
  for (int j = static_cast<int>(threadIdx.x); j < d.S; j += static_cast<int>(blockDim.x)) {
    weights[j] = source_weight<A>(d, j);
  }
  __syncthreads();
  const double rows = rows_of_all(d);
  const Factors<A> factors = factors_of<A>(d, rows);
  double ce = 0.0, kl = 0.0;
  for (int64_t i = blockIdx.x; i < d.N; i += gridDim.x) {
    const int y = class_of(d.labels, i, d.K);
    if (y < 0) {
      ignore_row<A>(d, i);
      continue;
    }
    Row<A, T, aligned, reverse>(d, weights, ratios, i, y).work(factors, ce, kl);
    __syncthreads();  // before the next row takes the shared memory
  }
  combine_blocks<A>(d, rows, ce, kl);
}

// Makes room for as many whole rows as fit, or of very long ones for the first part of each.
template <class A, class T, bool aligned>
void start(DistillationArguments& d, unsigned blocks, int threads, size_t room, Stream stream) {
  using Read = Reader<A, T, aligned>;
  constexpr int most = kMostThreads / static_cast<int>(sizeof(A) / 4), V = Read::V;
  const auto count = static_cast<unsigned>(threads < most ? threads : most);
  const size_t writing = writing_bytes<A, V, aligned>(count);
  d.rows_staged = d.S + 1;
  const size_t left = room > writing ? room - writing : 0;
  d.staged = static_cast<int64_t>(left) / (d.rows_staged * Read::size) / V * V;
  if (d.staged > d.K) d.staged = (d.K + V - 1) / V * V;
  const size_t shared = writing + static_cast<size_t>(d.rows_staged * d.staged * Read::size);
  if (d.direction == Direction::reverse) {
    launch<long_rows_kernel<A, T, aligned, true>>(blocks, count, shared, stream, d);
  } else {
    launch<long_rows_kernel<A, T, aligned, false>>(blocks, count, shared, stream, d);
  }
}

}  // namespace

void distill_long_rows(const DistillationArguments& given, bool wide, unsigned blocks, int threads,
                       size_t room, Stream stream) {
  DistillationArguments d = given;
  const int64_t width = element_size(d.logits.dtype);
  const bool contiguous = all_rows(d, [&](const Matrix& m) {
    return m.dtype == d.logits.dtype && m.col_stride == 1 && is_aligned(m.data, width);
  });
  const bool aligned = contiguous && d.K * width % 16 == 0 && all_rows(d, &has_vector_rows);
  const auto go = [&](auto* arithmetic, auto* storage) {
    using A = std::remove_pointer_t<decltype(arithmetic)>;
    using T = std::remove_pointer_t<decltype(storage)>;
    aligned ? start<A, T, true>(d, blocks, threads, room, stream)
            : start<A, T, false>(d, blocks, threads, room, stream);
  };
  float* single = nullptr;
  double* full = nullptr;
  if (!contiguous) {
    return wide ? start<double, void, true>(d, blocks, threads, room, stream)
                : start<float, void, true>(d, blocks, threads, room, stream);
  }
  switch (d.logits.dtype) {
    case Dtype::float64:
      return go(full, full);
    case Dtype::float32:
      return go(single, single);
    case Dtype::bfloat16:
      return go(single, static_cast<bfloat16*>(nullptr));
    default:
      return go(single, static_cast<float16*>(nullptr));
  }
}

}  // namespace cuda
}  // namespace pycdgkd
