#!/usr/bin/env bash
#SBATCH --job-name=dalle-tokenize-text
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Turn captions into text tokens by a job array: each job makes one share of the same store.
# Arguments are those of `dalle tokenize-text`. A job that a signal ends is queued again and resumes. See README.md.
#
#     sbatch --array 1-8 scripts/slurm/tokenize-text.sh recipes/12b.yaml --data cc3m.tsv
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
share=$(shard)
resumable dalle tokenize-text "$@" --shard "$share"
