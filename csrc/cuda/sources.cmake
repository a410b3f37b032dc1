# What computes the losses on CUDA tensors: kernels for nvcc, ops for the C++ compiler.
set(cuda_kernels csrc/cuda/counters.cu)
set(cuda_ops csrc/cuda_stream.cpp)
