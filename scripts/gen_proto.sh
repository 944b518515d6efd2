#!/usr/bin/env bash
# Makes xllm_py/control/pb from xllm_py/control/xllm.proto, or with --check only compares.
#
# Generated code must be older than the protobuf runtime, so grpcio-tools 1.66.x is used, from an environment of its own:
#     scripts/gen_proto.sh --environment FOLDER          makes that environment, with python3 or what PYTHON names
#     PROTO_PYTHON=FOLDER/bin/python scripts/gen_proto.sh [--check]
# `make proto` and `make proto-check` do both.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ "${1:-}" == "--environment" ]]; then
    folder="${2:?gen_proto: --environment needs a folder}"
    "${PYTHON:-python3}" -m venv "$folder"
    # grpcio-tools of that age reads pkg_resources, which later setuptools no longer have
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check 'grpcio-tools==1.66.2' 'setuptools<80'
    exit 0
fi

python="${PROTO_PYTHON:-python3}"

version="$("$python" -c 'from importlib.metadata import version; print(version("grpcio-tools"))' 2>/dev/null || true)"
if [[ "$version" != 1.66.* ]]; then
    echo "gen_proto: needs grpcio-tools 1.66.x, found '${version:-none}'; see the head of this script" >&2
    exit 2
fi

out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
"$python" -m grpc_tools.protoc -Ixllm_py/control \
    --python_out="$out" --pyi_out="$out" xllm_py/control/xllm.proto

if [[ "${1:-}" == "--check" ]]; then
    for file in xllm_pb2.py xllm_pb2.pyi; do
        diff -u "xllm_py/control/pb/$file" "$out/$file"
    done
    echo "gen_proto: pb/ is up to date"
else
    cp "$out"/xllm_pb2.py "$out"/xllm_pb2.pyi xllm_py/control/pb/
fi
