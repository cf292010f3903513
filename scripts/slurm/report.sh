#!/usr/bin/env bash
#SBATCH --job-name=dalle-report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#SBATCH --signal=B:USR1@30
#
# Write a run's report. Arguments are those of `dalle report`. See README.md.
#
#     sbatch scripts/slurm/report.sh recipes/12b.yaml --ranked runs/12b/ranked.jsonl
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
resumable dalle report "$@"
