#!/usr/bin/env bash
# Makes .venv in the checkout and installs xllm_py into it, editable, with the versions of constraints.txt. Done already: returns at
# once. `scripts/setup_env.sh test` adds what the tests need. PYTHON names another interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

extra=${1:-}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "setup: error: $python is missing or older than 3.11. Install Python 3.11 or set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
wanted=$("$python" - "$extra" setup.cfg pyproject.toml constraints.txt <<'PY'
import hashlib, sys
from pathlib import Path

parts = [sys.version, str(Path.cwd()), *(Path(name).read_text() for name in sys.argv[2:])]
print(sys.argv[1], hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
)
have=$(cat .venv/xllm-setup 2>/dev/null || true)
# an environment with the test extra serves for everything
if [ "$have" = "$wanted" ] || { [ -z "$extra" ] && [ "${have#test }" = "${wanted# }" ]; }; then exit 0; fi

echo "setup: installing into .venv (about a minute)" >&2
if ! "$python" -m venv .venv; then
    echo "setup: error: no virtual environment could be made. On Debian: apt-get install python3-venv" >&2
    exit 2
fi
.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
echo "$wanted" >.venv/xllm-setup
