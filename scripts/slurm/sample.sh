#!/usr/bin/env bash
#SBATCH --job-name=dalle-sample
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Draw pictures by a job array: each job draws one share; rerank.sh reads the lines of all jobs.
# Arguments are those of `dalle sample`. LINES_IN (required) is the folder where each job writes its lines, in a file
# such as 0001-of-0008.jsonl. A job that a signal ends is queued again and resumes. See README.md.
#
#     export LINES_IN=runs/12b/samples/coco-lines
#     jobs=$(sbatch --parsable --array 1-64 --gpus 1 scripts/slurm/sample.sh runs/12b/prior \
#         --captions captions_val2014.json --n 512 --out runs/12b/samples/coco)
#     sbatch --dependency afterok:$jobs --gpus 1 scripts/slurm/rerank.sh --top 1
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
: "${LINES_IN:?is not set; set it to the folder for the lines}"
mkdir -p "$LINES_IN"
share=$(shard)
lines=$(printf '%s/%04d-of-%04d.jsonl' "$LINES_IN" "${share%/*}" "${share#*/}")
# A job that resumes prints its first lines again, so the file is written from its start.
resumable dalle sample "$@" --shard "$share" > "$lines.partial"
mv "$lines.partial" "$lines"
