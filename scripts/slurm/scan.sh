#!/usr/bin/env bash
#SBATCH --job-name=dalle-scan
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Count what is in a source by a job array: each job scans one share, and the last one adds up all of them.
# Arguments are those of `dalle scan`, with --out. A job that is preempted is queued again and begins its share anew; one
# that its time limit ended is not, so make the shares so small that each fits the limit. See README.md.
#
#     export DALLE_INDEX=indexes
#     sbatch --array 1-64 --cpus-per-task 16 scripts/slurm/scan.sh "shards/{00000..24999}.tar" --out scan
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
share=$(shard)
out=$(value_of --out "$@")
share_files() { files_of_share "$out" "$share"; }
resumable dalle scan "$@" --shard "$share"
