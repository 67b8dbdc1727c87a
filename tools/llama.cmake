# Read by `make install` when it builds llama-cpp-python (CMAKE_PROJECT_llama_cpp_INCLUDE): what llama.cpp's programs
# share isn't built. The package's own CMakeLists.txt sets it in the cache, which a variable of the name goes before.
set(LLAMA_BUILD_COMMON OFF)
