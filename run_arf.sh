#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and on unseen classes.
#
#   bash run_arf.sh DATASET [SOURCE] [flags]      e.g.  bash run_arf.sh imagenet;  bash run_arf.sh emoji 3d
#
# Every stage takes the same flags (--help lists them) and skips what is there and valid: a killed run goes on.
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "$0")" && pwd)
cd "$root"
. ./env.sh
cd "$OLDPWD"  # relative paths are the caller's
case " $* " in *" -h "* | *" --help "*) exec python3 "$root/finetune.py" --help ;; esac

# One process, for to import PyTorch takes seconds. Each stage is a script, too: python3 finetune.py DATASET --paper arf …
exec python3 -uc '
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]  # imports are from here, not from where the caller stands
sys.argv[0] = "run_arf.sh"
import anchors, mapper, clipstyler, finetune, evaluate

anchors.main("retrieve", *sys.argv[1:])  # image-text pairs: runs/…/retrieved.jsonl
anchors.main("caption", *sys.argv[1:])   # captions.jsonl beside the images
mapper.main()                            # synthesised features of LDFS, where a method takes them: runs/…/mappers/
clipstyler.main()                        # a baseline on images, where asked for: runs/…/mappers/, clipstyler.png
finetune.main()                          # runs/…/checkpoints/
evaluate.main()                          # runs/…/results.jsonl, table.md, curve.png, figure5.png
' "$root" --paper arf "$@"
