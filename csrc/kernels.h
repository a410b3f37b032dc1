// The seam between the kernels and everything that knows torch or Python: plain structs of
// pointers, sizes and strides (in elements), and one table of functions for each instruction set.
//
// Letters: N rows, D feature width, K classes, S sources. "A" is the arithmetic type: double for
// float64 data, float for all other; `wide` says which. Arrays typed void* hold A unless said
// otherwise. A null output pointer means: not wanted.
#pragma once

#include <cstdint>

namespace pycdgkd {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };
enum class Direction : int32_t { reverse, forward };

// Rows are cut into blocks of this many, whatever the number of threads, and each block's sums are
// kept apart until they are added in order: same bits for every thread count.
inline constexpr int64_t kBlockRows = 16;
inline constexpr int64_t num_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* context);

struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
  Dtype dtype;
};

// Eq. 1: class means in one pass, accumulated in double.
struct ClassMeans {
  int64_t N, D, K;
  bool wide;
  Matrix features;
  const int32_t* classes;  // (N,) class of each row, negative: the row takes no part
  const int64_t* counts;   // (K,)
  void* means;             // (K, D)
};

struct ClassMeansBackward {
  int64_t N, D, K;
  bool wide;
  const int32_t* classes;
  const int64_t* counts;
  Matrix grad_means;  // (K, D)
  void* grad;         // (N, D) of grad_dtype, contiguous
  Dtype grad_dtype;
};

// Prototypes moved to the mean of the active ones: distances do not change, cancellation does. They
// lie in one array of A: the mean (width(D)), then the K rows c_k - mean (width(D) each, zeros for
// absent classes), then, of two classes, the difference of the rows, and at last the bias (K,):
// -scale |c_k - mean|^2, -inf for absent classes. Rows are padded with zeros to whole vectors.
inline constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }
inline constexpr int64_t centred_rows(int64_t K) { return K == 2 ? 3 : K; }
inline constexpr int64_t centred_size(int64_t D, int64_t K) {
  return (1 + centred_rows(K)) * padded(D) + padded(K);
}

struct CentrePrototypes {
  int64_t D, K;
  bool wide;
  double scale;
  Matrix prototypes;
  const uint8_t* active;  // (K,)
  void* centred;          // (centred_size(D, K),)
};

// Eqs. 2-4 for one modality.
struct PrototypeForward {
  int64_t N, D, K;
  bool wide;
  double scale;
  Matrix features;
  const void* centred;
  const int32_t* classes;  // (N,), negative: the row takes no part
  void* row_loss;          // (N,)
  void* true_prob;         // (N,)
  void* residual;          // (N, K): P - Y, the true class's entry by complement
  double* block_loss;      // (num_blocks(N),)
  double* block_rate;      // (num_blocks(N),)
};

// grad_z_i = factor * row_factor_i * sum_k residual_ik (c_k - mean); factor 0 writes zeros.
struct PrototypeBackward {
  int64_t N, D, K;
  bool wide;
  double factor;
  const void* row_factor;  // (N,) or null for 1
  const void* residual;
  const void* centred;
  void* grad;  // (N, D) of grad_dtype, contiguous
  Dtype grad_dtype;
};

// grad_c_k = factor * sum_i row_factor_i residual_ik ((z_i - mean) - (c_k - mean)).
struct PrototypeGrad {
  int64_t N, D, K;
  bool wide;
  double factor;
  const void* row_factor;
  const void* residual;
  Matrix features;
  const void* centred;
  void* grad;  // (K, D)
};

// For many classes the products with all prototypes come from a matrix product, a block of rows at
// a time. First the block's operand z - mean, then its softmax.
struct CentreRows {
  int64_t N, D;
  bool wide;
  Matrix features;
  const int32_t* classes;  // (N,), negative: a row of zeros, whatever the features hold there
  const void* mean;
  void* rows;  // (N, D)
};

// Eqs. 2-4 from `products` = (z - mean) (c - mean)^T, which is overwritten by row_factor_i (P - Y).
struct SoftmaxRows {
  int64_t N, K;
  bool wide;
  double scale;
  const void* bias;
  const int32_t* classes;  // (N,), negative: the row takes no part
  const void* row_factor;  // (N,) or null for 1
  void* products;          // (N, K)
  void* row_loss;          // (N,)
  void* true_prob;         // (N,)
  double* loss;            // their sums
  double* rate;
};

// Eq. 9: cross-entropy at temperature 1 and the weighted divergences to S sources. With S = 0 it is
// plain cross-entropy, with classes null it is the divergence alone.
struct Distillation {
  int64_t N, K, S;
  bool wide;
  double temperature;
  Direction direction;
  Matrix logits;
  const Matrix* sources;         // (S,); those of weight 0 are never read
  const double* source_weights;  // (S,)
  const int32_t* classes;        // (N,) or null; negative: the row takes no part
  double ce_factor;              // d loss / d (row's cross-entropy)
  double kl_factor;              // d loss / d (row's divergence)
  void* row_kl;                  // (N,)
  void* grad;                    // (N, K): d loss / d logits
  double* block_ce;              // (num_blocks(N),)
  double* block_kl;              // (num_blocks(N),)
};

// grad_ij = factors_i unit_ij, in grad_dtype; one factor serves all rows where factor_stride is 0.
struct ScaleRows {
  int64_t N, K;
  bool wide;
  const double* factors;
  int64_t factor_stride;
  const void* unit;  // (N, K)
  void* grad;        // (N, K) of grad_dtype, contiguous
  Dtype grad_dtype;
};

// An array of up to four dimensions.
struct Strided {
  const void* data;
  int64_t strides[4];
  Dtype dtype;
};

// TSception's first layer: out_btcm = mean over p < pool of f(bias_t + sum_i weight_ti
// eeg_bc,(m pool + p + i)), where f(x) = x for x > 0, else slope x.
struct TemporalConv {
  int64_t B, C, L, T, k, pool, M;
  bool wide;
  double slope;
  Strided eeg;    // (B, C, L)
  Matrix weight;  // (T, k)
  Matrix bias;    // (1, T)
  void* out;      // (B, T, C, M) of out_dtype, contiguous
  Dtype out_dtype;
};

// The kernels' gradients are summed by blocks of rows (b, c), at most 64 of them.
inline constexpr int64_t temporal_conv_block(int64_t rows) {
  return num_blocks(rows / 64 + 1) * kBlockRows;
}

struct TemporalConvBackward {
  TemporalConv conv;   // without out
  Strided grad;        // (B, T, C, M)
  void* grad_eeg;      // (B, C, L) of conv.out_dtype, contiguous
  double* block_sums;  // (blocks, T, k + 1): of each kernel, and of its bias
};

struct Kernels {
  const char* isa;
  void (*class_means)(const ClassMeans&, ParallelFor);
  void (*class_means_backward)(const ClassMeansBackward&, ParallelFor);
  void (*centre_prototypes)(const CentrePrototypes&);
  void (*prototype_forward)(const PrototypeForward&, ParallelFor);
  void (*prototype_backward)(const PrototypeBackward&, ParallelFor);
  void (*prototype_grad)(const PrototypeGrad&, ParallelFor);
  void (*centre_rows)(const CentreRows&);
  void (*softmax_rows)(const SoftmaxRows&);
  void (*distillation)(const Distillation&, ParallelFor);
  void (*scale_rows)(const ScaleRows&, ParallelFor);
  void (*temporal_conv)(const TemporalConv&, ParallelFor);
  void (*temporal_conv_backward)(const TemporalConvBackward&, ParallelFor);
  void (*exp_float)(const float* x, float* y, int64_t count);
  void (*exp_double)(const double* x, double* y, int64_t count);
  void (*log_float)(const float* x, float* y, int64_t count);
  void (*log_double)(const double* x, double* y, int64_t count);
};

namespace cpu {

// The best table that this processor can run; PYCDGKD_ISA=baseline|avx2|avx512 forces another (a
// name that is not available is an error). Decided once, at the first call.
const Kernels& kernels();

// Comma-separated names of the tables in this build, best last.
const char* compiled_isas();

}  // namespace cpu
}  // namespace pycdgkd
