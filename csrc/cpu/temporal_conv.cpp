// TSception's temporal convolution with the leaky rectifier and the mean over `pool` neighbours
// that follow it: the activations, `pool` times as many as the results, stay in registers and L1.
//
// Lanes are neighbouring results, m = 0, 1, ...: the signal is kept by phases, sample m pool + p at
// phase p, place m, so that the samples which kernel place i meets at offset p of every result lie
// side by side, and a mean over neighbours is a sum of vectors.
#include "rows.h"
#include "vectors.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

constexpr int kKernels = kVectorBytes == 64 ? 8 : 4;  // that share the loads of a signal
constexpr int kColumns = 2;                           // vectors of results side by side
constexpr int kGroup = 4;                             // kernels ...
constexpr int kTaps = kVectorBytes == 64 ? 4 : 2;     // ... by places: a tile of the gradient

template <int N>
struct Count {
  static constexpr int value = N;
};

// body(first, Count<Q>) for tiles of Q kernels; the last may reach beyond T.
template <class Body>
void for_kernels(int64_t T, const Body& body) {
  for (int64_t t = 0; t < T;) {
    const int64_t left = T - t;
    if (left > 4 && kKernels > 4) {
      body(t, Count<kKernels>{});
      t += kKernels;
    } else if (left > 1) {
      body(t, Count<4>{});
      t += 4;
    } else {
      body(t, Count<1>{});
      t += 1;
    }
  }
}

// body(first, Count<V>) for V vectors of results.
template <class A, class Body>
void for_columns(int64_t steps, const Body& body) {
  int64_t m = 0;
  for (; m + kColumns * kWidth<A> <= steps; m += kColumns * kWidth<A>) body(m, Count<kColumns>{});
  for (; m < steps; m += kWidth<A>) body(m, Count<1>{});
}

// The elements from (i, j, k) on, a step apart, as a matrix of one row.
inline Matrix row_of(const Strided& x, int64_t i, int64_t j, int64_t k, int64_t step) {
  const int64_t offset = i * x.strides[0] + j * x.strides[1] + k * x.strides[2];
  return {static_cast<const char*>(x.data) + offset * size_of(x.dtype), 0, step, x.dtype};
}

// What all rows share. Kernels and sums are padded to whole tiles: the padding is computed with,
// and never stored.
template <class A>
struct Plan {
  explicit Plan(const TemporalConv& c)
      : steps((c.M + kWidth<A> - 1) / kWidth<A> * kWidth<A>),
        places((c.k + kTaps - 1) / kTaps * kTaps),
        stride((steps + (places + c.pool - 2) / c.pool + kWidth<A>) / kWidth<A> * kWidth<A>),
        kernels(c.T + kKernels),
        offsets(places + c.pool),
        weight(kernels * c.k),
        bias(kernels),
        inverse(A(1) / static_cast<A>(c.pool)),
        slope(static_cast<A>(c.slope)) {
    for (int64_t j = 0; j < places + c.pool; ++j) {
      offsets.get()[j] = j % c.pool * stride + j / c.pool;
    }
    for (int64_t t = 0; t < kernels; ++t) bias.get()[t] = A(0);
    load_row(c.bias, 0, 0, bias.get(), 1, c.T);
    for (int64_t j = 0; j < kernels * c.k; ++j) weight.get()[j] = A(0);
    for_kernels(c.T, [&](int64_t first, auto tile) {
      for (int64_t q = 0; q < tile.value && first + q < c.T; ++q) {
        load_row(c.weight, first + q, 0, weight.get() + first * c.k + q, tile.value, c.k);
      }
    });
  }
  int64_t steps, places, stride, kernels;
  Scratch<int64_t> offsets;  // of sample j of a result, within the phases
  Scratch<A> weight;         // by tile of kernels, place, kernel
  Scratch<A> bias;
  A inverse, slope;
};

// Samples that no result uses are read as 0.
template <class A>
void load_phases(const TemporalConv& c, const Plan<A>& plan, int64_t row, A* phases) {
  const int64_t used = c.M * c.pool + c.k - 1;
  for (int64_t p = 0; p < c.pool; ++p) {
    A* phase = phases + p * plan.stride;
    const int64_t count = p < used ? (used - p + c.pool - 1) / c.pool : 0;
    const Matrix samples = row_of(c.eeg, row / c.C, row % c.C, p, c.eeg.strides[2] * c.pool);
    load_row(samples, 0, 0, phase, 1, count);
    for (int64_t m = count; m < plan.stride; ++m) phase[m] = A(0);
  }
}

// out_qv = bias_q + sum_i weight_qi x_(offset_i + m). Apart from its callers, so that nothing they
// do with the results moves the sums out of the registers.
template <class A, int Q, int V>
[[gnu::noinline]] void convolve(const A* x, const int64_t* offsets, const A* weight, const A* bias,
                                int64_t k, Vector<A>* out) {
  Vector<A> sums[Q][V];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[q][v] = Vector<A>{} + bias[q];
  }
  for (int64_t i = 0; i < k; ++i) {
    Vector<A> samples[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) samples[v] = load(x + offsets[i] + v * kWidth<A>);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[q][v] += weight[i * Q + q] * samples[v];
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out[q * V + v] = sums[q][v];
  }
}

// The results of Q kernels, V vectors from m on.
template <class A, int Q, int V>
void pooled(const Plan<A>& plan, const TemporalConv& c, const A* phases, int64_t first, int64_t m,
            A* out) {
  Vector<A> pre[Q * V], sums[Q * V] = {};
  for (int64_t p = 0; p < c.pool; ++p) {
    convolve<A, Q, V>(phases + m, plan.offsets.get() + p, plan.weight.get() + first * c.k,
                      plan.bias.get() + first, c.k, pre);
    for (int j = 0; j < Q * V; ++j) sums[j] += pre[j] > A(0) ? pre[j] : plan.slope * pre[j];
  }
  for (int q = 0; q < Q; ++q) {
    for (int v = 0; v < V; ++v) {
      store<A>(plan.inverse * sums[q * V + v], out + q * plan.steps + m + v * kWidth<A>);
    }
  }
}

template <class A>
void forward(const TemporalConv& c, ParallelFor threads) {
  const Plan<A> plan(c);
  parallel_for(threads, c.B * c.C, c.L * c.T, [&](int64_t begin, int64_t end) {
    Scratch<A> phases(c.pool * plan.stride), results(kKernels * plan.steps);
    for (int64_t row = begin; row < end; ++row) {
      load_phases(c, plan, row, phases.get());
      for_kernels(c.T, [&](int64_t first, auto tile) {
        for_columns<A>(plan.steps, [&](int64_t m, auto columns) {
          pooled<A, tile.value, columns.value>(plan, c, phases.get(), first, m, results.get());
        });
        for (int64_t q = 0; q < tile.value && first + q < c.T; ++q) {
          const int64_t at = (row / c.C * c.T + first + q) * c.C + row % c.C;
          store_row(results.get() + q * plan.steps, c.out, c.out_dtype, at, c.M);
        }
      });
    }
  });
}

// Working memory of a block of rows, and its sums: in vectors over some rows, in double over all.
template <class A>
struct BackwardWork {
  BackwardWork(const TemporalConv& c, const Plan<A>& plan)
      : phases(c.pool * plan.stride),
        grad_phases(c.pool * plan.stride),
        grad(kKernels * plan.steps),
        grad_pre(kKernels * c.pool * plan.steps),
        time(c.L),
        weight_sums(plan.kernels * plan.places),
        bias_sums(plan.kernels) {
    const int64_t weights = plan.kernels * plan.places;
    std::memset(weight_sums.get(), 0, static_cast<size_t>(weights) * sizeof(Vector<A>));
    std::memset(bias_sums.get(), 0, static_cast<size_t>(plan.kernels) * sizeof(Vector<A>));
  }
  Scratch<A> phases, grad_phases;
  Scratch<A> grad;      // (Q, steps), divided by pool
  Scratch<A> grad_pre;  // (Q, pool, steps)
  Scratch<A> time;
  Scratch<Vector<A>> weight_sums, bias_sums;  // (kernels, places), (kernels,)
};

template <class A>
void load_grad(const TemporalConvBackward& b, const Plan<A>& plan, int64_t row, int64_t first,
               int64_t count, A* grad) {
  const TemporalConv& c = b.conv;
  for (int64_t q = 0; q < count; ++q) {
    A* to = grad + q * plan.steps;
    const bool given = first + q < c.T;
    if (given) {
      const Matrix from = row_of(b.grad, row / c.C, first + q, row % c.C, b.grad.strides[3]);
      load_row(from, 0, 0, to, 1, c.M);
    }
    for (int64_t m = 0; m < plan.steps; ++m) to[m] = given && m < c.M ? to[m] * plan.inverse : A(0);
  }
}

// The gradient before the rectifier, by the sign of what the forward pass had there.
template <class A, int Q, int V>
void rectifier_grad(const Plan<A>& plan, const TemporalConv& c, int64_t first, int64_t m,
                    BackwardWork<A>& work) {
  Vector<A> pre[Q * V], sums[Q] = {};
  for (int64_t p = 0; p < c.pool; ++p) {
    convolve<A, Q, V>(work.phases.get() + m, plan.offsets.get() + p,
                      plan.weight.get() + first * c.k, plan.bias.get() + first, c.k, pre);
    for (int q = 0; q < Q; ++q) {
      for (int v = 0; v < V; ++v) {
        const Vector<A> grad = load(work.grad.get() + q * plan.steps + m + v * kWidth<A>);
        const Vector<A> passed = pre[q * V + v] > A(0) ? grad : plan.slope * grad;
        sums[q] += passed;
        store<A>(passed, work.grad_pre.get() + (q * c.pool + p) * plan.steps + m + v * kWidth<A>);
      }
    }
  }
  for (int q = 0; q < Q; ++q) work.bias_sums.get()[first + q] += sums[q];
}

// out_qj += sum_m grad_qm x_(offset_j + m), lane by lane, over all offsets p.
template <class A, int Q>
[[gnu::noinline]] void correlate(const Plan<A>& plan, int64_t pool, const A* grad_pre,
                                 const A* phases, int64_t place, Vector<A>* out) {
  Vector<A> sums[Q][kTaps];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) sums[q][j] = Vector<A>{};
  }
  const int64_t steps = plan.steps, across = pool * steps;
  for (int64_t p = 0; p < pool; ++p) {
    const int64_t* offsets = plan.offsets.get() + p + place;
    const A* grad = grad_pre + p * steps;
    for (int64_t m = 0; m < steps; m += kWidth<A>) {
      Vector<A> samples[kTaps];
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) samples[j] = load(phases + offsets[j] + m);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Vector<A> g = load(grad + q * across + m);
#pragma GCC unroll 8
        for (int j = 0; j < kTaps; ++j) sums[q][j] += g * samples[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) out[q * plan.places + j] += sums[q][j];
  }
}

template <class A>
void add_signal_grad(const TemporalConv& c, const Plan<A>& plan, int64_t first, int64_t count,
                     BackwardWork<A>& work) {
  const A* weight = plan.weight.get() + first * c.k;
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t p = 0; p < c.pool; ++p) {
      const A* grad = work.grad_pre.get() + (q * c.pool + p) * plan.steps;
      for (int64_t i = 0; i < c.k; ++i) {
        A* to = work.grad_phases.get() + plan.offsets.get()[p + i];
        const A w = weight[i * count + q];
#pragma omp simd
        for (int64_t m = 0; m < plan.steps; ++m) to[m] += w * grad[m];
      }
    }
  }
}

template <class A>
void backward_row(const TemporalConvBackward& b, const Plan<A>& plan, int64_t row,
                  BackwardWork<A>& work) {
  const TemporalConv& c = b.conv;
  load_phases(c, plan, row, work.phases.get());
  A* grad_phases = work.grad_phases.get();
  for (int64_t j = 0; j < c.pool * plan.stride; ++j) grad_phases[j] = A(0);
  for_kernels(c.T, [&](int64_t first, auto tile) {
    constexpr int Q = tile.value, group = Q < kGroup ? Q : kGroup;
    load_grad(b, plan, row, first, Q, work.grad.get());
    for_columns<A>(plan.steps, [&](int64_t m, auto columns) {
      rectifier_grad<A, Q, columns.value>(plan, c, first, m, work);
    });
    for (int64_t q = 0; q < Q; q += group) {
      const A* grad_pre = work.grad_pre.get() + q * c.pool * plan.steps;
      for (int64_t i = 0; i < plan.places; i += kTaps) {
        correlate<A, group>(plan, c.pool, grad_pre, work.phases.get(), i,
                            work.weight_sums.get() + (first + q) * plan.places + i);
      }
    }
    if (b.grad_eeg != nullptr) add_signal_grad(c, plan, first, Q, work);
  });
  if (b.grad_eeg == nullptr) return;
  for (int64_t l = 0; l < c.L; ++l) {
    work.time.get()[l] = grad_phases[l % c.pool * plan.stride + l / c.pool];
  }
  store_row(work.time.get(), b.grad_eeg, c.out_dtype, row, c.L);
}

// Moves the vectors' sums to the doubles of the block.
template <class A>
void add_up(const TemporalConv& c, const Plan<A>& plan, BackwardWork<A>& work, double* sums) {
  const auto move = [](Vector<A>& from, double& to) {
    to += static_cast<double>(sum_of<A>(from));
    from = Vector<A>{};
  };
  for (int64_t t = 0; t < c.T; ++t) {
    double* out = sums + t * (c.k + 1);
    for (int64_t i = 0; i < c.k; ++i) move(work.weight_sums.get()[t * plan.places + i], out[i]);
    move(work.bias_sums.get()[t], out[c.k]);
  }
}

template <class A>
void backward(const TemporalConvBackward& b, ParallelFor threads) {
  const TemporalConv& c = b.conv;
  const Plan<A> plan(c);
  const int64_t rows = c.B * c.C, size = temporal_conv_block(rows);
  parallel_for(threads, (rows + size - 1) / size, size * c.L * c.T,
               [&](int64_t begin, int64_t end) {
                 BackwardWork<A> work(c, plan);
                 for (int64_t block = begin; block < end; ++block) {
                   double* sums = b.block_sums + block * c.T * (c.k + 1);
                   for (int64_t j = 0; j < c.T * (c.k + 1); ++j) sums[j] = 0.0;
                   const int64_t last = (block + 1) * size < rows ? (block + 1) * size : rows;
                   for (int64_t row = block * size; row < last; ++row) {
                     backward_row(b, plan, row, work);
                     if ((row + 1) % kBlockRows == 0 || row + 1 == last)
                       add_up(c, plan, work, sums);
                   }
                 }
               });
}

}  // namespace

void temporal_conv(const TemporalConv& c, ParallelFor threads) {
  c.wide ? forward<double>(c, threads) : forward<float>(c, threads);
}

void temporal_conv_backward(const TemporalConvBackward& b, ParallelFor threads) {
  b.conv.wide ? backward<double>(b, threads) : backward<float>(b, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
