// The softmax of R rows of one matrix (see lanes.h for the two layouts), in pieces of classes that
// stay in the nearest cache.
#pragma once

#include "transpose.h"
#include "turn.h"

namespace pycdgkd {
namespace PYCDGKD_ISA {

inline constexpr int64_t kPieceClasses = 1024;
// Up to here the exponentials of all pieces are kept (they fit the second cache); beyond, computing
// them again is cheaper than writing and reading them.
inline constexpr int64_t kKeptClasses = 65536;

struct Piece {
  int64_t index, begin, count, height;
};

// How rows of K classes are cut, and which rows are at hand.
template <int64_t R>
struct Rows {
  explicit Rows(int64_t classes)
      : K(classes),
        piece(R != 1 || K < kPieceClasses ? K : kPieceClasses),
        pieces(piece > 0 ? (K + piece - 1) / piece : 0),
        kept(K <= kKeptClasses),
        width(lane_height<R>(kept ? K : piece) * kLanes),
        full(lane_height<R>(K) * kLanes) {}

  template <class Body>
  void for_pieces(const Body& body) const {
    for (int64_t index = 0; index < pieces; ++index) {
      const int64_t begin = index * piece;
      const int64_t count = K - begin < piece ? K - begin : piece;
      body(Piece{index, begin, count, lane_height<R>(count)});
    }
  }
  // Where a piece lies in arrays of `width`.
  int64_t place(const Piece& p) const { return kept ? p.begin : 0; }

  int64_t K, piece, pieces;
  bool kept;
  int64_t width, full;
  int64_t first = 0, rows = 0;
};

template <class A>
struct Softmax {
  BlockReader<A> reader;
  const Matrix* across;  // null, or: the reader has contiguous copies of this one's rows, from
  int64_t first;         // row `first` on
  A weight;
  A inverse_temperature;
  A *values, *exps;  // logits and their exponentials; of the piece at hand, unless kept
  A* bases;          // (pieces,): a piece's exponentials are relative to the maximum so far
  A maximum[kLanes];
  double total[kLanes];                 // of the exponentials, relative to the maximum
  int64_t likeliest;                    // class of the maximum (R = 1)
  A offset[kLanes], log_ratio[kLanes];  // of a source, see prepare_source
};

// Columns [column, column + count) of the row at hand (R = 1).
template <class A>
void load_at_hand(const Rows<1>& rows, const Softmax<A>& s, int64_t column, int64_t count, A* to) {
  load_row(s.reader.matrix, rows.first - s.first, column, to, 1, count);
}

template <class A, int64_t R>
void load(const Rows<R>& rows, const Softmax<A>& s, const Piece& p) {
  A* values = s.values + rows.place(p);
  if constexpr (R == 1) {
    load_at_hand(rows, s, p.begin, p.count, values);
    for (int64_t j = p.count; j < p.height * kLanes; ++j) {
      values[j] = -std::numeric_limits<A>::infinity();
    }
  } else {
    s.reader.load(rows.first, rows.rows, values);
  }
}

// Exponentials of a loaded piece; what load() will read next of this matrix is fetched meanwhile.
template <class A, int64_t R>
void exponentials(const Rows<R>& rows, const Softmax<A>& s, const Piece& p, const A* base, A* exps,
                  double* sum) {
  const Matrix& m = s.reader.matrix;
  const int64_t end = p.begin + p.count, row = rows.first - s.first;
  const int64_t next = end < rows.K ? row * m.row_stride + end : (row + rows.rows) * m.row_stride;
  const A* values = s.values + rows.place(p);
  const bool dense = m.col_stride == 1 && (R == 1 || m.row_stride == rows.K);
  const auto* ahead = dense ? static_cast<const char*>(m.data) + next * size_of(m.dtype)
                            : reinterpret_cast<const char*>(values);
  lane_exps<A, R>(values, p.height, base, s.inverse_temperature, exps, sum, ahead,
                  dense ? kLanes * size_of(m.dtype) : 0);
}

// Adds a piece's sums to `total`, which is relative to an older maximum.
template <class A>
void add_rescaled(const A* older, const A* base, A factor, const double* sum, double* total) {
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) {
    const A rescale = exp_nonpositive((older[r] - base[r]) * factor);
    total[r] = total[r] * static_cast<double>(rescale) + sum[r];
  }
}

// Maximum and sum of exponentials of the rows, and the class of the maximum if `find` (R = 1).
// each_piece(p, older, base) sees each piece with its exponentials and the maxima before and with
// it.
template <class A, int64_t R, class EachPiece>
void softmax_sums(const Rows<R>& rows, Softmax<A>& s, bool find, const EachPiece& each_piece) {
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) s.maximum[r] = -std::numeric_limits<A>::infinity();
  s.likeliest = 0;
  rows.for_pieces([&](const Piece& p) {
    load(rows, s, p);
    A older[kLanes], base[kLanes], maximum[kLanes];
    double sum[kLanes];
    const A* values = s.values + rows.place(p);
    lane_max<A, R>(values, p.height, maximum);
    if (R == 1 && find && maximum[0] > s.maximum[0]) {
      s.likeliest = p.begin + class_of_maximum(values, maximum, p.height);
    }
#pragma omp simd
    for (int64_t r = 0; r < kLanes; ++r) {
      older[r] = s.maximum[r];
      s.maximum[r] = larger(maximum[r], older[r]);
      // Nothing but -inf so far: sums of 0, not NaN.
      const bool none = s.maximum[r] == -std::numeric_limits<A>::infinity();
      base[r] = none ? A(0) : s.maximum[r];
    }
    s.bases[p.index] = s.maximum[0];
    exponentials(rows, s, p, base, s.exps + rows.place(p), sum);
    if (p.index == 0) {
#pragma omp simd
      for (int64_t r = 0; r < kLanes; ++r) s.total[r] = sum[r];
    } else {
      add_rescaled(older, base, s.inverse_temperature, sum, s.total);
    }
    each_piece(p, older, base);
  });
}

// Loads a piece again and computes its exponentials again, relative to the maximum, unless kept.
template <class A, int64_t R>
void bring_back(const Rows<R>& rows, const Softmax<A>& s, const Piece& p, A* exps) {
  if (rows.kept) return;
  double sum[kLanes];
  load(rows, s, p);
  exponentials(rows, s, p, s.maximum, exps, sum);
}

// Probabilities are exponentials times this.
template <class A, int64_t R>
void inverse_total(const Rows<R>& rows, const Softmax<A>& s, const Piece& p, A* inverse) {
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) inverse[r] = A(1) / static_cast<A>(s.total[r]);
  if (rows.pieces == 1 || !rows.kept) return;
  const A base = (s.bases[p.index] - s.maximum[0]) * s.inverse_temperature;
#pragma omp simd
  for (int64_t r = 0; r < kLanes; ++r) inverse[r] *= exp_nonpositive(base);
}

// value = what `other` has for the class that is `weighing`'s maximum.
template <class A, int64_t R>
void at_likeliest(const Rows<R>& rows, const Softmax<A>& weighing, const Softmax<A>& other,
                  A* value) {
  if constexpr (R == 1) {
    load_at_hand(rows, other, weighing.likeliest, 1, value);
    for (int64_t r = 1; r < kLanes; ++r) value[r] = value[0];
  } else {
    lane_at_maximum(weighing.values, weighing.maximum, other.values, rows.K, value);
  }
}

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
