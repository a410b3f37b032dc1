// Rows of features on their way through shared memory to the warp that multiplies them
// (teacher.cu).
#pragma once

#include "teacher_rows.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

inline constexpr int kStages = 4;
inline constexpr size_t kRingBytes = kWarps * kStages * kStreamedRows * 32 * 16;  // of a block

// A warp's rows, R at a time, 32 vectors of each a stage. While one stage is worked on the next
// three are on their way, also those of later rows. Each lane copies what it reads itself: no
// barrier is needed.
template <class T, int R>
class RowStream {
 public:
  static constexpr bool skips = false;  // rows that nobody needs

  __device__ __forceinline__ RowStream(const Arguments& a, const Part& part)
      : a_(a),
        features_(part.modality.features),
        D_(static_cast<int>(part.modality.D)),
        first_(first_row(a, R)) {
#pragma unroll 1
    for (int stage = 0; stage + 1 < kStages; ++stage) ask(stage);
  }

  // Of the next R rows; lane_rows takes them in the order in which they were asked for.
  template <int C, class A>
  __device__ __forceinline__ void products(int64_t, const Centred<A>& p, const A* y, int count,
                                           A (&acc)[R][C]) {
    constexpr int V = kVector<T>;
    clear(acc);
#pragma unroll 1
    for (int column = lane_id() * V; column - lane_id() * V < D_; column += 32 * V) {
      await_copies_but<kStages - 2>();
      ask(stage_ + kStages - 1);
      if (column < D_) {
        Packed<T, V> raw[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const uint4 piece = *place(stage_, r);  // of known alignment: not byte by byte
          memcpy(&raw[r], &piece, sizeof(piece));
        }
        add_products<T, V>(raw, p.mean + column, y + column, p.stride, count, acc);
      }
      ++stage_;
    }
    sum_over_warp(acc);
  }

 private:
  __device__ __forceinline__ uint4* place(int stage, int r) const {
    const int at = (warp_id() * kStages + stage % kStages) * R + r;
    return reinterpret_cast<uint4*>(dynamic_shared() + a_.ring) + at * 32 + lane_id();
  }

  // Asks for what comes next; nothing, if all was asked for, is a group of copies too.
  __device__ __forceinline__ void ask(int stage) {
    if (first_ < a_.N) {
      const int column = column_ + lane_id() * kVector<T>;
      const int64_t row = clamped_row<R>(a_, first_ + begin_);
      const T* from = static_cast<const T*>(features_.data) + row * features_.row_stride + column;
      if (column < D_) {
#pragma unroll
        for (int r = 0; r < R; ++r) copy_async(place(stage, r), from + r * features_.row_stride);
      }
      go_on();
    }
    commit_copies();
  }

  __device__ __forceinline__ void go_on() {
    column_ += 32 * kVector<T>;
    if (column_ < D_) return;
    column_ = 0;
    begin_ += R;
    if (begin_ < a_.groups * R && first_ + begin_ < a_.N) return;
    begin_ = 0;
    first_ += row_step(a_, R);
  }

  const Arguments& a_;
  const Matrix& features_;
  const int D_;
  int64_t first_;  // row of the chunk that is asked for
  int begin_ = 0, column_ = 0, stage_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace pycdgkd
