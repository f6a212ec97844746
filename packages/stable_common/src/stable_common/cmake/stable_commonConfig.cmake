# find_package(stable_common CONFIG REQUIRED), in a project built by scikit-build-core with the
# stable_common wheel installed, defines
#
#   stable_common_enable_cuda()          a macro: finds the CUDA toolkit of the Python environment and
#                                        enables the language
#   stable_common_add_extension(...)     a function: one op library on LibTorch's stable ABI
#   stable_common_INCLUDE_DIR            the headers
#   stable_common_PYTHON_DIR             the Python modules that packages take copies of
cmake_minimum_required(VERSION 3.26)

get_filename_component(stable_common_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/../include" ABSOLUTE)
get_filename_component(stable_common_PYTHON_DIR "${CMAKE_CURRENT_LIST_DIR}/../python" ABSOLUTE)
include("${CMAKE_CURRENT_LIST_DIR}/StableExtension.cmake")
