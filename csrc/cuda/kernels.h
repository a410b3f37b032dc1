// The seam between the CUDA kernels and the ops that launch them: one plain struct and one launcher
// an op. Letters and `wide` are those of ../kernels.h. Every pointer is a device pointer; what only
// the device knows (labels, weights, counts) stays there, so that no launcher ever waits for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels.h"
#include "simt.cuh"

namespace pycdgkd {
namespace cuda {

inline constexpr int64_t kFewClasses = 32;  // pycdgkd/ops/registration.py: FEW_CLASSES

enum class LabelType : int32_t { int64, int32, uint8 };

// Null data: no labels, every row takes part.
struct Labels {
  const void* data;
  int64_t stride;
  LabelType type;
  int64_t ignore_index;
};

// Classes with count 0 take no part; null: all do.
struct ClassCounts {
  const int64_t* data;
  int64_t stride;
};

// A floating vector, or with stride 0 one value for all; null: not given.
struct Values {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

// ---- Eq. 1 --------------------------------------------------------------------------------------

struct ClassMeans {
  int64_t N, D, K;
  bool wide;
  Matrix features;
  Labels labels;
  int64_t* counts;  // (K,)
  void* means;      // (K, D)
  void* workspace;  // class_means_bytes(N, D, K)
};
size_t class_means_bytes(int64_t N, int64_t D, int64_t K);
void class_means(const ClassMeans&, Stream);

struct ClassMeansBackward {
  int64_t N, D, K;
  bool wide;
  Labels labels;
  const int64_t* counts;
  Matrix grad_means;  // (K, D)
  void* grad;         // (N, D) of grad_dtype, contiguous
  Dtype grad_dtype;
};
void class_means_backward(const ClassMeansBackward&, Stream);

// ---- Eqs. 2-6 -----------------------------------------------------------------------------------

// Writes an array as CentrePrototypes of ../kernels.h describes it.
struct Centre {
  int64_t D, K;
  bool wide;
  double scale;
  Matrix prototypes;
  ClassCounts counts;
  void* centred;
};
void centre_prototypes(const Centre&, Stream);

// One modality; centred by centre_prototypes. Null outputs are not wanted.
struct Modality {
  int64_t D;
  Matrix features;
  const void* centred;
  void* residual;   // (N, K): P - Y, the true class's entry by complement; few classes only
  void* row_loss;   // (N,)
  void* true_prob;  // (N,)
};

// What the last block of a forward pass leaves, in double: cross-entropy sum, rows with a class,
// rows with a class that has a prototype, then losses (M,), rates (M,) and the coefficients of the
// gradients of the logits and of each modality (1 + M,).
inline constexpr int64_t statistics_size(int64_t M) { return 4 + 3 * M; }

// Results of the arithmetic type; null: not wanted.
struct Results {
  void* loss;            // ()
  void* cross_entropy;   // ()
  void* losses;          // (M,)
  void* rates;           // (M,)
  void* weights;         // (M,)
  double* statistics;    // (statistics_size(M),), never null
};

enum class Reduction : int64_t { none, mean, sum };

struct Teacher {
  int64_t N, K, M;
  bool wide;
  double scale, proto_weight;
  Matrix logits;  // null data: no cross-entropy
  void* logits_residual;  // (N, K): its P - Y times (1 - proto_weight) / rows
  const Modality* modalities;  // (M,) on the host
  Labels labels;
  ClassCounts counts;
  Reduction reduction;  // of a single modality's loss without logits
  Results results;
  void* workspace;  // teacher_bytes(N, M)
};
size_t teacher_bytes(int64_t N, int64_t M);
void teacher(const Teacher&, Stream);

// ---- Eq. 9 --------------------------------------------------------------------------------------

inline constexpr int64_t kMostSources = 64;

struct Distillation {
  int64_t N, K, S;
  bool wide;
  double temperature;
  Direction direction;
  Matrix logits;
  const Matrix* sources;  // (S,) on the host, S <= kMostSources; those of weight 0 are never read
  Values source_weights;  // null: 1/S each
  Labels labels;          // null data: the divergence alone
  double ce_weight, kl_weight;
  Reduction reduction;  // over the rows that take part; `none` leaves only row_kl
  void* row_kl;         // (N,) or null
  void* grad;           // (N, K): d loss / d logits, or null
  void* loss;           // ()
  void* cross_entropy;  // () or null
  void* kl;             // () or null
  void* workspace;      // distillation_bytes(...)
};
size_t distillation_bytes(const Distillation&);
void distillation(const Distillation&, Stream);

// grad_ij = factors_i unit_ij, in grad_dtype; one factor serves all rows where its stride is 0.
struct ScaleRows {
  int64_t N, K;
  bool wide;
  Values factors;
  const void* unit;  // (N, K), contiguous
  void* grad;        // (N, K) of grad_dtype, contiguous
  Dtype grad_dtype;
};
void scale_rows(const ScaleRows&, Stream);

// A counter of blocks, zero before and after every launch that uses it: one of a ring that no two
// launches in flight share, or, in a graph being captured, `own` (4 bytes of the launch's own
// workspace, zeroed first), because a graph may run beside anything later.
unsigned* take_counter(void* own, Stream);

}  // namespace cuda
}  // namespace pycdgkd
