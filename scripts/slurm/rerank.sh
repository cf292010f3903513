#!/usr/bin/env bash
#SBATCH --job-name=dalle-rerank
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@30
#
# Score the pictures that the jobs of sample.sh drew with CLIP and rank them. Arguments are those of `dalle rerank`.
# LINES_IN (required) is the folder with the lines of those jobs; the scored lines are written to RANKED, by default
# LINES_IN.ranked.jsonl. See README.md.
#
#     LINES_IN=runs/12b/samples/coco-lines sbatch --gpus 1 scripts/slurm/rerank.sh --clip ViT-B-32 --top 1
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
: "${LINES_IN:?is not set; set it to the folder of the lines}"
ranked="${RANKED:-$LINES_IN.ranked.jsonl}"
# Keep the captions in the order of the array's jobs, whichever ended first.
cat "$LINES_IN"/*-of-*.jsonl > "$ranked.lines"
resumable dalle rerank "$ranked.lines" "$@" > "$ranked.partial"
mv "$ranked.partial" "$ranked"
rm "$ranked.lines"
