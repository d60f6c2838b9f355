#!/usr/bin/env bash
# Gets what the kernels are built with and this machine lacks: nvcc 13.0 and libclang, as hash-checked PyPI wheels,
# into .cuda/ (about 130 MB to fetch, 330 MB on disk). A folder named .cuda is always complete: it is filled under
# another name first. Delete it at will; `make cuda` brings it back.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "make cuda: $1" >&2
    exit 1
}

have_nvcc() {
    [ -f "${NVCC:-}" ] || [ -f "${CUDA_HOME:-}/bin/nvcc" ] || command -v nvcc >/dev/null
}

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return
    local found
    found=$(ls -d /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* /usr/lib64/libclang*.so* 2>/dev/null || true)
    # libclang-cpp is the C++ library, which bindgen cannot use.
    grep -qv 'libclang-cpp' <<<"$found" && [ -n "$found" ]
}

for tool in gcc g++; do
    command -v "$tool" >/dev/null || fail "no $tool: install a C++ compiler (Debian: apt install g++), nvcc needs it"
done

wanted=()
have_nvcc || wanted+=(nvcc.txt)
have_libclang || wanted+=(libclang.txt)
missing=()
for list in "${wanted[@]}"; do
    cmp -s "scripts/$list" ".cuda/$list" || missing+=("$list")
done
[ ${#missing[@]} -gt 0 ] || exit 0

remedy="or set CUDA_HOME to a CUDA 13 toolkit and LIBCLANG_PATH to a folder with libclang.so"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the compiler's wheels are for Linux x86-64, this is $(uname -sm): set CUDA_HOME and LIBCLANG_PATH"
command -v python3 >/dev/null || fail "no python3 to fetch nvcc with: install python3 and python3-pip, $remedy"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip to fetch nvcc with: install python3-pip, $remedy"

echo "make cuda: fetching ${wanted[*]/%.txt/} into .cuda/ ..." >&2
export PIP_ROOT_USER_ACTION=ignore
new=$(mktemp -d .cuda.tmp.XXXXXX)
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT TERM HUP
# One pip call: a second one with --target would replace the folder that the wheels share.
python3 -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-compile --only-binary :all: \
    --require-hashes --target "$new" "${wanted[@]/#/--requirement=scripts/}" ||
    fail "pip could not install ${wanted[*]/%.txt/} (see above): check the network, $remedy"
for list in "${wanted[@]}"; do
    cp "scripts/$list" "$new/"
done
chmod 755 "$new"
rm -rf .cuda
mv -T "$new" .cuda
