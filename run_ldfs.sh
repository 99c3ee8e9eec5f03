#!/usr/bin/env bash
# LDFS (arXiv 2405.02586): zero-shot, finetuned, LADS and LDFS on one source domain, measured on all others.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
bash run_ldfs.sh DATASET SOURCE [options]        e.g. bash run_ldfs.sh emoji 3d;  bash run_ldfs.sh pacs photo

  --seeds N        seeds 0 … N-1 (default 5); one is enough for a quick look
  --train WHAT     head (linear probe on cached features, default), visual (image tower), all (both towers)
  --init HOW       the head starts from: text, scratch (default: scratch for head, text for the others)
  --methods M …    finetune lads ldfs (default), or variations such as ldfs:sigma=0
  --ablate         LDFS also without each of its parts, and with other sigmas
  --data DIR       folder that holds the data set's folder (default data)
  --model NAME     an open_clip name, hf-hub:…, local-dir:PATH (default: the data set's own, else ViT-B-16-quickgelu)
  --captioner NAME an image-to-text model of the Hugging Face hub, or a folder (default: the data set's own, else BLIP-2)
  --captions FILE  lines of {"path": …, "caption": …} (default: captions.jsonl of the data set, made if it is not there)
  --run DIR        where results go (default runs/DATASET-SOURCE)
  --epochs N --lr X --batch-size N --frozen-stages N --mapper-steps N
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 2 ] || [[ "$2" == -* ]]; then usage >&2; exit 2; fi
dataset=$1 source=$2 data=data run="runs/$1-$2" common=() tune=() steps=() train=() captioner=() methods=(finetune lads ldfs)
shift 2
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --ablate)
      methods+=(ldfs:direction=class ldfs:sigma=0 ldfs:pair=0 ldfs:cls=0 ldfs:form=cosine ldfs:sigma=0.003 ldfs:sigma=0.03 ldfs:sigma=0.1)
      shift; continue ;;
    --methods)
      methods=(); shift
      while [ $# -gt 0 ] && [[ "$1" != --* ]]; do methods+=("$1"); shift; done
      [ ${#methods[@]} -gt 0 ] || { echo "run_ldfs.sh: --methods needs names, such as finetune ldfs" >&2; exit 2; }
      continue ;;
  esac
  [ $# -gt 1 ] || { echo "run_ldfs.sh: $1 needs a value, or is unknown; see --help" >&2; exit 2; }
  case "$1" in
    --data) data=$2 ;;
    --run) run=$2 ;;
    --seeds | --model | --pretrained | --captions) common+=("$1" "$2") ;;
    --train | --init | --frozen-stages) train+=("$1" "$2") ;;
    --captioner) captioner=("$1" "$2") ;;
    --epochs | --lr | --batch-size) tune+=("$1" "$2") ;;
    --mapper-steps) steps=(--steps "$2") ;;
    *) echo "run_ldfs.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift 2
done

. ./env.sh
if [ -f "$dataset.py" ]; then python3 "$dataset.py" --data "$data"; fi  # a data set that a script here makes
recipes=$(printf '%s\n' "${methods[@]}" | grep -vx finetune || true)
# "${x[@]+"${x[@]}"}" is "${x[@]}" that an empty x does not break in the bash 3.2 of macOS
what=("$dataset" "$source" --data "$data" --run "$run" "${common[@]+"${common[@]}"}")
train+=(--methods "${methods[@]}")

[[ "$recipes" != *ldfs* ]] || python3 anchors.py caption "${what[@]}" "${captioner[@]+"${captioner[@]}"}"
[ -z "$recipes" ] || python3 mapper.py "${what[@]}" "${steps[@]+"${steps[@]}"}" --recipes $recipes
python3 finetune.py "${what[@]}" "${train[@]}" "${tune[@]+"${tune[@]}"}"
python3 evaluate.py run,figure4 "${what[@]}" "${train[@]}"
echo "wrote $run/results.jsonl, $run/table.md, $run/figure4.png"
