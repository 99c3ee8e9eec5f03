#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and unseen classes.
#
#   bash run_arf.sh DATASET [SOURCE] [flags]      e.g.  bash run_arf.sh imagenet;  bash run_arf.sh emoji 3d
#
# run.py lists the stages. Stored outcomes are loaded, so a killed run goes on when it is started again.
set -euo pipefail
here=$(CDPATH= cd -- "$(dirname "$0")" && pwd)
. "$here/env.sh"
exec python3 -u "$here/run.py" --paper arf "$@"
