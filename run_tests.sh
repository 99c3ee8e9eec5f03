#!/usr/bin/env bash
# The tests: offline, on CPU. Arguments go to pytest: bash run_tests.sh -k losses
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
python3 -m pytest -q "$@"
