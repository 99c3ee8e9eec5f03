#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and on unseen classes.
#
#   bash run_arf.sh DATASET [SOURCE] [flags]      e.g.  bash run_arf.sh imagenet;  bash run_arf.sh emoji 3d
#
# Every stage takes the same flags (--help lists them) and skips what is there and valid: a killed run goes on.
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)
cd "$root"
. ./env.sh
cd "$OLDPWD"  # relative paths are the caller's
case " $* " in *" -h "* | *" --help "*) exec python3 "$root/finetune.py" --help ;; esac

python3 "$root/anchors.py" retrieve --paper arf "$@"   # image-text pairs: runs/…/retrieved.jsonl
python3 "$root/anchors.py" caption --paper arf "$@"    # captions.jsonl beside the images
python3 "$root/mapper.py" --paper arf "$@"             # LDFS's features, where a method takes them: runs/…/mappers/
if [[ "$*" == *clipstyler* ]]; then                    # only where asked for
  python3 "$root/clipstyler.py" --paper arf "$@"       # a baseline on images: runs/…/mappers/, clipstyler.png
fi
python3 "$root/finetune.py" --paper arf "$@"           # runs/…/checkpoints/
python3 "$root/evaluate.py" --paper arf "$@"           # runs/…/results.jsonl, table.md, curve.png, figure5.png
