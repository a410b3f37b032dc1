// What the CPU kernels share: typed access to strided rows, scratch memory, the parallel loop.
#pragma once

#include <cstdlib>
#include <new>

#include "../kernels.h"
#include "../row_math.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

inline constexpr int64_t kLanes = kBlockRows;  // rows that one vector loop works on side by side

// Scratch memory, aligned for vector loads.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_;
};

// Calls body(begin, end) over blocks of work; `cost` is the number of elements one unit touches.
// Below about 64k elements a thread costs more than it saves.
template <class Body>
void parallel_for(ParallelFor run, int64_t count, int64_t cost, const Body& body) {
  const int64_t grain = 65536 / (cost > 0 ? cost : 1) + 1;
  run(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::float32 ? 4 : 2);
}

// to[j * to_stride] = from[j * stride] for j < count.
template <class T, class A>
inline void copy_row(const T* from, int64_t stride, A* to, int64_t to_stride, int64_t count) {
  if (stride == 1 && to_stride == 1) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<A>(to_arithmetic(from[j]));
  } else if (stride == 2 && to_stride == 1) {  // a number the compiler knows: it vectorises
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = static_cast<A>(to_arithmetic(from[2 * j]));
  } else {
    for (int64_t j = 0; j < count; ++j) {
      to[j * to_stride] = static_cast<A>(to_arithmetic(from[j * stride]));
    }
  }
}

// Loads `count` elements of row i, from column `first` on, as arithmetic type A.
template <class A>
void load_row(const Matrix& m, int64_t i, int64_t first, A* to, int64_t to_stride, int64_t count) {
  const int64_t offset = i * m.row_stride + first * m.col_stride;
  switch (m.dtype) {
    case Dtype::float32:
      return copy_row(static_cast<const float*>(m.data) + offset, m.col_stride, to, to_stride,
                      count);
    case Dtype::float64:
      return copy_row(static_cast<const double*>(m.data) + offset, m.col_stride, to, to_stride,
                      count);
    case Dtype::bfloat16:
      return copy_row(static_cast<const bfloat16*>(m.data) + offset, m.col_stride, to, to_stride,
                      count);
    case Dtype::float16:
      return copy_row(static_cast<const float16*>(m.data) + offset, m.col_stride, to, to_stride,
                      count);
  }
}

template <class A, class T>
inline void convert_row(const A* from, T* to, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = from_arithmetic<T>(from[j]);
}

// Stores a row of the contiguous (N, count) array `to`.
template <class A>
void store_row(const A* from, void* to, Dtype dtype, int64_t i, int64_t count) {
  switch (dtype) {
    case Dtype::float32:
      return convert_row(from, static_cast<float*>(to) + i * count, count);
    case Dtype::float64:
      return convert_row(from, static_cast<double*>(to) + i * count, count);
    case Dtype::bfloat16:
      return convert_row(static_cast<const A*>(from), static_cast<bfloat16*>(to) + i * count,
                         count);
    case Dtype::float16:
      return convert_row(static_cast<const A*>(from), static_cast<float16*>(to) + i * count, count);
  }
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
