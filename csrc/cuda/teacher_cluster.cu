// Eqs. 1-6 of a small batch in one launch of one cluster of blocks, the gradients for grad_loss = 1
// among the results: at the paper's size a launch costs more than all arithmetic.
#include <algorithm>

#include "answers.h"
#include "teacher_cluster_steps.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

template <class A>
__global__ void __launch_bounds__(kMostThreads, 1)
    teacher_cluster_kernel(const __grid_constant__ Arguments a) {
  await_previous();
  let_next_begin();
  ask_for_rows<A>(a);
  const int64_t given = read_operands<A>(a);
  __syncthreads();
  cluster_barrier(false);  // from here on every block of the cluster is there to be written to
  const int last_warp = static_cast<int>(blockDim.x) / 32 - 1;
  if (warp_id() == last_warp) count_batch<A>(a, given);
  await_copies();
  __syncthreads();
  const Batch<A>& batch = *shared<Batch<A>>(a.at.batch);
  if (a.batch_means) {
    a.K <= 2 ? add_classes<2, A>(a) : add_classes<8, A>(a);
    __syncthreads();
  }
  centre_columns<A>(a, batch);
  cross_entropy_rows<A>(a, batch);
  __syncthreads();
  a.C == 1 ? give_products<1, A>(a) : give_products<4, A>(a);
  give_norms<A>(a);
  cluster_barrier(true);  // products and norms
  prototype_rows<A>(a, batch.active);
  cluster_barrier(true);  // residuals, rates and losses; no block writes to another any more
  give_logits_gradient<A>(a);
  add_rows<A>(a);
  __syncthreads();
  const double largest = largest_rate(a);
  if (cluster_rank() == 0 && warp_id() == last_warp) give_results<A>(a, batch, largest);
  give_gradients<A>(a, batch.factor, largest);
}

// The largest cluster that a device runs with all the shared memory of its multiprocessors. Of
// size 1: it runs none.
struct Cluster {
  unsigned size, threads;
  size_t shared_bytes;
};

template <auto kernel>
Cluster cluster_of_device() {
  static Answers<int, Cluster> known;
  return known.of(current_device(), [] {
    Cluster cluster{most_cluster_blocks<kernel>(), most_cluster_threads(),
                    device_limits().shared_bytes};
    const auto fits = [&] {
      return resident_clusters<kernel>(cluster.size, cluster.threads, cluster.shared_bytes) > 0;
    };
    while (cluster.size > 1 && !fits()) cluster.size /= 2;
    return cluster;
  });
}

int whole(int64_t count, int64_t of) { return static_cast<int>((count + of - 1) / of * of); }

// Arrays one after another, each 16-byte aligned.
struct Room {
  int bytes = 0;
  int take(int64_t size) {
    const int place = bytes;
    bytes += whole(size, 16);
    return place;
  }
};

// Who does what: columns of a block, rows that it owns, chunks of rows for the class sums.
template <class A>
void divide(Arguments& a, int ranks, int threads) {
  constexpr int V = kVector<A>;
  a.columns = 0;
  for (int m = 0; m < a.M; ++m) {
    Part& part = a.parts[m];
    part.W = whole(part.D, V * ranks) / ranks;
    part.first = a.columns;
    a.columns += part.W;
  }
  const int vectors = a.columns / V, fours = (a.N + 3) / 4;
  a.stride = (vectors | 1) * V;
  a.R = (a.N + ranks - 1) / ranks;
  a.C = a.K == 2 ? 1 : a.K;
  for (a.width = 1; a.width < a.K;) a.width *= 2;
  a.wide = std::clamp(vectors, 1, threads);
  a.apart = threads / a.wide;
  const int side = std::max(threads / std::max(a.columns, 1), 1);  // chunks that run side by side
  a.chunk = (fours + side - 1) / side * 4;
  a.chunks = (4 * fours + a.chunk - 1) / a.chunk;
  a.by_wide = Divisor(a.wide);
  a.by_columns = Divisor(a.columns);
  a.by_N = Divisor(a.N);
  a.by_K = Divisor(a.K);
  a.by_M = Divisor(a.M);
  a.by_MK = Divisor(a.M * a.K);
  a.by_R = Divisor(a.R);
}

// Where everything lies; returns the bytes of shared memory of a block.
template <class A>
size_t lay_out(Arguments& a, int ranks, int threads) {
  constexpr int64_t size = sizeof(A);
  const int fours = (a.N + 3) / 4;
  const int64_t N = a.N, K = a.K, M = a.M, columns = a.columns;
  Room room;
  a.at.rows = room.take(4 * fours * a.stride * size);
  a.at.sums = room.take(a.chunks * K * columns * 8);
  // What comes when all blocks are done with these two lies in their place.
  Room again;
  a.at.residuals = again.take(M * N * a.C * size);
  a.at.rates = again.take(M * N * size);
  a.at.losses = again.take(M * N * size);
  room.bytes = std::max(room.bytes, again.bytes);
  a.at.mean = room.take(columns * size);
  a.at.centred = room.take(centred_rows(K) * columns * size);
  a.at.logits = room.take(a.R * K * size);
  a.at.inverse = room.take(K * 8);
  a.at.counted = room.take(threads / 32 * K * 4);
  a.at.batch = room.take(sizeof(Batch<A>));
  a.at.classes = room.take(4 * fours);
  a.at.products = room.take(static_cast<int64_t>(ranks) * a.R * M * a.C * size);
  a.at.norms = room.take(ranks * M * K * size);
  a.at.ce = room.take(N * size);
  a.at.totals = room.take((2 * M + 1) * 8);
  return static_cast<size_t>(room.bytes);
}

template <class A>
bool start(Arguments& a, Stream stream) {
  const Cluster cluster = cluster_of_device<teacher_cluster_kernel<A>>();
  if (cluster.size == 1) return false;
  const int ranks = static_cast<int>(cluster.size), threads = static_cast<int>(cluster.threads);
  divide<A>(a, ranks, threads);
  const size_t bytes = lay_out<A>(a, ranks, threads);
  if (a.columns == 0 || bytes > cluster.shared_bytes) return false;
  launch_clusters<teacher_cluster_kernel<A>>(1, cluster.size, cluster.threads, bytes, stream, a);
  return true;
}

}  // namespace

bool small_teacher(const SmallTeacher& t, Stream stream) {
  if (t.N == 0) return false;
  Arguments a{};
  a.N = static_cast<int>(t.N);
  a.K = static_cast<int>(t.K);
  a.M = static_cast<int>(t.M);
  a.scale = t.scale;
  a.proto_weight = t.proto_weight;
  a.batch_means = t.batch_means;
  a.logits = t.logits;
  a.grad_logits = t.grad_logits;
  a.labels = t.labels;
  a.counts = t.counts;
  a.results = t.results;
  for (int m = 0; m < a.M; ++m) {
    const SmallModality& from = t.modalities[m];
    Part& part = a.parts[m];
    part.D = static_cast<int>(from.D);
    part.vectors = has_vector_rows(from.features);
    part.grad_vectors =
        is_aligned(from.grad, 16) && from.D * element_size(from.features.dtype) % 16 == 0;
    part.features = from.features;
    part.prototypes = from.prototypes;
    part.grad = from.grad;
  }
  return t.wide ? start<double>(a, stream) : start<float>(a, stream);
}

}  // namespace cuda
}  // namespace pycdgkd
