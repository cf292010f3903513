#!/usr/bin/env bash
#SBATCH --job-name=dalle-train-tokenizer
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@30
#
# Train the tokenizer on all captions. Arguments are those of `dalle train-tokenizer`. See README.md.
#
#     sbatch scripts/slurm/train-tokenizer.sh recipes/12b.yaml --data cc3m.tsv
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle train-tokenizer "$@"
