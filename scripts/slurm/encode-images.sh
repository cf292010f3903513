#!/usr/bin/env bash
#SBATCH --job-name=dalle-encode-images
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Turn pictures into image tokens by a job array: each job makes one share of the same store.
# Arguments are those of `dalle encode-images`. A job that a signal ends is queued again and resumes. See README.md.
#
#     sbatch --array 1-64 --gpus 1 --cpus-per-task 16 scripts/slurm/encode-images.sh recipes/12b.yaml --data cc3m.tsv
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
share=$(shard)
resumable dalle encode-images "$@" --shard "$share"
