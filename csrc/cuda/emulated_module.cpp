// The Python module _cuda_emulated: importing it replaces this process's CPU ops by the CUDA ones,
// run on the CPU (emulator.h).
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda_emulated, m) { m.doc() = "CUDA kernels of pycdgkd, emulated for tests."; }
