#!/usr/bin/env bash
# LDFS (arXiv 2405.02586): zero-shot, finetuned, LADS and LDFS on one source domain, measured on all others.
#
#   bash run_ldfs.sh DATASET [SOURCE] [flags]     e.g.  bash run_ldfs.sh pacs photo;  bash run_ldfs.sh emoji 3d --seeds 1
#
# Every stage takes the same flags (--help lists them) and skips what is there and valid: a killed run goes on.
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "$0")" && pwd)
cd "$root"
. ./env.sh
cd "$OLDPWD"  # relative paths are the caller's
case " $* " in *" -h "* | *" --help "*) exec python3 "$root/finetune.py" --help ;; esac

# One process, for to import PyTorch takes seconds. Each stage is a script, too: python3 mapper.py DATASET SOURCE …
exec python3 -uc '
import sys
sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]  # imports are from here, not from where the caller stands
sys.argv[0] = "run_ldfs.sh"
import anchors, mapper, clipstyler, finetune, evaluate

anchors.main("caption", *sys.argv[1:])  # a caption for every source image: captions.jsonl beside them
mapper.main()                           # step 1: runs/…/mappers/
clipstyler.main()                       # a baseline on images, where asked for: runs/…/mappers/, clipstyler.png
finetune.main()                         # step 2: runs/…/checkpoints/
evaluate.main()                         # runs/…/results.jsonl, table.md, figure4.png
' "$root" "$@"
