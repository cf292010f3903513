#!/usr/bin/env bash
#SBATCH --job-name=dalle-merge
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#
# Join the shares that tokenize-text.sh and encode-images.sh made into their store. Its argument is that of
# `dalle merge`. See README.md.
#
#     sbatch --dependency afterok:1234 scripts/slurm/merge.sh runs/12b/tokens.zarr
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle merge "$@"
