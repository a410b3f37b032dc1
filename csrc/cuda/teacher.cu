// Eqs. 2-6, forward: the distance softmax of every modality and the cross-entropy in one launch,
// whose last block combines what all blocks found.
#include "teacher_rows.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

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
  return sum_lanes(sums);
}

// Cross-entropy of up to 8 logits, a lane a row; the residual stays without its factor.
template <class A>
__device__ __forceinline__ Sums short_cross_entropy_rows(const Arguments& a) {
  Sums sums;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.N; i += step) {
    const int y = class_of(a.labels, i, a.K);
    if (y < 0) {
      zero_residual<A>(a.logits_residual, i, a.K);
      continue;
    }
    A logit[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int64_t at = i * a.logits.row_stride + k * a.logits.col_stride;
      logit[k] = k < a.K ? load_element<A>(a.logits.data, at, a.logits.dtype) : -infinity<A>();
    }
    const RowSoftmax<A, 8> row(logit, a.K, y);
    row.leave_residual(a.logits_residual, i, a.K);
    sums.loss += static_cast<double>(row.loss);
    sums.rows += 1.0;
  }
  return sum_lanes(sums);
}

// The same of more, a warp a row.
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

template <class A, int C, int R>
__device__ __forceinline__ Sums prototype_rows(const Arguments& a, const Part& part,
                                               void* centred) {
  const Modality& m = part.modality;
  const Centred<A> p(centred, m.D, a.K);
  if (a.in_shared) {
    centre_by_block(m.prototypes, a.counts, m.D, a.K, static_cast<A>(a.scale), p);
    if (blockIdx.x == 0 && m.centred != nullptr) {
      copy_out(p.mean, m.centred, centred_size(m.D, a.K));
    }
  }
  if constexpr (C <= 8) {
    return lane_rows<A, C, R>(a, part, p);
  } else {
    return warp_rows<A, C, R>(a, part, p);
  }
}

// Blocks of a multiprocessor: what the registers of C products allow.
template <class A>
constexpr int resident_blocks(int64_t C) {
  return C * static_cast<int64_t>(sizeof(A)) <= 16 ? 2 : 1;
}

// C products a row, R rows a warp; C = 0: rows of many classes, which are finished already.
template <class A, int C, int R>
__global__ void __launch_bounds__(kThreads, resident_blocks<A>(C))
    teacher_kernel(const __grid_constant__ Arguments a) {
  const int part = a.first_part + static_cast<int>(blockIdx.y);
  Sums sums;
  if (part == 0) {
    sums = a.K <= 8 ? short_cross_entropy_rows<A>(a) : cross_entropy_rows<A>(a);
  } else {
    const Part& mine = a.parts[blockIdx.y - (a.first_part == 0 ? 1 : 0)];
    if constexpr (C == 0) {
      sums = finished_rows<A>(a, mine.modality);
    } else {
      // Two copies where it pays, so that the one knows its loads to be of shared memory.
      if (C == 1 && R > 1 && a.in_shared) {
        sums = prototype_rows<A, C, R>(a, mine, dynamic_shared());
      } else {
        sums = prototype_rows<A, C, R>(a, mine,
                                       a.in_shared ? dynamic_shared() : mine.modality.centred);
      }
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

template <class A>
void start(const Arguments& a, bool few_rows, dim3 grid, size_t shared, Stream stream) {
  if (a.K > kFewClasses || a.M == 0) return start<A, 0, 1>(a, grid, shared, stream);
  if (a.K > 16) {
    return few_rows ? start<A, 32, 1>(a, grid, shared, stream)
                    : start<A, 32, 8 / sizeof(A)>(a, grid, shared, stream);
  }
  if (a.K > 8) {
    return few_rows ? start<A, 16, 1>(a, grid, shared, stream)
                    : start<A, 16, 16 / sizeof(A)>(a, grid, shared, stream);
  }
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

// Few rows are spread over as many warps as there are; of many, a warp takes `groups` times four.
struct Rows {
  unsigned blocks;
  bool few;
  int groups;
};

Rows rows_of(const Teacher& t) {
  const int64_t multiprocessors = device_limits().multiprocessors;
  if (t.K > kFewClasses || t.M == 0) {
    return {blocks_for(t.N, kThreads, 4 * multiprocessors), true, 1};
  }
  const int64_t C = t.K == 2 ? 1 : (t.K > 4 ? 8 : 4);
  const int resident = t.wide ? resident_blocks<double>(C) : resident_blocks<float>(C);
  const int64_t blocks = (resident > 1 ? resident : 4) * multiprocessors;
  const bool few = t.N <= blocks * kWarps, many = t.N >= 2 * 4 * blocks * kWarps;
  return {blocks_for(t.N, few ? kWarps : 4 * kWarps, blocks), few, many ? 2 : 1};
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
  size_t centring = 0;
  for (int64_t m = 0; m < t.M; ++m) {
    const size_t bytes = centre_bytes(t.modalities[m].D, t.K);
    centring = bytes > centring ? bytes : centring;
  }
  return partial_bytes(t, rows_of(t).blocks) + centring;
}

void modality_weights(const Values& rates, int64_t M, bool wide, void* weights, Stream stream) {
  if (wide) {
    launch<weights_kernel<double>>(1, 32, 0, stream, rates, M, weights);
  } else {
    launch<weights_kernel<float>>(1, 32, 0, stream, rates, M, weights);
  }
}

void teacher(const Teacher& t, void* workspace, Stream stream) {
  const auto [blocks, few_rows, groups] = rows_of(t);
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
              groups,
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
