#!/usr/bin/env bash
# One box, no GPU, no etcd, no root: sets up .venv, starts registry, master, one PREFILL and one DECODE instance of the demo model,
# asks one question, shows where the time went, and stops everything. Options: scripts/quickstart.sh --help
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
"$here/setup_env.sh"
exec "$here/../.venv/bin/python" "$here/quickstart.py" "$@"
