#!/usr/bin/env bash
#SBATCH --job-name=dalle-sample
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Draw pictures by a job array, each job one share; rerank.sh takes the lines of all of them.
# Arguments are those of `dalle sample`. LINES_IN (required) is the folder that each job's lines are put in, as
# 0001-of-0008.jsonl and so on. Ended by a signal, a job is queued again and goes on. See README.md.
#
#     export LINES_IN=runs/12b/samples/coco-lines
#     jobs=$(sbatch --parsable --array 1-64 --gpus 1 scripts/slurm/sample.sh runs/12b/prior \
#         --prompts captions_val2014.json --n 512 --out runs/12b/samples/coco)
#     sbatch --dependency afterok:$jobs --gpus 1 scripts/slurm/rerank.sh --top 1
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
: "${LINES_IN:?is not set: name the folder for the lines}"
mkdir -p "$LINES_IN"
share=$(shard)
lines=$(printf '%s/%04d-of-%04d.jsonl' "$LINES_IN" "${share%/*}" "${share#*/}")
# A job that goes on prints its first lines again.
resumable dalle sample "$@" --shard "$share" > "$lines.partial"
mv "$lines.partial" "$lines"
