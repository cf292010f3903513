#!/usr/bin/env bash
# Submit all stages of a recipe, each to start after those it needs, and print the number of each job.
#
#     GPU_JOB="--partition gpu --gpus 1 --time 8:00:00" scripts/slurm/chain.sh recipes/own-data.yaml
#
# Arguments are a recipe and, after it, options that all stages with a recipe take (--data, --set). See README.md for the
# environment variables.
set -euo pipefail
recipe="${1:?the recipe is missing: scripts/slurm/chain.sh RECIPE}"
settings=("$@")
jobs=$(realpath "$(dirname "$0")")
: "${CPU_JOB=}" "${GPU_JOB=}" "${DVAE_JOB=$GPU_JOB}" "${PRIOR_JOB=$GPU_JOB}" "${CAPTIONS=50}" "${ARRAY=1-4}" "${EVAL=}"
logs=$PWD  # Slurm writes a job's output where it was submitted, and job.sh leaves this folder for DALLE_ROOT
source "$jobs/job.sh" >&2  # what DALLE_SETUP prints is no job's number
export DALLE_IN_CHAIN=1  # no stage says which one is next
changes=()  # --set may name another run
for ((i = 2; i < $#; i++)); do
    if [ "${!i}" = --set ]; then
        next=$((i + 1))
        changes+=(--set "${!next}")
    fi
done
run=$(dalle show "$recipe" --yaml "${changes[@]}" | sed -n 's/^run: //p')
export LINES_IN="$run/samples/lines-${ARRAY%%%*}" RANKED="$run/ranked.jsonl"

# submit STAGE DEPENDENCIES OPTIONS [ARGUMENT...]: submit a stage, with OPTIONS of sbatch as one word; set JOB.
submit() {
    local stage=$1 after=$2 options=$3
    shift 3
    # The options are several words in one variable. A job whose dependency failed can never start.
    # shellcheck disable=SC2086
    JOB=$(cd "$logs" && sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=afterok:$after} $options \
        "$jobs/$stage.sh" "$@")
    JOB=${JOB%%;*}  # a cluster's name may follow
    echo "$stage $JOB"
}

submit train-tokenizer "" "$CPU_JOB" "${settings[@]}"
tokenizer=$JOB
submit tokenize-text "$tokenizer" "--array $ARRAY $CPU_JOB" "${settings[@]}"
text=$JOB
submit train-dvae "" "$DVAE_JOB" "${settings[@]}"
dvae=$JOB
submit encode-images "$dvae" "--array $ARRAY $GPU_JOB" "${settings[@]}"
images=$JOB
submit train-prior "$text:$images" "$PRIOR_JOB" "${settings[@]}"
prior=$JOB
submit train-clip "$text:$images" "$GPU_JOB" "${settings[@]}"
clip=$JOB
submit sample "$prior" "--array $ARRAY $GPU_JOB" "$run/prior" --held-out --limit "$CAPTIONS"
samples=$JOB
submit rerank "$samples:$clip" "$GPU_JOB" --clip "$run/clip"
ranked=$JOB
evaluation=()
if [ -n "$EVAL" ]; then
    submit eval-fid "$ranked" "$GPU_JOB" "$RANKED" "$EVAL" --clip "$run/clip" --out "$run/fid.json"
    ranked=$JOB
    evaluation=(--fid "$run/fid.json")
fi
submit report "$ranked" "$CPU_JOB" "${settings[@]}" --ranked "$RANKED" "${evaluation[@]}"
