#!/usr/bin/env bash
# LDFS (arXiv 2405.02586): zero-shot, finetuned, LADS and LDFS on one source domain, measured on all others.
#
#   bash run_ldfs.sh DATASET [SOURCE] [flags]     e.g.  bash run_ldfs.sh pacs photo;  bash run_ldfs.sh emoji 3d --seeds 1
#
# Every stage takes the same flags (--help lists them) and skips what is there and valid: a killed run goes on.
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
cd "$root"
. ./env.sh
cd "$OLDPWD"  # relative paths are the caller's
case " $* " in *" -h "* | *" --help "*) exec python3 "$root/finetune.py" --help ;; esac

python3 "$root/anchors.py" caption "$@"     # a caption for every source image: captions.jsonl beside them
python3 "$root/mapper.py" "$@"              # step 1: runs/…/mappers/
if [[ "$*" == *clipstyler* ]]; then         # only where asked for: to import PyTorch takes seconds
  python3 "$root/clipstyler.py" "$@"        # a baseline on images: runs/…/mappers/, clipstyler.png
fi
python3 "$root/finetune.py" "$@"            # step 2: runs/…/checkpoints/
python3 "$root/evaluate.py" "$@"            # runs/…/results.jsonl, table.md, figure4.png
