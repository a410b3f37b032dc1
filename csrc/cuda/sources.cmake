# What computes the losses on CUDA tensors: kernels for nvcc, ops for the C++ compiler.
set(cuda_kernels
    csrc/cuda/class_means.cu csrc/cuda/counters.cu csrc/cuda/distillation.cu
    csrc/cuda/distillation_cluster.cu csrc/cuda/distillation_long.cu csrc/cuda/distillation_short.cu csrc/cuda/many_classes.cu
    csrc/cuda/scale_grads.cu csrc/cuda/teacher.cu csrc/cuda/teacher_backward.cu csrc/cuda/teacher_cluster.cu)
set(cuda_ops csrc/cuda_distillation_ops.cpp csrc/cuda_many_classes.cpp csrc/cuda_prototype_ops.cpp
             csrc/cuda_stream.cpp csrc/cuda_teacher_ops.cpp)
