#!/usr/bin/env bash
#SBATCH --job-name=dalle-train-clip
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@120
#
# Train a small CLIP for reranking, in one process.
# Arguments are those of `dalle train-clip`. When it is preempted, or two minutes before its time limit, it saves,
# is queued again and resumes with the same result. See README.md.
#
#     sbatch --gpus 1 --cpus-per-task 16 scripts/slurm/train-clip.sh recipes/quickstart.yaml
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle train-clip "$@"
