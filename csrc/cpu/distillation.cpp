// Eq. 9: cross-entropy and the weighted divergences to all sources, value and gradient in one pass.
//
// Rows of few classes are worked on kLanes side by side, longer ones one by one, in pieces: see
// lanes.h and softmax_rows.h.
#include "distillation_work.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {
namespace {

// Up to here rows lie side by side: longer than that, turning them costs more than the rim of each
// row. Gathers turn them faster (transpose.h).
#if defined(__AVX512F__)
constexpr int64_t kFewClasses = 256;
#else
constexpr int64_t kFewClasses = 100;
#endif

// The line, counted from class `begin`, that holds the true class in each lane, if one does.
template <class A, int64_t R>
void true_lines(const Workspace<A, R>& w, int64_t begin, A* line) {
  for (int64_t r = 0; r < kLanes; ++r) {
    if (R == 1) {
      const int64_t k = w.classes[0] - begin;
      line[r] = k >= 0 && k % kLanes == r ? static_cast<A>(k / kLanes) : A(-1);
    } else {
      line[r] = static_cast<A>(w.classes[r]);
    }
  }
}

template <class A, int64_t R>
void true_logits(const Workspace<A, R>& w, A* value) {
  if constexpr (R == 1) {
    const int32_t k = w.classes[0];
    load_at_hand(w.rows, w.student, k >= 0 ? k : 0, 1, value);
    for (int64_t r = 1; r < kLanes; ++r) value[r] = value[0];
  } else {
    A line[kLanes];
    true_lines(w, 0, line);
    lane_at_line(w.student.values, line, w.rows.K, value);
  }
}

// term(plain) for plain(k, r) = e^(a - maximum), from the exponentials at the temperature if one
// is a small power of the other.
template <class A, int64_t R, class Body>
void with_plain_exps(const Workspace<A, R>& w, const A* exps, const A* values, const A* maximum,
                     const Body& body) {
  if (w.power == 1) {
    body([=](int64_t k, int64_t r) { return exps[k * kLanes + r]; });
  } else if (w.power == 2) {
    body([=](int64_t k, int64_t r) { return exps[k * kLanes + r] * exps[k * kLanes + r]; });
  } else {
    body(
        [=](int64_t k, int64_t r) { return exp_nonpositive(values[k * kLanes + r] - maximum[r]); });
  }
}

// Maximum and sums of the student, also those that the cross-entropy needs.
template <class A, int64_t R>
void student_sums(const Distillation& d, Workspace<A, R>& w) {
  const Softmax<A>& s = w.student;
  const bool find = d.direction == Direction::reverse && w.active > 0;
  for (int64_t r = 0; r < kLanes; ++r) w.others[r] = 0.0;
  softmax_sums(w.rows, w.student, find, [&](const Piece& p, const A* older, const A* base) {
    if (d.classes == nullptr) return;
    A line[kLanes];
    double sum[kLanes];
    true_lines(w, p.begin, line);
    const int64_t place = w.rows.place(p);
    with_plain_exps(w, s.exps + place, s.values + place, base, [&](const auto& plain) {
      lane_sum<A, R>(p.height, sum, [&](int64_t k, int64_t r) {
        return plain(k, r) * (static_cast<A>(k) == line[r] ? A(0) : A(1));
      });
    });
    add_rescaled(older, base, A(1), sum, w.others);
  });
}

// s - t is taken relative to the likeliest class of the weighing distribution (`offset`): only what
// the others add to it moves the gradient. `log_ratio` is log q - log p + (s - t - offset) / T.
template <class A, int64_t R>
void prepare_source(const Distillation& d, const Workspace<A, R>& w, Softmax<A>& source) {
  const bool reverse = d.direction == Direction::reverse;
  const Softmax<A>& s = w.student;
  A anchor[kLanes];
  reverse ? at_likeliest(w.rows, s, source, anchor) : at_likeliest(w.rows, source, s, anchor);
  const A inverse_temperature = w.inverse_temperature;
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    const A difference = reverse ? s.maximum[r] - anchor[r] : anchor[r] - source.maximum[r];
    const A offset = difference - difference == A(0) ? difference : A(0);  // 0 beside -inf
    const A rest = shifted_difference(s.maximum[r], source.maximum[r], offset);
    const A ratio = static_cast<A>(s.total[r]) / static_cast<A>(source.total[r]);
    source.offset[r] = offset;
    source.log_ratio[r] = log_(ratio) + rest * inverse_temperature;
  }
}

// Adds w KL(p || q), or w KL(q || p), to `kl` and, to `slope`, what the gradient needs:
// reverse: w (s - t) / T but for a constant of the row, forward: w (p - q). The log-ratio of p and
// q is formed from s - t, not from two logarithms: near p = q those would cancel.
template <class A, int64_t R>
void add_source(const Distillation& d, const Workspace<A, R>& w, const Softmax<A>& source,
                const Piece& p, const A* prob, A* slope, double* kl) {
  const int64_t place = w.rows.place(p);
  const A *s = w.student.values + place, *t = source.values + place, *exps = source.exps + place;
  const A weight = source.weight, inverse_temperature = w.inverse_temperature;
  A inverse[kLanes], offset[kLanes], log_ratio[kLanes];
  inverse_total(w.rows, source, p, inverse);
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    offset[r] = source.offset[r];
    log_ratio[r] = source.log_ratio[r];
  }
  const auto distance = [&](int64_t at, int64_t r) {
    return shifted_difference(s[at], t[at], offset[r]);
  };
  double share[kLanes];
  if (d.direction == Direction::reverse) {
    const A factor = weight * inverse_temperature;
    lane_sum<A, R>(p.height, share, [&](int64_t k, int64_t r) {
      const int64_t at = k * kLanes + r;
      const A gap = distance(at, r);
      slope[at] += factor * gap;
      return kl_share(prob[at], exps[at] * inverse[r], log_ratio[r] - gap * inverse_temperature);
    });
  } else {
    lane_sum<A, R>(p.height, share, [&](int64_t k, int64_t r) {
      const int64_t at = k * kLanes + r;
      const A q = exps[at] * inverse[r];
      const A x = log_ratio[r] - distance(at, r) * inverse_temperature;  // log q - log p
      slope[at] -= weight * probability_difference(prob[at], q, x);
      return kl_share(q, prob[at], -x);
    });
  }
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) kl[r] += static_cast<double>(weight) * share[r];
}

// Fills w.prob, w.slope and w.mean, and adds the divergences to `kl`.
template <class A, int64_t R>
void divergences(const Distillation& d, Workspace<A, R>& w, double* kl) {
  const bool reverse = d.direction == Direction::reverse;
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) w.mean[r] = 0.0;
  w.rows.for_pieces([&](const Piece& p) {
    A *prob = w.prob + p.begin, *slope = w.slope + p.begin;
    A inverse[kLanes];
    bring_back(w.rows, w.student, p, prob);
    inverse_total(w.rows, w.student, p, inverse);
    for (int64_t k = 0; k < p.height; ++k) {
#pragma omp simd
      for (int64_t r = 0; r < kLanes; ++r) {
        prob[k * kLanes + r] *= inverse[r];
        slope[k * kLanes + r] = A(0);
      }
    }
    for (int64_t j = 0; j < w.active; ++j) {
      const Softmax<A>& source = w.sources.get()[j];
      bring_back(w.rows, source, p, source.exps);
      add_source(d, w, source, p, prob, slope, kl);
    }
    double sum[kLanes];
    lane_sum<A, R>(p.height, sum, [=](int64_t k, int64_t r) {
      const A q = prob[k * kLanes + r], x = slope[k * kLanes + r];
      return reverse ? (q == A(0) ? A(0) : q * x) : x;
    });
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) w.mean[r] += sum[r];
  });
}

// Turns slope into factor * d KL / d logits: reverse (1/T) p (delta - E_p delta), forward
// (1/T) (p - qbar). The latter sums to 0 but for the rounding of log_ratio, which p times the sum
// takes out again.
template <class A, int64_t R>
void divergence_grad(const Distillation& d, const Workspace<A, R>& w, int64_t height, const A* prob,
                     A* slope) {
  const bool reverse = d.direction == Direction::reverse;
  const A factor = static_cast<A>(d.kl_factor) * w.inverse_temperature;
  A mean[kLanes], on[kLanes];
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    mean[r] = static_cast<A>(w.mean[r]);
    on[r] = w.on[r];
  }
  for (int64_t k = 0; k < height; ++k) {
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t at = k * kLanes + r;
      const A p = prob[at];
      const A centred = reverse ? p * (slope[at] - mean[r]) : slope[at] - p * mean[r];
      slope[at] = on[r] == A(0) || (reverse && p == A(0)) ? A(0) : factor * centred;
    }
  }
}

// Adds the cross-entropy's gradient.
template <class A, int64_t R>
void add_cross_entropy_grad(const Distillation& d, const Workspace<A, R>& w,
                            const CrossEntropy<A>& ce, const Piece& piece, const A* prob, A* grad) {
  const A* values = w.student.values + w.rows.place(piece);
  const A factor = static_cast<A>(d.ce_factor);
  A scale[kLanes], on[kLanes], line[kLanes], complement[kLanes];
  true_lines(w, piece.begin, line);
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    on[r] = w.on[r];
    complement[r] = factor * ce.complement[r];
    scale[r] = factor * ce.inverse[r];
    for (int i = 0; i < w.power; ++i) scale[r] *= static_cast<A>(w.student.total[r]);
  }
  with_plain_exps(w, prob, values, w.student.maximum, [&](const auto& plain) {
    for (int64_t k = 0; k < piece.height; ++k) {
      const A number = static_cast<A>(k);
#pragma omp simd
      for (int64_t r = 0; r < kLanes; ++r) {
        const A p = plain(k, r) * (number == line[r] ? A(0) : scale[r]);
        const A residual = p + (number == line[r] ? complement[r] : A(0));
        grad[k * kLanes + r] += on[r] == A(0) ? A(0) : residual;
      }
    }
  });
}

template <class A, int64_t R>
void gradient(const Distillation& d, Workspace<A, R>& w, const CrossEntropy<A>& ce) {
  const bool with_kl = w.active > 0 && d.kl_factor != 0.0;
  w.rows.for_pieces([&](const Piece& p) {
    A *prob = w.prob + p.begin, *slope = w.slope + p.begin;
    if (with_kl) {
      divergence_grad(d, w, p.height, prob, slope);
    } else {
      for (int64_t at = 0; at < p.height * kLanes; ++at) slope[at] = A(0);
    }
    if (d.classes != nullptr) {
      if (w.power == 0 && !w.rows.kept) load(w.rows, w.student, p);
      add_cross_entropy_grad(d, w, ce, p, prob, slope);
    }
    A* grad = static_cast<A*>(d.grad) + w.rows.first * d.K + p.begin;
    if constexpr (R == 1) {
      convert_row(slope, grad, p.count);
    } else {
      permute(slope, w.positions.get() + w.table, grad, w.rows.rows * d.K);
    }
  });
}

// Everything of the rows at hand: their cross-entropies, divergences and gradients.
template <class A, int64_t R>
void some_rows(const Distillation& d, Workspace<A, R>& w, A* loss, double* kl) {
  const bool reverse = d.direction == Direction::reverse;
  for (int64_t r = 0; r < kLanes; ++r) {
    w.classes[r] = d.classes != nullptr && r < w.rows.rows ? d.classes[w.rows.first + r]
                                                           : (d.classes == nullptr ? 0 : -1);
    w.on[r] = r < w.rows.rows && w.classes[r] >= 0 ? A(1) : A(0);
    kl[r] = 0.0;
  }
  for (int64_t r = 1; r < kLanes && R == 1; ++r) w.on[r] = w.on[0];
  student_sums(d, w);
  CrossEntropy<A> ce;
  if (d.classes != nullptr) {
    A true_logit[kLanes];
    true_logits(w, true_logit);
    lane_losses(w.student.maximum, true_logit, w.others, w.on, ce);
    for (int64_t r = 0; r < R; ++r) loss[r] = ce.loss[r];
  }
  for (int64_t j = 0; j < w.active; ++j) {
    softmax_sums(w.rows, w.sources.get()[j], !reverse, [](const Piece&, const A*, const A*) {});
  }
  for (int64_t j = 0; j < w.active; ++j) prepare_source(d, w, w.sources.get()[j]);
  divergences(d, w, kl);
  for (int64_t r = 0; r < R; ++r) kl[r] = w.on[r] != A(0) ? kl[r] : 0.0;
  if (d.grad != nullptr) gradient(d, w, ce);
}

template <class A, int64_t R>
void block(const Distillation& d, Workspace<A, R>& w, int64_t index) {
  const int64_t begin = index * kBlockRows;
  const int64_t end = d.N - begin < kBlockRows ? d.N : begin + kBlockRows;
  double ce_sum = 0.0, kl_sum = 0.0;
  for (int64_t first = begin; first < end; first += R) {
    A loss[kLanes] = {};
    double kl[kLanes];
    if constexpr (R == 1) {
      if (first >= w.copied) copy_group(w, first);
    }
    w.rows.first = first;
    w.rows.rows = end - first < R ? end - first : R;
    some_rows(d, w, loss, kl);
    for (int64_t r = 0; r < w.rows.rows; ++r) {
      ce_sum += static_cast<double>(loss[r]);
      kl_sum += kl[r];
      if (d.row_kl != nullptr) static_cast<A*>(d.row_kl)[first + r] = static_cast<A>(kl[r]);
    }
  }
  d.block_ce[index] = ce_sum;
  d.block_kl[index] = kl_sum;
}

template <class A>
void scale(const ScaleRows& s, ParallelFor threads) {
  parallel_for(threads, s.N, s.K, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(s.K);
    A* row = scratch.get();
    for (int64_t i = begin; i < end; ++i) {
      const A* unit = static_cast<const A*>(s.unit) + i * s.K;
      const A factor = static_cast<A>(s.factors[i * s.factor_stride]);
#pragma omp simd
      for (int64_t k = 0; k < s.K; ++k) row[k] = factor * unit[k];
      store_row(row, s.grad, s.grad_dtype, i, s.K);
    }
  });
}

template <class A, int64_t R>
void run(const Distillation& d, ParallelFor threads) {
  parallel_for(threads, num_blocks(d.N), kBlockRows * d.K * (d.S + 2),
               [&](int64_t begin, int64_t end) {
                 Workspace<A, R> workspace(d);
                 workspace.last = end * kBlockRows < d.N ? end * kBlockRows : d.N;
                 for (int64_t index = begin; index < end; ++index) block(d, workspace, index);
               });
}

}  // namespace

void distillation(const Distillation& d, ParallelFor threads) {
  if (d.K <= kFewClasses) {
    d.wide ? run<double, kLanes>(d, threads) : run<float, kLanes>(d, threads);
  } else {
    d.wide ? run<double, 1>(d, threads) : run<float, 1>(d, threads);
  }
}

void scale_rows(const ScaleRows& s, ParallelFor threads) {
  s.wide ? scale<double>(s, threads) : scale<float>(s, threads);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
