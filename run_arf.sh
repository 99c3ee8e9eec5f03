#!/usr/bin/env bash
# ARF (arXiv 2404.06244): zero-shot, finetuned, FLYP, and FLYP with ARF's anchors, on domain shift and on unseen classes.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
bash run_arf.sh DATASET SOURCE [options]        e.g. bash run_arf.sh emoji 3d;  bash run_arf.sh pacs photo --pool data/cc3m

  --seeds N        seeds 0 … N-1 (default 1; the README's table has 5)
  --methods M …    default: finetune flyp flyp+captions flyp+retrieved arf arf+ldfs
  --data DIR       folder that holds the data set's folder (default data)
  --model NAME     an open_clip name, hf-hub:…, local-dir:PATH (default: the data set's own, else ViT-B-16-quickgelu)
  --captioner NAME an image-to-text model of the Hugging Face hub, or a folder (default: the data set's own, else BLIP-2)
  --captions FILE  lines of {"path": …, "caption": …} (default: captions.jsonl of the data set, made if it is not there)
  --pool DIR       webdataset shards to retrieve from (default: the data set's own, else cc3m, in --data)
  --k N            pairs retrieved for each image (default 1); --query text: for each class prompt instead
  --same X         cosine at which a pair is left out as an image of the benchmark (default 0.99)
  --lambda-cap X --lambda-ret X   weights of the two anchors' losses (default 1)
  --run DIR        where results go (default runs/DATASET-SOURCE)
  --epochs N --lr X --batch-size N --frozen-stages N --mapper-steps N
TEXT
}
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 2 ] || [[ "$2" == -* ]]; then usage >&2; exit 2; fi
dataset=$1 source=$2 data=data run="runs/$1-$2" seeds=1 common=() tune=() frozen=() steps=() captioner=() pool=()
methods=(finetune flyp flyp+captions flyp+retrieved arf arf+ldfs)
shift 2
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --methods)
      methods=(); shift
      while [ $# -gt 0 ] && [[ "$1" != --* ]]; do methods+=("$1"); shift; done
      [ ${#methods[@]} -gt 0 ] || { echo "run_arf.sh: --methods needs names, such as flyp arf" >&2; exit 2; }
      continue ;;
  esac
  [ $# -gt 1 ] || { echo "run_arf.sh: $1 needs a value, or is unknown; see --help" >&2; exit 2; }
  case "$1" in
    --data) data=$2 ;;
    --run) run=$2 ;;
    --seeds) seeds=$2 ;;
    --model | --pretrained | --captions) common+=("$1" "$2") ;;
    --captioner) captioner=("$1" "$2") ;;
    --pool | --k | --query | --same) pool+=("$1" "$2") ;;
    --epochs | --lr | --batch-size | --lambda-cap | --lambda-ret) tune+=("$1" "$2") ;;
    --frozen-stages) frozen=("$1" "$2") ;;
    --mapper-steps) steps=(--steps "$2") ;;
    *) echo "run_arf.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift 2
done
known='^(finetune|(lads|ldfs)(:.*)?|(flyp(\+captions)?(\+retrieved)?|arf)(\+(lads|ldfs)(:.*)?)?)$'
for method in "${methods[@]}"; do  # before hours of captions
  [[ "$method" =~ $known ]] ||
    { echo "run_arf.sh: unknown method $method; see --help" >&2; exit 2; }
done

. ./env.sh
names=" ${methods[*]} "
if [ -f "$dataset.py" ]; then  # a data set that a script here makes
  python3 "$dataset.py" --data "$data"
  if [[ "$names" =~ retrieved|arf && " ${pool[*]-} " != *" --pool "* ]]; then python3 "$dataset.py" pool --data "$data"; fi
fi
stages=() flags=() figures=run,curve
if [[ "$names" =~ captions|arf|ldfs ]]; then stages+=(caption) flags+=("${captioner[@]+"${captioner[@]}"}"); fi
if [[ "$names" =~ retrieved|arf ]]; then stages+=(retrieve) flags+=("${pool[@]+"${pool[@]}"}"); fi
if [ ${#stages[@]} -eq 2 ]; then figures+=,figure5; fi
recipes=$(tr ' +' '\n\n' <<< "$names" | grep -E '^(lads|ldfs)' | sort -u || true)
# "${x[@]+"${x[@]}"}" is "${x[@]}" that an empty x does not break in the bash 3.2 of macOS
what=("$dataset" "$source" --data "$data" --run "$run" --seeds "$seeds" "${common[@]+"${common[@]}"}")
train=(--train visual --methods "${methods[@]}" "${frozen[@]+"${frozen[@]}"}")

[ ${#stages[@]} -eq 0 ] || python3 anchors.py "$(IFS=,; echo "${stages[*]}")" "${what[@]}" "${flags[@]+"${flags[@]}"}"
[ -z "$recipes" ] || python3 mapper.py "${what[@]}" "${steps[@]+"${steps[@]}"}" --recipes $recipes
python3 finetune.py "${what[@]}" "${train[@]}" "${tune[@]+"${tune[@]}"}"
python3 evaluate.py $figures "${what[@]}" "${train[@]}" --alphas 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9
echo "wrote $run/results.jsonl, $run/table.md"
