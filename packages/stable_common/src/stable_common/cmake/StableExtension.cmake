# The oldest torch that a library built here loads under: 2.10, as major.minor in the two top bytes.
set(stable_common_TORCH_TARGET_VERSION 0x020a000000000000ULL)

# Prints what a Python expression evaluates to in the interpreter that runs the build.
function(stable_common_ask_python result expression)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${expression}"
    OUTPUT_VARIABLE output
    ERROR_VARIABLE error
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE status
  )
  if(NOT status EQUAL 0)
    message(
      FATAL_ERROR
      "stable_common: ${Python_EXECUTABLE} -c \"${expression}\" failed:\n${error}"
    )
  endif()
  set(${result} "${output}" PARENT_SCOPE)
endfunction()

# Takes nvcc from the nvidia-cuda-nvcc wheel beside the running interpreter, never from PATH: the
# toolkit decides which drivers accept the result, so it is pinned like any other dependency.
#
# A macro, because enable_language() must run in the caller's scope.
macro(stable_common_enable_cuda)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  stable_common_ask_python(
    stable_common_CUDA_ROOT
    "import importlib.util as u; print(*[p + '/cu13' for p in u.find_spec('nvidia').submodule_search_locations][:1])"
  )
  if(NOT EXISTS "${stable_common_CUDA_ROOT}/bin/nvcc")
    message(
      FATAL_ERROR
      "stable_common: no nvcc in ${stable_common_CUDA_ROOT}; install cuda-toolkit[nvcc,cudart,cccl]"
    )
  endif()
  set(
    CMAKE_CUDA_COMPILER
    "${stable_common_CUDA_ROOT}/bin/nvcc"
    CACHE FILEPATH
    "CUDA compiler"
    FORCE
  )
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "CUDA host compiler" FORCE)
  # nvcc's profile names lib64; the wheels ship lib.
  set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${stable_common_CUDA_ROOT}/lib")
  # Targets set their own; this one only spares CMake's compiler test a second architecture.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90)
  endif()
  enable_language(CUDA)
endmacro()

# Refuses PTX of architectures below 90: what it has of launch.h does not wait for the previous grid,
# and on a GPU from 90 on it would be launched before that has ended.
function(stable_common_check_architectures name)
  foreach(architecture IN LISTS ARGN)
    if(architecture MATCHES "^([0-9]+)[af]?(-virtual)?$" AND CMAKE_MATCH_1 LESS 90)
      message(
        FATAL_ERROR
        "stable_common: ${name}: CUDA_ARCHITECTURES has ${architecture}, whose PTX later GPUs would run; "
        "PTX must be of 90 or later, so name ${CMAKE_MATCH_1}-real"
      )
    endif()
  endforeach()
endfunction()

# stable_common_add_extension(<name> SOURCES <file>... CUDA_ARCHITECTURES <arch>...
#   [PYTHON_MODULES <module>...] [DESTINATION <dir>])
#
# Builds _<name>.so, an op library that loads under every torch from 2.10 on, with CUDA or without,
# and installs it to <dir> (default: <name>). .cu sources see CUDA headers only; .cpp sources see
# torch's stable headers too. Architectures are CMake's: 90a-real is a cubin, 120 a cubin and PTX,
# which is not taken of those below 90.
#
# Of the Python modules that packages share, those named are installed beside it, each under a
# private name: peer_group as _peer_group.py. So no package needs another one to run.
function(stable_common_add_extension name)
  cmake_parse_arguments(
    PARSE_ARGV 1
    arg
    ""
    "DESTINATION"
    "SOURCES;CUDA_ARCHITECTURES;PYTHON_MODULES"
  )
  if(NOT arg_SOURCES OR NOT arg_CUDA_ARCHITECTURES OR arg_UNPARSED_ARGUMENTS)
    message(
      FATAL_ERROR
      "stable_common_add_extension(${name}) needs SOURCES and CUDA_ARCHITECTURES, got ${ARGN}"
    )
  endif()
  stable_common_check_architectures(${name} ${arg_CUDA_ARCHITECTURES})
  if(NOT arg_DESTINATION)
    set(arg_DESTINATION "${name}")
  endif()
  foreach(module IN LISTS arg_PYTHON_MODULES)
    if(NOT EXISTS "${stable_common_PYTHON_DIR}/${module}.py")
      message(FATAL_ERROR "stable_common: no module ${module} in ${stable_common_PYTHON_DIR}")
    endif()
  endforeach()

  # torch is headers and one library to link against. It is not imported: that would need its CUDA
  # dependencies, which a build has no use for.
  stable_common_ask_python(
    torch_root
    "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  )
  if(NOT EXISTS "${torch_root}/include/torch/csrc/stable/library.h")
    message(
      FATAL_ERROR
      "stable_common: no torch headers beside ${Python_EXECUTABLE}; install torch==2.10.0 (--no-deps will do)"
    )
  endif()

  set(target _${name})
  add_library(${target} MODULE ${arg_SOURCES})
  set_target_properties(
    ${target}
    PROPERTIES
      PREFIX ""
      SUFFIX ".so"
      CXX_STANDARD 20
      CXX_STANDARD_REQUIRED ON
      CXX_EXTENSIONS OFF
      CXX_VISIBILITY_PRESET hidden
      CUDA_STANDARD 20
      CUDA_STANDARD_REQUIRED ON
      CUDA_VISIBILITY_PRESET hidden
      CUDA_ARCHITECTURES "${arg_CUDA_ARCHITECTURES}"
      CUDA_RUNTIME_LIBRARY None
      VISIBILITY_INLINES_HIDDEN ON
      POSITION_INDEPENDENT_CODE ON
      # g++ drives the link: through nvcc, options meant for the linker were lost.
      LINKER_LANGUAGE CXX
      SKIP_BUILD_RPATH ON
  )
  target_compile_definitions(
    ${target}
    PRIVATE TORCH_TARGET_VERSION=${stable_common_TORCH_TARGET_VERSION} USE_CUDA
  )
  target_include_directories(${target} PRIVATE "${stable_common_INCLUDE_DIR}")
  target_include_directories(
    ${target}
    SYSTEM
    PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:${torch_root}/include>"
      "$<$<COMPILE_LANGUAGE:CXX>:${stable_common_CUDA_ROOT}/include>"
  )
  # Messages and assertions name files: by their place in the project, not on this machine.
  set(
    prefix_maps
    "-ffile-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/="
    "-ffile-prefix-map=${stable_common_INCLUDE_DIR}/="
    "-ffile-prefix-map=${torch_root}/include/="
  )
  target_compile_options(
    ${target}
    PRIVATE
      "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;${prefix_maps}>"
      "$<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size;--expt-relaxed-constexpr;-Xcompiler=-Wall>"
  )
  target_link_directories(${target} PRIVATE "${stable_common_CUDA_ROOT}/lib")
  target_link_options(
    ${target}
    PRIVATE
      LINKER:--exclude-libs,ALL
      LINKER:-z,now
      # libtorch.so alone is needed: its own dependencies bring the CPU or the CUDA libraries.
      LINKER:--no-as-needed
      # A torch installed without its dependencies lacks the CUDA libraries that libtorch.so names.
      LINKER:--allow-shlib-undefined
  )
  target_link_libraries(
    ${target}
    PRIVATE "${torch_root}/lib/libtorch.so" libcudart_static.a rt pthread dl
  )
  install(TARGETS ${target} LIBRARY DESTINATION "${arg_DESTINATION}")
  foreach(module IN LISTS arg_PYTHON_MODULES)
    install(
      FILES "${stable_common_PYTHON_DIR}/${module}.py"
      DESTINATION "${arg_DESTINATION}"
      RENAME "_${module}.py"
    )
  endforeach()
endfunction()
