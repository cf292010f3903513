#!/usr/bin/env bash
#SBATCH --job-name=dalle-overlap
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:USR1@30
#
# Find the near-duplicates of a source by job arrays. Arguments are those of `dalle overlap`, with --cache and --out. In a
# first array each job makes the thumbnails of its share, and in a second one it compares them with all others; the last
# job writes the result. A comparison that a signal ends begins anew, and one that its time limit ended is not queued again, so
# give it the time that it takes, or use more shares. See README.md.
#
#     first=$(sbatch --parsable --array 1-64 --cpus-per-task 16 scripts/slurm/overlap.sh "shards/{00000..24999}.tar" \
#         --cache thumbnails --out duplicates.jsonl)
#     sbatch --dependency "afterok:$first" --array 1-64 --cpus-per-task 16 scripts/slurm/overlap.sh \
#         "shards/{00000..24999}.tar" --cache thumbnails --out duplicates.jsonl
set -euo pipefail
source "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}/scripts/slurm/job.sh"
share=$(shard)
cache=$(value_of --cache "$@")
share_files() { files_of_share "$cache" "$share"; }
resumable dalle overlap "$@" --shard "$share"
