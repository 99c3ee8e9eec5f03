#!/usr/bin/env bash
# LDFS (arXiv 2405.02586): zero-shot, finetuned, LADS and LDFS on one source domain, measured on all others.
#
#   bash run_ldfs.sh DATASET [SOURCE] [flags]     e.g.  bash run_ldfs.sh pacs photo;  bash run_ldfs.sh emoji 3d --seeds 1
#
# run.py lists the stages. Stored outcomes are loaded, so a killed run goes on when it is started again.
set -euo pipefail
here=$(CDPATH= cd -- "$(dirname "$0")" && pwd)
. "$here/env.sh"
exec python3 -u "$here/run.py" --paper ldfs "$@"
