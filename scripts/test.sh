#!/usr/bin/env bash
# Everything that must hold: style, types, floors, sizes, generated code, then the whole suite with real processes. Sets up what it
# needs: .venv with the test tools and, for root on Debian, etcd. Words are passed on to pytest: scripts/test.sh tests/core -x
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

scripts/setup_env.sh test

if ! command -v etcd >/dev/null || ! command -v etcdctl >/dev/null; then
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        # RUNLEVEL=1 keeps the package from starting a server of its own
        install=(env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends etcd-server etcd-client)
        "${install[@]}" >/dev/null 2>&1 || { apt-get update -q >/dev/null && "${install[@]}" >/dev/null; } ||
            echo "test: etcd could not be installed" >&2
    fi
    command -v etcd >/dev/null || echo "test: no etcd on PATH: tests against a real etcd are SKIPPED, by name below" >&2
    command -v etcdctl >/dev/null || echo "test: no etcdctl on PATH: tests with it are SKIPPED, by name below" >&2
fi

export PATH="$PWD/.venv/bin:$PATH"
if [ $# -eq 0 ]; then
    if [ ! -e build/proto-env/made ]; then
        scripts/gen_proto.sh --environment build/proto-env && touch build/proto-env/made
    fi
    export PROTO_PYTHON="$PWD/build/proto-env/bin/python"
    ruff format --check .
    ruff check .
    mypy
    lint-imports --no-logo
    set -- -n 2 --dist loadgroup
fi
exec pytest -q "$@"
