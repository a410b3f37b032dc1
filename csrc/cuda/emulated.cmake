# The CUDA kernels as they are, run on the CPU by csrc/cuda/emulator.h: for tests, never installed
# with a release. Importing the module makes the CPU ops of its process compute with them.
if(PYCDGKD_EMULATE_CUDA)
  set(emulated_sources "")
  foreach(kernel ${cuda_kernels})
    get_filename_component(name ${kernel} NAME_WE)
    set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/emulated/${name}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${kernel}\"\n")
    list(APPEND emulated_sources "${wrapper}")
  endforeach()
  pybind11_add_module(_cuda_emulated MODULE NO_EXTRAS csrc/cuda/emulated_module.cpp
                      csrc/cuda/emulator.cpp ${cuda_ops} ${emulated_sources})
  target_compile_definitions(_cuda_emulated PRIVATE PYCDGKD_EMULATE)
  target_include_directories(_cuda_emulated PRIVATE csrc csrc/cuda)
  # The words of CUDA that mean nothing here are macros without effect.
  target_compile_options(_cuda_emulated PRIVATE -Wno-unknown-pragmas)
  target_link_libraries(_cuda_emulated PRIVATE pycdgkd_options torch_stable)
  set_target_properties(_cuda_emulated PROPERTIES INSTALL_RPATH "$ORIGIN/../torch/lib"
                                                  BUILD_WITH_INSTALL_RPATH TRUE)
  install(TARGETS _cuda_emulated LIBRARY DESTINATION pycdgkd)
endif()
