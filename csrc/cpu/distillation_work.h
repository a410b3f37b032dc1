// What one thread works with for Eq. 9: the softmaxes of the student and of the active sources, and
// contiguous copies of matrices whose long rows lie across.
#pragma once

#include "softmax_rows.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

// Rows of a matrix that lies across are copied together: so many, and elements, at most.
inline constexpr int64_t kCopiedRows = 64;
inline constexpr int64_t kCopied = int64_t{1} << 20;

template <class A, int64_t R>
struct Workspace {
  explicit Workspace(const Distillation& d)
      : rows(d.K),
        active(count_active(d)),
        table(R == 1 ? 0 : rows.width),
        storage(2 * rows.full + (3 + 2 * active) * rows.width),
        bases((1 + active) * rows.pieces),
        group(group_rows(d.K)),
        copies(count_across(d) * group * d.K),
        positions((3 + active) * table),
        sources(active),
        inverse_temperature(static_cast<A>(1.0 / d.temperature)),
        power(d.temperature == 1.0   ? 1
              : d.temperature == 2.0 ? 2
                                     : 0) {
    prob = storage.get();
    slope = prob + rows.full;
    staging = slope + rows.full;
    if (R != 1) {
      lane_positions(d.K, d.K, 1, positions.get());
      inverse_positions(d.K, positions.get() + table);
    }
    A* copy = copies.get();
    set(student, d.logits, 1.0, 0, copy);
    student.exps = prob;
    int64_t next = 0;
    for (int64_t j = 0; j < d.S; ++j) {
      if (d.source_weights[j] == 0.0) continue;
      set(sources.get()[next], d.sources[j], d.source_weights[j], next + 1, copy);
      ++next;
    }
  }

  static int64_t count_active(const Distillation& d) {
    int64_t count = 0;
    for (int64_t j = 0; j < d.S; ++j) count += d.source_weights[j] != 0.0 ? 1 : 0;
    return count;
  }

  static int64_t group_rows(int64_t K) {
    const int64_t rows = kCopied / larger(K, int64_t{1});
    return rows > kCopiedRows ? kCopiedRows : larger(rows, int64_t{1});
  }

  static bool is_copied(const Matrix& m) { return R == 1 && lies_across(m); }

  static int64_t count_across(const Distillation& d) {
    int64_t count = is_copied(d.logits) ? 1 : 0;
    for (int64_t j = 0; j < d.S; ++j) {
      count += d.source_weights[j] != 0.0 && is_copied(d.sources[j]) ? 1 : 0;
    }
    return count;
  }

  void set(Softmax<A>& s, const Matrix& m, double weight, int64_t index, A*& copy) {
    constexpr Dtype same = sizeof(A) == 4 ? Dtype::float32 : Dtype::float64;
    int32_t* direct = positions.get() + (2 + index) * table;
    const bool reachable =
        R != 1 && m.dtype == same && lane_positions(rows.K, m.row_stride, m.col_stride, direct);
    s.reader = {m, rows.K, positions.get(), reachable ? direct : nullptr, staging};
    s.across = nullptr;
    s.first = 0;
    if (is_copied(m)) {
      s.across = &m;
      s.reader.matrix = {copy, rows.K, 1, same};
      copy += group * rows.K;
    }
    s.weight = static_cast<A>(weight);
    s.inverse_temperature = inverse_temperature;
    s.values = staging + rows.width + 2 * index * rows.width;
    s.exps = s.values + rows.width;
    s.bases = bases.get() + index * rows.pieces;
  }

  Rows<R> rows;
  int64_t active, table;
  Scratch<A> storage, bases;
  int64_t group;                 // rows copied at once, of matrices that lie across
  int64_t copied = 0, last = 0;  // rows before these are copied, are this workspace's
  Scratch<A> copies;
  Scratch<int32_t> positions;  // tables of `transpose.h`: contiguous rows, back again, each matrix
  Scratch<Softmax<A>> sources;
  A inverse_temperature;
  int power;  // e^a is this power of e^(a / temperature); 0: another exponential
  A *prob, *slope, *staging;
  Softmax<A> student;
  // Of the rows at hand:
  A on[kLanes];  // 0: the row takes no part
  int32_t classes[kLanes];
  double others[kLanes];  // sums of e^(a - maximum) but for the true class
  double mean[kLanes];    // of slope: what takes the gradient's sum over the classes to 0
};

// Copies the next rows of matrices that lie across.
template <class A>
void copy_group(Workspace<A, 1>& w, int64_t first) {
  const int64_t rows = w.last - first < w.group ? w.last - first : w.group;
  w.copied = first + rows;
  const auto copy = [&](Softmax<A>& s) {
    if (s.across == nullptr) return;
    A* to = static_cast<A*>(const_cast<void*>(s.reader.matrix.data));
    load_rows(*s.across, first, rows, 0, w.rows.K, to, w.rows.K);
    s.first = first;
  };
  copy(w.student);
  for (int64_t j = 0; j < w.active; ++j) copy(w.sources.get()[j]);
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
