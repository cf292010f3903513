#!/usr/bin/env bash
#SBATCH --job-name=dalle-eval-fid
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@30
#
# Compute FID, KID and the Inception Score. Arguments are those of `dalle eval-fid`. See README.md.
#
#     sbatch --gpus 1 scripts/slurm/eval-fid.sh runs/12b/samples/coco-lines.ranked.jsonl coco/val2014 \
#         --out runs/12b/fid.json
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle eval-fid "$@"
