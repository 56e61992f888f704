#!/usr/bin/env bash
# Builds llama-cpp-python for bench/decode.py, in a virtual environment of its own:
#
#   bash bench/peers/llama_cpp.sh ~/llama          # some minutes; JOBS=8 for more processors than two
#   python -m bench.decode --llama-python ~/llama/bin/python
#
# As it is published, it ends in a fault at the first prompt on a CPU with AMX, where GCC 12 or older builds it: the
# compiler takes `_tile_loadconfig` to read eight bytes and leaves out the stores of the others (ggml-org/llama.cpp#20824).
# The barrier before that call makes it a fair opponent.
set -euo pipefail

VERSION=0.3.36
venv=${1:?give a folder for the virtual environment, such as ~/llama}
venv=$(realpath -m "$venv")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest "$work" "llama-cpp-python==$VERSION"
tar -xf "$work"/llama_cpp_python-*.tar.gz -C "$work"
source=$(echo "$work"/llama_cpp_python-*/)

file=$source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
barrier='__asm__ volatile("" : : "r"(\&tc) : "memory");'
sed -i "s/^\( *\)_tile_loadconfig(&tc);/\1$barrier\n\1_tile_loadconfig(\&tc);/" "$file"
grep -q 'volatile("" : : "r"(&tc)' "$file" || { echo "$file has changed: is the barrier there already?"; exit 1; }

# Chats, parsers and downloads of its command line, two thirds of the compiler's work, which the library does not need.
sed -i 's/set(LLAMA_BUILD_COMMON ON /set(LLAMA_BUILD_COMMON OFF /' "$source/CMakeLists.txt"

export CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-2}
options=(LLAVA_BUILD LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER LLAMA_BUILD_TOOLS)
CMAKE_ARGS="-DGGML_NATIVE=ON $(printf -- '-D%s=OFF ' "${options[@]}")" nice -n 19 "${pip[@]}" install "$source"
"$venv/bin/python" -c 'import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_print_system_info().decode())'
