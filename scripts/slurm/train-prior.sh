#!/usr/bin/env bash
#SBATCH --job-name=dalle-train-prior
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@120
#
# Train the prior on one node or many, with one rank for each task.
# Arguments are those of `dalle train-prior`. When it is preempted, or two minutes before its time limit, it saves,
# is queued again and resumes with the same result. See README.md.
#
#     sbatch scripts/slurm/train-prior.sh recipes/quickstart.yaml
#     sbatch --nodes 128 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8 --mem 0 --time 1-0 --exclusive \
#         scripts/slurm/train-prior.sh recipes/12b.yaml
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle train-prior "$@"
