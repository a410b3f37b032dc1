// Eq. 9 for longer rows whose 16-byte vectors are aligned: a cluster of blocks holds one row of the
// student and of every active source in shared memory, so that each logit is read from memory once.
// The row after it is announced to the L2 cache meanwhile, and asked for as its places fall free.
//
// The blocks meet twice a row: for the maxima, and for the sums of exponentials with the mean
// slope, from which value and gradient follow. Where the value would cancel (student and sources
// all but equal) or logits are infinite, the row is read once more.
#include <algorithm>
#include <tuple>

#include "answers.h"
#include "cluster_rows.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

// All rows, with room for the active sources in S slots.
template <class T, int S, int R, bool reverse>
__device__ __forceinline__ void work_rows(const DistillationArguments& d) {
  auto& shared = *reinterpret_cast<Shared<S, reverse>*>(dynamic_shared());
  ClusterRows<T, S, R, reverse> cluster(d, shared);
  const double rows = rows_of_all(d);
  if (threadIdx.x == 0) {
    shared.ce = shared.kl = 0.0;
    shared.rows = rows;
    shared.factors_of_rows = factors_of<float>(d, rows);
  }
  cluster.work();
  if (cluster_rank() != 0) return;
  __syncthreads();
  const int64_t chunks = (d.N + d.chunk - 1) / d.chunk;
  combine_partials<float>(d, shared.rows, gridDim.x / cluster_size(),
                          static_cast<unsigned>(chunks));
}

__device__ __forceinline__ int active_sources(const DistillationArguments& d) {
  int count = 0;
#pragma unroll 1
  for (int j = 0; j < d.S; ++j) count += source_weight<float>(d, j) != 0.0f ? 1 : 0;
  return count;
}

// Of the smallest kernel three blocks of 256 threads fit a multiprocessor's registers. Only the
// device knows how many of the sources are active: what a row costs beside its classes grows with
// the slots.
template <class T, int S, int R, bool reverse>
__global__ void __launch_bounds__(S == 3 ? 768 : kWarps * 32, 1)
    cluster_rows_kernel(const __grid_constant__ DistillationArguments d) {
  await_previous();
  if constexpr (S > kFewSlots) {
    if (active_sources(d) <= kFewSlots) return work_rows<T, kFewSlots, R, reverse>(d);
  }
  work_rows<T, S, R, reverse>(d);
}

struct Shape {
  unsigned size, threads;  // of a cluster in blocks, of a block
};

// The smallest cluster that holds a row of `vectors`; size 0: none does. Of 256 threads several
// blocks fit a multiprocessor, so that one computes while another waits.
Shape shape_of(int64_t vectors, int R, unsigned most_blocks) {
  const int64_t needed = (vectors + R - 1) / R, most = most_cluster_threads();
  for (const int64_t threads : {most / 2, most}) {
    for (unsigned size = 1; size <= most_blocks; size *= 2) {
      if (size * threads < needed) continue;
      return {size, static_cast<unsigned>(size > 1 ? threads : (needed + 31) / 32 * 32)};
    }
  }
  return {0, 0};
}

template <auto kernel>
unsigned most_blocks_of_device() {
  static Answers<int, unsigned> known;
  return known.of(current_device(), [] { return most_cluster_blocks<kernel>(); });
}

template <auto kernel>
unsigned resident(const Shape& shape, size_t shared_bytes) {
  static Answers<std::tuple<int, unsigned, unsigned, size_t>, unsigned> known;
  return known.of({current_device(), shape.size, shape.threads, shared_bytes}, [&] {
    return resident_clusters<kernel>(shape.size, shape.threads, shared_bytes);
  });
}

template <class T, int S, int R, bool reverse>
bool start(DistillationArguments d, Stream stream) {
  constexpr auto kernel = cluster_rows_kernel<T, S, R, reverse>;
  const Shape shape = shape_of(d.K / kVector<T>, R, most_blocks_of_device<kernel>());
  // Of a vector's classes, slopes and distances take the places of logits: 4 rows of 16 bits, or 2.
  static_assert((S + 1) * sizeof(T) >= 8);
  const size_t staged = static_cast<size_t>(S + 1) * R * shape.threads * sizeof(uint4);
  const size_t shared_bytes = sizeof(Shared<S, reverse>) + staged;
  if (shape.size == 0 || shared_bytes > device_limits().shared_bytes) return false;
  const unsigned most = resident<kernel>(shape, shared_bytes);
  if (most == 0) return false;
  const unsigned clusters = blocks_for(d.N, 1, most);
  // Small enough that all are done at about the same time.
  d.chunk = blocks_for(d.N, std::min<int64_t>(128 * clusters, kMostChunks), INT32_MAX);
  launch_clusters<kernel>(clusters, shape.size, shape.threads, shared_bytes, stream, d);
  return true;
}

template <class T>
bool start(const DistillationArguments& d, Stream stream) {
  const bool reverse = d.direction == Direction::reverse;
  if (d.S <= 3) {
    return reverse ? start<T, 3, 4, true>(d, stream) : start<T, 3, 4, false>(d, stream);
  }
  return reverse ? start<T, kMostSlots, 2, true>(d, stream)
                 : start<T, kMostSlots, 2, false>(d, stream);
}

}  // namespace

bool distill_cluster_rows(const DistillationArguments& d, Stream stream) {
  if (d.S > kMostSlots || !all_rows(d, [&](const Matrix& m) {
        return m.dtype == d.logits.dtype && has_vector_rows(m);
      })) {
    return false;
  }
  if (d.K * element_size(d.logits.dtype) % 16 != 0) return false;
  switch (d.logits.dtype) {
    case Dtype::float32:
      return start<float>(d, stream);
    case Dtype::bfloat16:
      return start<bfloat16>(d, stream);
    case Dtype::float16:
      return start<float16>(d, stream);
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace pycdgkd
