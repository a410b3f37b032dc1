// Gradients that are there already, times the gradient of the loss: any number in one launch.
#include "conversions.cuh"

namespace pycdgkd {
namespace cuda {
namespace {

constexpr int kThreads = 256, kMostArrays = 16;

struct Arguments {
  Values factor;
  ScaledGrad arrays[kMostArrays];
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    scale_grads_kernel(const __grid_constant__ Arguments a) {
  await_previous();
  let_next_begin();
  const ScaledGrad& g = a.arrays[blockIdx.y];
  const A factor = value_at<A>(a.factor, 0);
  if (factor == A(1) && g.grad == g.unit) return;
  constexpr int V = kVector<A>;
  const auto* unit = static_cast<const A*>(g.unit);
  const auto times = [&](A x) { return factor == A(0) ? A(0) : factor * x; };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(g.unit) | reinterpret_cast<uintptr_t>(g.grad);
  const int64_t vectors = g.dtype == dtype_of<A> && places % 16 == 0 ? g.count / V : 0;
#pragma unroll 4
  for (int64_t at = own; at < vectors; at += step) {
    A x[V];
    load_array<V>(unit + at * V, x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = times(x[v]);
    store_array<V>(static_cast<A*>(g.grad) + at * V, x);
  }
  for (int64_t at = vectors * V + own; at < g.count; at += step) {
    store_element(g.grad, at, g.dtype, times(unit[at]));
  }
}

}  // namespace

void scale_grads(const ScaleGrads& s, Stream stream) {
  for (int64_t next = 0; next < s.M;) {
    Arguments a{s.factor, {}};
    unsigned arrays = 0;
    int64_t largest = 0;
    for (; next < s.M && arrays < kMostArrays; ++next) {
      a.arrays[arrays++] = s.grads[next];
      largest = s.grads[next].count > largest ? s.grads[next].count : largest;
    }
    const dim3 grid(blocks_for(largest, 16 * kThreads, 16 * device_limits().multiprocessors),
                    arrays);
    s.wide ? launch_early<scale_grads_kernel<double>>(grid, kThreads, 0, stream, a)
           : launch_early<scale_grads_kernel<float>>(grid, kThreads, 0, stream, a);
  }
}

}  // namespace cuda
}  // namespace pycdgkd
