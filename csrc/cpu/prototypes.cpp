// Eqs. 2-4 for few classes: distance softmax against class prototypes. Forward reads the features
// once; backward writes the gradient once, from the saved (N, K) residual, and never reads the
// features again. Four rows at a time share every load of a prototype.
#include "prototypes.h"
#include "lanes.h"
#include "turn.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

template <class A>
void centre(const CentrePrototypes& c) {
  const CentredArrays<A> out(c.centred, c.D, c.K);
  Scratch<double> sum(c.D);
  for (int64_t j = 0; j < c.D; ++j) sum.get()[j] = 0.0;
  double active = 0.0;
  for (int64_t k = 0; k < c.K; ++k) {
    load_row(c.prototypes, k, 0, out.row(k), 1, c.D);
    if (!c.active[k]) continue;
    active += 1.0;
    for (int64_t j = 0; j < c.D; ++j) sum.get()[j] += static_cast<double>(out.row(k)[j]);
  }
  for (int64_t j = 0; j < out.stride; ++j) {
    out.mean[j] = j < c.D && active > 0.0 ? static_cast<A>(sum.get()[j] / active) : A(0);
  }
  for (int64_t k = 0; k < c.K; ++k) {
    A* row = out.row(k);
    for (int64_t j = 0; j < c.D; ++j) row[j] = c.active[k] ? row[j] - out.mean[j] : A(0);
    for (int64_t j = c.D; j < out.stride; ++j) row[j] = A(0);
    out.bias[k] = c.active[k] ? static_cast<A>(-c.scale) * squared_norm(row, out.stride)
                              : -std::numeric_limits<A>::infinity();
  }
  for (int64_t k = c.K; k < padded(c.K); ++k) out.bias[k] = A(0);
  if (c.K == 2) {
    for (int64_t j = 0; j < out.stride; ++j) out.row(2)[j] = out.row(0)[j] - out.row(1)[j];
  }
}

// As many columns of products at once as registers hold.
inline constexpr int kColumns = kVectorBytes == 64 ? 5 : 2;

// Apart from the loops that fill the sums: beside this the compiler would keep them in memory
// there.
template <class A>
[[gnu::noinline]] void sum_up(const Vector<A>* sums, int columns, A (*out)[kRows]) {
  for (int c = 0; c < columns; ++c) {
    const Vector<A>* s = sums + c;
    Halves<A, kVectorBytes>::four(s[0], s[columns], s[2 * columns], s[3 * columns], out[c]);
  }
}

// sums[r][c] += x_r . y_c
template <class A, int C>
inline void dot_step(const Vector<A> (&x)[kRows], const A* y, int64_t stride,
                     Vector<A> (&sums)[kRows][C]) {
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Vector<A> v = load(y + c * stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][c] += x[r] * v;
  }
}

// Products of four rows minus the mean, or of centred ones, which are whole vectors. What comes
// next is fetched meanwhile: a row beside centred ones, since more tiles follow, and else four as
// far apart as these. Null: nothing.
template <class A, int C, bool Centred>
[[gnu::noinline]] void dot_tile(const A* const (&x)[kRows], int64_t D, const CentredArrays<A>& p,
                                int64_t first, const A* next, A (*out)[kRows]) {
  const int64_t ahead = !Centred && next != nullptr ? next - x[0] : 0;
  const A* y = p.row(first);
  Vector<A> sums[kRows][C];
  Vector<A> v[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = Vector<A>{};
  }
  int64_t j = 0;
  for (; Centred ? j < D : j + kWidth<A> <= D; j += kWidth<A>) {
    if (Centred && next != nullptr) __builtin_prefetch(next + j);
    if (ahead != 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(x[r] + j + ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      v[r] = load(x[r] + j);
      if (!Centred) v[r] -= load(p.mean + j);
    }
    dot_step<A, C>(v, y + j, p.stride, sums);
  }
  if (!Centred && j < D) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) v[r] = load_part(x[r] + j, D - j) - load(p.mean + j);
    dot_step<A, C>(v, y + j, p.stride, sums);
  }
  sum_up<A>(&sums[0][0], C, out + first);
}

// dot_tile of so many columns, kColumns at most.
template <class A, bool Centred, int C = kColumns, class... Args>
void tile_of(int columns, const Args&... args) {
  if constexpr (C > 1) {
    if (columns < C) return tile_of<A, Centred, C - 1>(columns, args...);
  }
  dot_tile<A, C, Centred>(args...);
}

// Products with all prototypes, shared out among tiles evenly: one column alone would wait for its
// additions. Up to kColumns nothing is divided, which small batches would notice.
template <class A, bool Centred>
void dot_rows(const A* const (&x)[kRows], int64_t D, const CentredArrays<A>& p, int K,
              const A* next, int64_t next_stride, A (*out)[kRows]) {
  int first = 0;
  for (int t = 0, left = (K + kColumns - 1) / kColumns; left > 0; ++t, --left) {
    const int columns = left == 1 ? K - first : (K - first + left - 1) / left;
    const bool fetch = next != nullptr && (Centred ? t < kRows : left == 1);
    const A* row = fetch ? next + (Centred ? t * next_stride : 0) : nullptr;
    tile_of<A, Centred>(columns, x, D, p, first, row, out);
    first += columns;
  }
}

// to = x - mean, filled up with zeros to whole vectors; it may be where x lies.
template <class A>
void centre_row(const A* x, int64_t D, const A* mean, A* to) {
  int64_t j = 0;
  for (; j + kWidth<A> <= D; j += kWidth<A>) store<A>(load(x + j) - load(mean + j), to + j);
  if (j < D) store<A>(load_part(x + j, D - j) - load(mean + j), to + j);
}

template <class A>
struct ForwardWork {
  explicit ForwardWork(const PrototypeForward& p)
      : lanes(p.K * kLanes),
        storage(3 * lanes + kRows * padded(p.D) + kRows * (p.K + 1)),
        across(lies_across(p.features)),
        block(across ? kLanes * padded(p.D) : 0) {
    logits = storage.get();
    exps = logits + lanes;
    residual = exps + lanes;
    rows = residual + lanes;
    products = reinterpret_cast<A(*)[kRows]>(rows + kRows * padded(p.D));
  }
  int64_t lanes;
  Scratch<A> storage;
  bool across;  // rows are read through copies of a whole block
  Scratch<A> block;
  A *logits, *exps, *residual, *rows;
  A (*products)[kRows];  // by prototype
};

// a_k = 2 scale (z - mean).(c_k - mean) - scale |c_k - mean|^2: -scale |z - c_k|^2 but for a term
// that all classes share. Of two classes only the difference matters: one product instead of two.
template <class A>
void four_logits(const PrototypeForward& p, const Matrix& features, int64_t N,
                 const CentredArrays<A>& c, int64_t first, A* logits, ForwardWork<A>& work) {
  const A* x[kRows];
  const bool in_place = four_rows(features, first, N, 0, p.D, work.rows, c.stride, x);
  const int64_t stride = features.row_stride;
  const A* next = in_place && first + 2 * kRows <= N ? x[0] + kRows * stride : nullptr;
  const A twice = static_cast<A>(2.0 * p.scale);
  const int K = static_cast<int>(p.K);
  constexpr A lowest = std::numeric_limits<A>::lowest();
  if (p.K == 2 && c.bias[0] >= lowest && c.bias[1] >= lowest) {  // two classes that take part
    dot_tile<A, 1, false>(x, p.D, c, 2, next, work.products);
    for (int r = 0; r < kRows; ++r) {
      logits[r] = twice * work.products[2][r] + (c.bias[0] - c.bias[1]);
      logits[kLanes + r] = A(0);
    }
    return;
  }
  if (p.K > (kRows - 1) * kColumns) {  // tiles enough to pay for copies, and to fetch a row each
    for (int r = 0; r < kRows; ++r) {
      centre_row(x[r], p.D, c.mean, work.rows + r * c.stride);
      x[r] = work.rows + r * c.stride;
    }
    dot_rows<A, true>(x, p.D, c, K, next, stride, work.products);
  } else {
    dot_rows<A, false>(x, p.D, c, K, next, stride, work.products);
  }
  for (int64_t k = 0; k < p.K; ++k) {
    for (int r = 0; r < kRows; ++r) {
      logits[k * kLanes + r] = twice * work.products[k][r] + c.bias[k];
    }
  }
}

template <class A>
void forward_block(const PrototypeForward& p, const CentredArrays<A>& c, int64_t index,
                   ForwardWork<A>& work) {
  const int64_t first = index * kBlockRows;
  const int64_t rows = p.N - first < kBlockRows ? p.N - first : kBlockRows;
  int32_t classes[kLanes];
  load_classes(p.classes, first, rows, classes);
  Matrix features = p.features;
  if (work.across) {
    constexpr Dtype same = sizeof(A) == sizeof(double) ? Dtype::float64 : Dtype::float32;
    load_rows(p.features, first, rows, 0, p.D, work.block.get(), padded(p.D));
    features = {work.block.get(), padded(p.D), 1, same};
  }
  const int64_t start = work.across ? 0 : first, N = work.across ? rows : p.N;
  for (int64_t r = 0; r < kLanes; r += kRows) {
    const bool any =
        classes[r] >= 0 || classes[r + 1] >= 0 || classes[r + 2] >= 0 || classes[r + 3] >= 0;
    if (any) {
      four_logits(p, features, N, c, start + r, work.logits + r, work);
    } else {
      for (int64_t k = 0; k < p.K; ++k) {
        for (int64_t s = r; s < r + kRows; ++s) work.logits[k * kLanes + s] = A(0);
      }
    }
  }
  A loss[kLanes], true_prob[kLanes];
  lane_cross_entropy(work.logits, p.K, classes, work.exps, loss, true_prob,
                     p.residual != nullptr ? work.residual : nullptr);
  double loss_sum = 0.0, rate = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    loss_sum += static_cast<double>(loss[r]);
    rate += static_cast<double>(true_prob[r]);
    if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[first + r] = loss[r];
    if (p.true_prob != nullptr) static_cast<A*>(p.true_prob)[first + r] = true_prob[r];
  }
  p.block_loss[index] = loss_sum;
  p.block_rate[index] = rate;
  if (p.residual != nullptr) {
    store_lanes(work.residual, first, rows, p.K, static_cast<A*>(p.residual));
  }
}

template <class A>
void forward(const PrototypeForward& p, ParallelFor threads) {
  const CentredArrays<A> centred(p.centred, p.D, p.K);
  parallel_for(threads, num_blocks(p.N), kBlockRows * (p.D + p.K), [&](int64_t begin, int64_t end) {
    ForwardWork<A> work(p);
    for (int64_t index = begin; index < end; ++index) forward_block(p, centred, index, work);
  });
}

// out_r = sum_k weights[k][r] y_k over V vectors of columns from j on.
template <class A, int V>
void combine_tile(const A (*weights)[kRows], int64_t K, const A* y, int64_t stride, A* out,
                  int64_t out_stride) {
  Vector<A> sums[kRows][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const Vector<A> c = load(y + v * kWidth<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r][v] = weights[0][r] * c;
  }
  for (int64_t k = 1; k < K; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vector<A> c = load(y + k * stride + v * kWidth<A>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][v] += weights[k][r] * c;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store<A>(sums[r][v], out + r * out_stride + v * kWidth<A>);
  }
}

// Writes whole vectors: `out` has room for padded(D) columns a row.
template <class A>
void combine_rows(const A (*weights)[kRows], int64_t K, const A* y, int64_t stride, int64_t D,
                  A* out, int64_t out_stride) {
  constexpr int V = kVectorBytes == 64 ? 4 : 2;
  int64_t j = 0;
  for (; j + V * kWidth<A> <= D; j += V * kWidth<A>) {
    combine_tile<A, V>(weights, K, y + j, stride, out + j, out_stride);
  }
  for (; j < D; j += kWidth<A>) combine_tile<A, 1>(weights, K, y + j, stride, out + j, out_stride);
}

template <class A>
struct BackwardWork {
  explicit BackwardWork(const PrototypeBackward& p)
      : storage(kRows * padded(p.D) + kRows * (p.K + 1)),
        rows(storage.get()),
        weights(reinterpret_cast<A (*)[kRows]>(rows + kRows * padded(p.D))) {}
  Scratch<A> storage;
  A* rows;
  A (*weights)[kRows];  // by prototype
};

// The gradient of `rows` <= 4 rows from `first` on.
template <class A>
void backward_rows(const PrototypeBackward& p, const CentredArrays<A>& c, int64_t first,
                   int64_t rows, BackwardWork<A>& work) {
  const A* residual = static_cast<const A*>(p.residual);
  const A* row_factor = static_cast<const A*>(p.row_factor);
  const int64_t count = p.K == 2 ? 1 : p.K;  // two residuals sum to 0: r_0 (c_0 - c_1)
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t i = first + r;
    const A factor =
        r < rows ? static_cast<A>(p.factor) * (row_factor != nullptr ? row_factor[i] : A(1)) : A(0);
    for (int64_t k = 0; k < count; ++k) {
      work.weights[k][r] = factor == A(0) ? A(0) : factor * residual[i * p.K + k];
    }
  }
  const A* y = c.row(p.K == 2 ? 2 : 0);
  const bool direct =
      rows == kRows && p.D % kWidth<A> == 0 &&
      p.grad_dtype == (sizeof(A) == sizeof(double) ? Dtype::float64 : Dtype::float32);
  if (direct) {
    combine_rows(work.weights, count, y, c.stride, p.D, static_cast<A*>(p.grad) + first * p.D, p.D);
    return;
  }
  combine_rows(work.weights, count, y, c.stride, p.D, work.rows, c.stride);
  for (int64_t r = 0; r < rows; ++r) {
    store_row(work.rows + r * c.stride, p.grad, p.grad_dtype, first + r, p.D);
  }
}

template <class A>
void backward(const PrototypeBackward& p, ParallelFor threads) {
  const CentredArrays<A> centred(p.centred, p.D, p.K);
  parallel_for(
      threads, (p.N + kRows - 1) / kRows, kRows * (p.D + p.K), [&](int64_t begin, int64_t end) {
        if (p.factor == 0.0) {
          const int64_t last = end * kRows < p.N ? end * kRows : p.N;
          zero_rows(p.grad, p.grad_dtype, begin * kRows, last, p.D);
          return;
        }
        BackwardWork<A> work(p);
        for (int64_t group = begin; group < end; ++group) {
          const int64_t first = group * kRows;
          backward_rows(p, centred, first, p.N - first < kRows ? p.N - first : kRows, work);
        }
      });
}

}  // namespace

void centre_prototypes(const CentrePrototypes& c) { c.wide ? centre<double>(c) : centre<float>(c); }

void prototype_forward(const PrototypeForward& p, ParallelFor threads) {
  p.wide ? forward<double>(p, threads) : forward<float>(p, threads);
}

void prototype_backward(const PrototypeBackward& p, ParallelFor threads) {
  p.wide ? backward<double>(p, threads) : backward<float>(p, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
