// One table of kernels for each instruction set this file is compiled for.
#include "rows.h"

#define PYCDGKD_STRING(x) #x
#define PYCDGKD_NAME(x) PYCDGKD_STRING(x)

namespace pycdgkd {
namespace PYCDGKD_ISA {

void class_means(const ClassMeans&, ParallelFor);
void class_means_backward(const ClassMeansBackward&, ParallelFor);
void centre_prototypes(const CentrePrototypes&);
void prototype_forward(const PrototypeForward&, ParallelFor);
void prototype_backward(const PrototypeBackward&, ParallelFor);
void prototype_grad(const PrototypeGrad&, ParallelFor);
void centre_rows(const CentreRows&);
void softmax_rows(const SoftmaxRows&);
void distillation(const Distillation&, ParallelFor);
void scale_rows(const ScaleRows&, ParallelFor);
void temporal_conv(const TemporalConv&, ParallelFor);
void temporal_conv_backward(const TemporalConvBackward&, ParallelFor);

namespace {

template <class A>
void exp_array(const A* x, A* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] = exp_(x[j]);
}

template <class A>
void log_array(const A* x, A* y, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] = log_(x[j]);
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    PYCDGKD_NAME(PYCDGKD_ISA),
    class_means,
    class_means_backward,
    centre_prototypes,
    prototype_forward,
    prototype_backward,
    prototype_grad,
    centre_rows,
    softmax_rows,
    distillation,
    scale_rows,
    temporal_conv,
    temporal_conv_backward,
    exp_array<float>,
    exp_array<double>,
    log_array<float>,
    log_array<double>,
};

}  // namespace PYCDGKD_ISA
}  // namespace pycdgkd
