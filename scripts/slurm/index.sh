#!/usr/bin/env bash
#SBATCH --job-name=dalle-index
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Index the tar shards of a source by a job array, each job a share of them, so that no later job reads all headers.
# Arguments are those of `dalle index`. A job that a signal ends is queued again. See README.md.
#
#     export DALLE_INDEX=indexes  # where all later jobs find them
#     sbatch --array 1-8 scripts/slurm/index.sh "shards/{00000..24999}.tar"
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
share=$(shard)
resumable dalle index "$@" --shard "$share"
