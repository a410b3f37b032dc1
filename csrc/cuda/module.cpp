// The Python module _cuda, the library of everything compiled by nvcc. It holds no ops yet: the
// device facts below are what `pycdgkd doctor` needs, and they prove that the library builds and
// loads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA library of pycdgkd.";
  m.def("runtime_version", &pycdgkd::cuda::runtime_version, "CUDA runtime, e.g. 13000.");
  m.def(
      "devices",
      [] {
        py::list list;
        for (const auto& device : pycdgkd::cuda::devices()) {
          py::dict entry;
          entry["name"] = device.name;
          entry["compute_capability"] = py::make_tuple(device.major, device.minor);
          entry["multiprocessors"] = device.multiprocessors;
          entry["memory_bytes"] = device.memory_bytes;
          list.append(entry);
        }
        return list;
      },
      "The machine's GPUs; an empty list where there is no device or no driver.");
}
