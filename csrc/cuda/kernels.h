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

inline constexpr int64_t kFewClasses = 32;  // pycdgkd/ops/registration.py: few_classes

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
  int64_t N, K;
  bool wide;
  Labels labels;
  int64_t* counts;  // (K,)
};
// One of the arrays whose rows are averaged.
struct Averaged {
  int64_t D;
  Matrix features;
  void* means;  // (K, D)
};
// `averaged` (M,) lies on the host; so does it in class_means_bytes.
size_t class_means_bytes(const ClassMeans&, const Averaged* averaged, int64_t M);
void class_means(const ClassMeans&, const Averaged* averaged, int64_t M, void* workspace, Stream);

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

enum class Reduction : int64_t { none, mean, sum };

// One modality. Null outputs are not wanted.
struct Modality {
  int64_t D;
  Matrix features;
  Matrix prototypes;  // (K, D)
  void* centred;      // written as CentrePrototypes of ../kernels.h describes it
  void* residual;     // (N, K): P - Y, the true class's entry by complement
  void* row_loss;     // (N,)
  void* true_prob;    // (N,)
};

// What the last block of a forward pass leaves, in double: cross-entropy sum, rows with a class,
// rows with a class that has a prototype, then losses (M,), rates (M,) and the coefficients of the
// gradients of the logits and of each modality (1 + M,).
inline constexpr int64_t statistics_size(int64_t M) { return 4 + 3 * M; }

// Results of the arithmetic type; null: not wanted.
struct Results {
  void* loss;           // ()
  void* cross_entropy;  // ()
  void* losses;         // (M,)
  void* rates;          // (M,)
  void* weights;        // (M,)
  double* statistics;   // (statistics_size(M),), never null in Teacher
};

// Eqs. 2-6 in one launch. Of more than kFewClasses classes, many_classes was launched for each
// modality before, and what it left in row_loss and true_prob is summed.
struct Teacher {
  int64_t N, K, M;
  bool wide;
  double scale, proto_weight;
  Matrix logits;               // null data: no cross-entropy
  void* logits_residual;       // (N, K): its P - Y
  const Modality* modalities;  // (M,) on the host
  Labels labels;
  ClassCounts counts;
  Reduction reduction;  // without logits: of the first modality's loss
  Results results;
};
size_t teacher_bytes(const Teacher&);
void teacher(const Teacher&, void* workspace, Stream);

// Eqs. 1-6 of a small batch in one launch, which also makes the gradients for grad_loss = 1.
inline constexpr int64_t kMostSmallModalities = 8;
struct SmallModality {
  int64_t D;
  Matrix features;    // of the arithmetic type
  Matrix prototypes;  // (K, D), unless they are the class means of this batch
  void* grad;         // (N, D), contiguous, or null
};
struct SmallTeacher {
  int64_t N, K, M;  // K <= kFewClasses, M <= kMostSmallModalities
  bool wide;
  double scale, proto_weight;
  bool batch_means;
  Matrix logits;
  const SmallModality* modalities;  // (M,) on the host
  Labels labels;
  ClassCounts counts;
  void* grad_logits;  // (N, K), contiguous, or null
  Results results;    // without statistics
};
// False, and nothing done, where the device has no cluster of blocks that holds the batch.
bool small_teacher(const SmallTeacher&, Stream);

// grad = factor unit, for M arrays in one launch; zeros for a factor 0.
struct ScaledGrad {
  int64_t count;
  const void* unit;  // of the arithmetic type
  void* grad;        // of dtype; `unit` itself is scaled in place
  Dtype dtype;
};
struct ScaleGrads {
  int64_t M;
  bool wide;
  Values factor;            // one value
  const ScaledGrad* grads;  // (M,) on the host
};
void scale_grads(const ScaleGrads&, Stream);

// Eq. 6 for M rates.
void modality_weights(const Values& rates, int64_t M, bool wide, void* weights, Stream);

// The product of what is given; where it is 0, zeros are written whatever else there is.
struct Factor {
  double constant;
  Values by_row;      // null, one value for all, or one a row
  const double* one;  // null or one value
};

struct ModalityBackward {
  int64_t D;
  Factor factor;
  const void* residual;  // (N, K)
  const void* centred;
  void* grad;  // (N, D) of grad_dtype, contiguous, or null
  Dtype grad_dtype;
};

// The gradients of the logits and of all features of few classes, in one launch.
struct TeacherBackward {
  int64_t N, K, M;
  bool wide;
  Factor logits_factor;
  const void* logits_residual;
  void* grad_logits;  // (N, K), contiguous, or null
  Dtype logits_dtype;
  const ModalityBackward* modalities;  // (M,) on the host
};
void teacher_backward(const TeacherBackward&, Stream);

// grad_c_k = factor sum_i residual_ik ((z_i - mean) - (c_k - mean)), few classes.
struct PrototypeGrad {
  int64_t N, D, K;
  bool wide;
  Factor factor;
  const void* residual;
  Matrix features;
  const void* centred;
  void* grad;  // (K, D)
};
size_t prototype_grad_bytes(const PrototypeGrad&);
void prototype_grad(const PrototypeGrad&, void* workspace, Stream);

// ---- many classes: what lies around the products with all prototypes ----------------------------

struct Centre {
  int64_t D, K;
  bool wide;
  double scale;
  Matrix prototypes;
  ClassCounts counts;
  void* centred;
};
size_t centre_bytes(int64_t D, int64_t K);
void centre_prototypes(const Centre&, void* workspace, Stream);

// Rows that take part, as a double.
void count_rows(int64_t N, int64_t K, const Labels&, const ClassCounts&, double* rows, Stream);

// rows = z - mean of the N rows from `first` on; those that take no part become zeros.
struct CentreRows {
  int64_t first, N, D, K;
  bool wide;
  Matrix features;
  Labels labels;
  ClassCounts counts;
  const void* mean;
  void* rows;  // (N, D)
};
void centre_rows(const CentreRows&, Stream);

// Eqs. 2-4 from `products` = (z - mean) (c - mean)^T, which become factor (P - Y).
struct SoftmaxRows {
  int64_t first, N, K;
  bool wide, need_grad;
  double scale;
  const void* bias;
  Labels labels;
  ClassCounts counts;
  Factor factor;
  const double* rows;  // null, or what the factor is divided by: max(rows, 1)
  void* products;      // (N, K)
  void* row_loss;      // (all rows,) or null
  void* true_prob;     // (all rows,) or null
};
void softmax_rows(const SoftmaxRows&, Stream);

// grad_c_k = product_k - (sum_i residual_ik) (c_k - mean), added to what is there but for the
// first.
struct AddPrototypes {
  int64_t N, D, K;
  bool wide, first;
  const void* residual;  // (N, K)
  const void* rows;      // c_k - mean, padded(D) apart
  const void* product;   // (K, D): sum_i residual_ik (z_i - mean)
  void* grad;            // (K, D)
};
void add_prototypes(const AddPrototypes&, Stream);

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
  void* grad;           // (N, K) of grad_dtype: d loss / d logits, or null
  Dtype grad_dtype;     // arithmetic, or bfloat16 of such logits
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
  const void* unit;  // (N, K), contiguous, arithmetic or bfloat16
  Dtype unit_dtype;
  void* grad;  // (N, K) of grad_dtype, contiguous; `unit` itself is scaled in place
  Dtype grad_dtype;
};
void scale_rows(const ScaleRows&, Stream);

// `count` counters of blocks, zero before and after every launch that uses them: from a ring of
// which no two launches in flight share any, or, in a graph being captured, at `own` (4 bytes each
// of the launch's own workspace, zeroed first), because a graph may run beside anything later.
unsigned* take_counters(void* own, unsigned count, Stream);

}  // namespace cuda
}  // namespace pycdgkd
