#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and on unseen classes.
#
#   bash run_arf.sh DATASET [SOURCE] [flags]      e.g.  bash run_arf.sh imagenet;  bash run_arf.sh emoji 3d
#
# Every stage takes the same flags (--help lists them) and skips what is there and valid: a killed run goes on.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
case " $* " in *" -h "* | *" --help "*) exec python3 finetune.py --help ;; esac

python3 anchors.py retrieve --paper arf "$@"   # image-text pairs: runs/…/retrieved.jsonl
python3 anchors.py caption --paper arf "$@"    # captions.jsonl beside the images
python3 mapper.py --paper arf "$@"             # LDFS's features, where a method takes them: runs/…/mappers/
python3 finetune.py --paper arf "$@"           # runs/…/checkpoints/
python3 evaluate.py --paper arf "$@"           # runs/…/results.jsonl, table.md, curve.png, figure5.png
