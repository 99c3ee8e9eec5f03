#!/usr/bin/env bash
# LDFS (arXiv 2405.02586): zero-shot, finetuned, LADS and LDFS on one source domain, measured on all others.
#
#   bash run_ldfs.sh DATASET [SOURCE] [flags]     e.g.  bash run_ldfs.sh pacs photo;  bash run_ldfs.sh emoji 3d --seeds 1
#
# A stage whose output is there and valid is skipped, so that a killed run goes on. Every stage takes the same flags:
# `bash run_ldfs.sh --help` lists them. What is done with them per data set: DATASETS in data.py, SCHEDULES in finetune.py.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
[[ ! " $* " =~ \ (-h|--help)\  ]] || exec python3 finetune.py --help

[[ " $* " =~ \ --methods[\ =] ]] || set -- "$@" --methods finetune lads ldfs

python3 anchors.py caption "$@"         # a caption for every source image: captions.jsonl beside them
python3 mapper.py "$@"                  # step 1: runs/…/mappers/
python3 finetune.py "$@"                # step 2: runs/…/checkpoints/
python3 evaluate.py run,figure4 "$@"    # runs/…/results.jsonl, table.md, figure4.png
