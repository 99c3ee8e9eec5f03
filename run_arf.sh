#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and on unseen classes.
#
#   bash run_arf.sh DATASET [SOURCE] [flags]      e.g.  bash run_arf.sh imagenet;  bash run_arf.sh emoji 3d
#
# A stage whose output is there and valid is skipped, so that a killed run goes on. Every stage takes the same flags:
# `bash run_arf.sh --help` lists them. What is done with them per data set: DATASETS in data.py, SCHEDULES in finetune.py.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
[[ ! " $* " =~ \ (-h|--help)\  ]] || exec python3 finetune.py --help

methods=(finetune flyp flyp+captions flyp+retrieved arf)
case "${1-}" in imagenet | vlcs | terra_incognita) ;; *) methods+=(arf+ldfs) ;; esac  # LDFS wants domains with a style
[[ " $* " =~ \ --methods[\ =] ]] || set -- "$@" --methods "${methods[@]}"
[[ " $* " =~ \ --seeds[\ =] ]] || set -- "$@" --seeds 1
[[ " $* " =~ \ --train[\ =] ]] || set -- "$@" --train visual
[[ " $* " =~ \ --alphas[\ =] ]] || set -- "$@" --alphas 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9

python3 anchors.py caption,retrieve "$@"            # captions.jsonl beside the images; runs/…/retrieved/*.tar
python3 mapper.py "$@"                              # LDFS's features, where a method takes them: runs/…/mappers/
python3 finetune.py "$@"                            # runs/…/checkpoints/
python3 evaluate.py run,curve,figure5 "$@"          # runs/…/results.jsonl, table.md, curve.png, figure5.png
