// A cluster's row in shared memory, and the blocks' first meeting: for the maxima.
#pragma once

#include "cluster_shared.cuh"

namespace pycdgkd {
namespace cuda {

// S: slots for active sources. R: vectors of each row that a thread holds.
template <class T, int S, int R, bool reverse>
class HeldRow {
 public:
  static constexpr int V = kVector<T>;
  static_assert(R * V <= 32, "tell_anchors: a lane an element");
  static constexpr int W = kPart, parts = V / W;
  // Of the S + 1 places of a vector those that the gradient needs: reverse, distances and slopes in
  // place of the logits.
  static constexpr int kKept = reverse ? 2 * parts : S + 1;
  // Where the others are many, the next row is asked for as soon as they are free; a single one is
  // not worth it.
  static constexpr bool kEarly = 2 * kKept <= S + 1;
  using Common = Shared<S, reverse>;

  __device__ __forceinline__ HeldRow(const DistillationArguments& d, Common& shared)
      : d_(d),
        shared_(shared),
        rank_(cluster_rank()),
        size_(cluster_size()),
        vectors_(static_cast<int>(d.K / V)),
        begin_(static_cast<int>(rank_ * blockDim.x) * R),
        temperature_(static_cast<float>(d.temperature)) {
    if (threadIdx.x == 0) {
      int count = 0;
      for (int j = 0; j < d.S; ++j) {
        const float weight = source_weight<float>(d, j);
        if (weight == 0.0f) continue;
        shared.weights[count] = weight;
        shared.factors[count] = weight / temperature_;
        shared.active[count++] = j;
      }
      shared.count = count;
      const int left = vectors_ - begin_, most = static_cast<int>(blockDim.x) * R;
      const int own = left < 0 ? 0 : (left < most ? left : most);
      shared.bytes = static_cast<unsigned>(own) * static_cast<unsigned>(sizeof(uint4));
    }
    __syncthreads();
    count_ = shared.count;
    const int left = vectors_ - vector(0);
    held_ = left <= 0 ? 0 : (left > (R - 1) * 32 ? R : (left + 31) / 32);
    meet(true);  // before one writes to another, which must have begun
  }

  // The next row into shared memory. Each thread copies what it reads: no barrier is needed.
  __device__ __forceinline__ void ask_for_next() const {
    if (shared_.next_class >= 0) copy(shared_.next_rows);
  }
  __device__ __forceinline__ void copy(const uint4* const* rows) const {
#pragma unroll 1
    for (int r = 0; r < held_; ++r) copy_vector(rows, r);
  }
  __device__ __forceinline__ void copy_vector(const uint4* const* rows, int r) const {
    copy_vector<0, S + 1>(rows, r);
  }
  template <int begin, int end>
  __device__ __forceinline__ void copy_vector(const uint4* const* rows, int r) const {
#pragma unroll
    for (int row = begin; row < end; ++row) {
      if (row <= count_) copy_async(place(row, r), rows[row] + vector(r));
    }
  }

  // A row without a label: no loss, gradient 0.
  __device__ __forceinline__ void ignore() const {
    if (leads() && d_.row_kl != nullptr) static_cast<float*>(d_.row_kl)[i_] = 0.0f;
    if (d_.grad == nullptr) return;
    const float zeros[V] = {};
    for (int r = 0; r < held_; ++r) store_gradient(d_, i_ * d_.K + vector(r) * V, zeros);
  }

  // ---- which rows ----
  // They come in chunks, of which a cluster takes another when it is done with one. The losses of a
  // chunk are a partial sum, so that their bits do not depend on who took it.

  __device__ __forceinline__ bool leads() const { return rank_ == 0 && threadIdx.x == 0; }

  static constexpr unsigned kNone = 0xffffffffu;
  // In the first row of a chunk, the number of the one after it: by the thread that leads, long
  // before it is told, as the answer takes long.
  __device__ __forceinline__ unsigned take_chunk() const {
    if (!leads() || !shared_.begins_chunk) return kNone;
    return gridDim.x / size_ + atomicAdd(d_.counters + 1, 1u);
  }
  // The others see it when they have met.
  __device__ __forceinline__ void tell_chunk(unsigned taken) const {
    if (taken == kNone) return;
    for (unsigned q = 0; q < size_; ++q) *in_block(&shared_.next_chunk, q) = taken;
  }

  __device__ __forceinline__ void find_first() const {
    if (threadIdx.x == 0) tell_next(first_of(blockIdx.x / size_));
    __syncthreads();
    ask_for_next();
  }

  struct Next {
    int64_t row;
    int y;
    bool begins_chunk;
    unsigned chunk;  // which, if it begins one
  };
  // By the last warp, as the first ones have more to do.
  __device__ __forceinline__ bool finds_next() const { return threadIdx.x == blockDim.x - 32; }
  // Whether it is found before the blocks meet for the sums, when they tell each other which chunk
  // is next: that rules out a chunk of a single row.
  __device__ __forceinline__ bool finds_early() const {
    return kEarly && (i_ + 1 != shared_.chunk_end || !shared_.begins_chunk);
  }
  __device__ __forceinline__ Next find_next() const {
    if (i_ + 1 == shared_.chunk_end) return first_of(shared_.next_chunk);
    return {i_ + 1, class_or_none(i_ + 1), false, 0};
  }
  __device__ __forceinline__ Next first_of(unsigned chunk) const {
    const int64_t row = static_cast<int64_t>(chunk) * d_.chunk;
    return {row, class_or_none(row), true, chunk};
  }
  __device__ __forceinline__ int class_or_none(int64_t row) const {
    return row < d_.N ? class_of(d_.labels, row, d_.K) : -1;
  }
  // What the others know when the block has met.
  __device__ __forceinline__ void tell_next(const Next& next) const {
    if (next.begins_chunk) begin_chunk(next.row, next.chunk);
    shared_.next = next.row;
    shared_.next_class = next.y;
    shared_.begins_chunk = next.begins_chunk;
    if (next.row < d_.N) tell_rows(next.row, shared_.next_rows);
  }
  // Whether they knew it before the sums: the same answer to all, until the next row's maxima.
  __device__ __forceinline__ bool knew_next() const { return kEarly && shared_.knew_next; }
  __device__ __forceinline__ void begin_chunk(int64_t first, unsigned chunk) const {
    const int64_t end = first + d_.chunk;
    shared_.ended_chunk = shared_.chunk;
    shared_.chunk = chunk;
    shared_.chunk_end = end < d_.N ? end : d_.N;
  }
  __device__ __forceinline__ void tell_rows(int64_t i, const uint4** rows) const {
    for (int row = 0; row <= count_; ++row) rows[row] = row == 0 ? student(i) : source(row - 1, i);
  }

  // False where there is none.
  __device__ __forceinline__ bool go_on() {
    i_ = shared_.next;
    y_ = shared_.next_class;
    return i_ < d_.N;
  }

  __device__ __forceinline__ void pass_over() {
    ignore();
    meet(true);  // all have read who was next
    tell_chunk(take_chunk());
    meet(true);
    if (finds_next()) tell_next(find_next());
    __syncthreads();
    leave_sums();
    ask_for_next();
  }

  // If a chunk has ended.
  __device__ __forceinline__ void leave_sums() const {
    if (!leads() || !shared_.begins_chunk) return;
    d_.partials[2 * shared_.ended_chunk] = shared_.ce;
    d_.partials[2 * shared_.ended_chunk + 1] = shared_.kl;
    shared_.ce = shared_.kl = 0.0;
  }

 protected:
  // A warp has 32 R vectors in a row, so that those of a lane are a constant apart.
  __device__ __forceinline__ int vector(int r) const {
    return begin_ + (warp_id() * R + r) * 32 + lane_id();
  }
  __device__ __forceinline__ const uint4* student(int64_t i) const {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(d_.logits.data) +
                                          i * d_.logits.row_stride);
  }
  __device__ __forceinline__ const uint4* source(int slot, int64_t i) const {
    const Source& s = d_.sources[shared_.active[slot]];
    return reinterpret_cast<const uint4*>(static_cast<const T*>(s.data) + i * s.row_stride);
  }

  // Vector r of this thread's, of the student (0) or an active source.
  __device__ __forceinline__ uint4* place(int row, int r) const {
    const int at = (warp_id() * (S + 1) * R + row * R + r) * 32 + lane_id();
    return reinterpret_cast<uint4*>(dynamic_shared() + sizeof(Common)) + at;
  }

  // This block's part of the next row towards the L2 cache, a thread for each of its rows.
  __device__ __forceinline__ void announce_next() const {
    const int j = static_cast<int>(threadIdx.x);
    if (shared_.next_class < 0 || j > count_ || shared_.bytes == 0) return;
    prefetch(shared_.next_rows[j] + begin_, shared_.bytes);
  }

  // told: whether this warp has written to other blocks since they met. Only then must it wait
  // until all that it wrote, gradients too, has arrived.
  __device__ __forceinline__ void meet(bool told) const {
    if (size_ > 1) {
      cluster_barrier(told);
    } else {
      __syncthreads();
    }
  }

  // Of this thread's elements of a row.
  __device__ __forceinline__ float largest_of(int row) const {
    Largest<T> largest;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r < held_) largest.add(*place(row, r));
    }
    return largest.value();
  }

  // Meanwhile the next row is found, if it can be.
  __device__ __forceinline__ void find_maxima() {
    Next next{};
    const bool finds = finds_next(), early = finds && finds_early();
    if (early) next = find_next();  // the answer is waited for together with the copies
    await_copies();
    float mine[S + 1];
#pragma unroll
    for (int j = 0; j <= S; ++j) mine[j] = j <= count_ ? largest_of(j) : -infinity<float>();
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      const float most = warp_largest(mine[j]);
      if (lane_id() == 0) shared_.warp_maxima[j][warp_id()] = most;
    }
    __syncthreads();
    if (finds) shared_.knew_next = early;
    if (early) tell_next(next);
    bool told = warp_id() == 0;
    const int warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      // Reverse: of the student all sources' anchors; forward: of each source the student's.
      const bool anchors = (j == 0) == reverse && j <= count_;
      if (!anchors && warp_id() != 0) continue;
      const float most = lane_id() < warps ? shared_.warp_maxima[j][lane_id()] : -infinity<float>();
      const float block = warp_largest(most);
      if (anchors && first_lane(lane_id() < warps && most == block) == warp_id()) {
        tell_anchors(j, first_lane(mine[j] == block), block);
        told = true;
      }
      if (threadIdx.x < size_) in_block(&shared_.first[rank_], threadIdx.x)->maximum[j] = block;
    }
    meet(told);
    combine_maxima();
  }

  __device__ __forceinline__ void combine_maxima() {
    const auto rank = static_cast<unsigned>(lane_id());
    float anchors[S];
#pragma unroll
    for (int j = 0; j <= S; ++j) {
      const float most = rank < size_ ? shared_.first[rank].maximum[j] : -infinity<float>();
      maxima_[j] = warp_largest(most);
      if ((j == 0) != reverse) continue;
      const First<S>& from = shared_.first[first_lane(rank < size_ && most == maxima_[j])];
      if (j > 0) anchors[j - 1] = from.anchor[j - 1];
#pragma unroll
      for (int other = 0; j == 0 && other < S; ++other) anchors[other] = from.anchor[other];
    }
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const bool there = j < count_;
      // What is measured from an anchor of -inf is NaN; of the other way round, only gaps are.
      if (reverse && !(anchors[j] > -infinity<float>())) anchors[j] = maxima_[1 + j];
      anchors_[j] = there ? anchors[j] : 0.0f;
      if (there && threadIdx.x == 0) shared_.anchors[j] = anchors[j];
    }
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int j = 0; j <= S; ++j) shared_.maxima[j] = maxima_[j];
  }

  __device__ __forceinline__ int first_lane(bool holds) const {
    return __ffs(static_cast<int>(__ballot_sync(kAllLanes, holds))) - 1;
  }

  // By the warp that has the block's largest value of row j: lane n looks at element n of those
  // that lane `owner` holds.
  __device__ __forceinline__ void tell_anchors(int j, int owner, float most) const {
    const int back = owner - lane_id(), n = lane_id();
    const auto element = [&](int row, int at) {
      return to_arithmetic(reinterpret_cast<const T*>(place(row, at / V) + back)[at % V]);
    };
    const bool held = n < R * V && vector(n / V) + back < vectors_;
    const int at = first_lane(held && element(j, n) == most);
    const int slot = reverse ? n : j - 1;
    if (at < 0 || n >= (reverse ? count_ : 1)) return;
    const float anchor = element(reverse ? 1 + n : 0, at);
    for (unsigned q = 0; q < size_; ++q) {
      in_block(&shared_.first[rank_], q)->anchor[slot] = anchor;
    }
  }

  const DistillationArguments& d_;
  Common& shared_;
  const unsigned rank_, size_;
  const int vectors_, begin_;
  const float temperature_;
  int count_, held_, y_;  // active sources, vectors of this thread, true class
  int64_t i_;
  float maxima_[S + 1], anchors_[S];
};

}  // namespace cuda
}  // namespace pycdgkd
