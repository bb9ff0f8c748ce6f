# Which GPUs to build for: CMAKE_CUDA_ARCHITECTURES, else CUDAARCHS of the environment; else machine
# code for every GPU of this machine; where none is seen, machine code for 9.0, the most common of
# datacentres, and PTX of 8.0, which the driver compiles at first use on every other GPU since
# Ampere. 8.0 is the oldest that the kernels run on: they need asynchronous copies and bf16.
function(mbkern_cuda_architectures result)
  set(chosen "$ENV{CUDAARCHS}")
  set(ENV{CUDAARCHS})  # CMake would cache it, against what a later configure is told
  if(DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(chosen "${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  if(NOT chosen)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE output ERROR_QUIET)
    string(REGEX REPLACE "[ \r]*\n" ";" lines "${output}")
    foreach(line IN LISTS lines)
      if(NOT line MATCHES "^([0-9]+)[.]([0-9])$")
        continue()  # a sentence about the driver
      elseif(line VERSION_LESS 8.0)
        message(WARNING "mbkern: found a GPU of compute capability ${line}, for which the kernels "
          "are not built; needed is 8.0 or newer")
      else()
        list(APPEND chosen "${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real")
      endif()
    endforeach()
    list(REMOVE_DUPLICATES chosen)
  endif()
  if(NOT chosen)
    set(chosen 80-virtual 90-real)
  endif()
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()
