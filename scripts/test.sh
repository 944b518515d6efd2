#!/usr/bin/env bash
# Everything that must hold: style, types, floors, sizes, generated code, then the whole suite with real processes. Sets up what it
# needs: .venv with the test tools and, for root on Debian, etcd, gflags, a C++ compiler and iptables. Words are passed on to pytest: scripts/test.sh tests/core -x
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

scripts/setup_env.sh test

# a real etcd, the real gflags for the table of command lines, a compiler for the kernels, what makes networks lose
# packets; nothing of it is started here (RUNLEVEL=1)
missing=()
command -v etcd >/dev/null || missing+=(etcd-server)
command -v etcdctl >/dev/null || missing+=(etcd-client)
[ -e /usr/include/gflags/gflags.h ] || missing+=(libgflags-dev)
command -v c++ >/dev/null || missing+=(g++)
command -v ip >/dev/null || missing+=(iproute2)
command -v iptables >/dev/null || missing+=(iptables)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    install=(env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}")
    "${install[@]}" >/dev/null 2>&1 || { apt-get update -q >/dev/null && "${install[@]}" >/dev/null; } ||
        echo "test: ${missing[*]} could not be installed" >&2
fi
command -v etcd >/dev/null || echo "test: no etcd on PATH: tests against a real etcd are SKIPPED, by name below" >&2

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
    # a worker that dies is not replaced: xdist can wait for the new one for ever
    # files in their order: by number of tests, the longest ones would come last
    set -- -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0
fi
# a hang must end as a failure that names what hung: each test after 120 s (setup.cfg), all together after 40 minutes
PYTHONFAULTHANDLER=1 exec timeout --signal=ABRT --kill-after=30 2400 pytest -q "$@"
