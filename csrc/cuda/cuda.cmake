# The second library, _cuda: what it takes to build it, decided here and nowhere else.
# AUTO uses nvcc if it is there and says so, ON without one is an error, OFF is quiet.
if(NOT PYCDGKD_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF) # the list below is given to nvcc as it is
    enable_language(CUDA)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known_archs
                    COMMAND_ERROR_IS_FATAL ANY)
    set(cuda_flags "")
    foreach(arch ${PYCDGKD_CUDA_ARCHS})
      if(NOT arch MATCHES "^[0-9]+$")
        message(FATAL_ERROR "PYCDGKD_CUDA_ARCHS: expected numbers such as 80;90, got '${arch}'")
      endif()
      if(known_archs MATCHES "compute_${arch}\n")
        list(APPEND cuda_flags "--generate-code=arch=compute_${arch},code=sm_${arch}")
        string(APPEND cuda_archs "${arch},")
        set(newest_arch ${arch})
      endif()
    endforeach()
    if(NOT newest_arch)
      message(FATAL_ERROR "PYCDGKD_CUDA_ARCHS: this nvcc knows none of ${PYCDGKD_CUDA_ARCHS}")
    endif()
    list(APPEND cuda_flags
         "--generate-code=arch=compute_${newest_arch},code=compute_${newest_arch}")
    string(APPEND cuda_archs "ptx")
    set(with_cuda 1)
    message(STATUS "pycdgkd: CUDA library with ${CMAKE_CUDA_COMPILER} for ${cuda_archs}")

    pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/module.cpp csrc/cuda/device.cu
                        ${cuda_ops} ${cuda_kernels})
    # The kernels are built where torch is, but link nothing of it that only a CUDA build has.
    target_include_directories(_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    list(APPEND cuda_flags --expt-relaxed-constexpr)
    if(PYCDGKD_WERROR)
      list(APPEND cuda_flags --Werror=all-warnings --compiler-options=-Wall,-Wextra,-Werror)
    endif()
    target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>)
    target_link_libraries(_cuda PRIVATE pycdgkd_options torch_stable)
    set_target_properties(
      _cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17
                       INSTALL_RPATH "$ORIGIN/../torch/lib" BUILD_WITH_INSTALL_RPATH TRUE)
    install(TARGETS _cuda LIBRARY DESTINATION pycdgkd)
  elseif(PYCDGKD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PYCDGKD_CUDA=ON, but no nvcc was found; install the CUDA toolkit, set "
                        "CUDACXX to its nvcc, or use PYCDGKD_CUDA=AUTO")
  else()
    message(STATUS "pycdgkd: no nvcc found, building without the CUDA library")
  endif()
endif()
