# Sourced by the batch files here; see README.md beside it.

# Where `dalle`, recipes/ and runs/ are: the folder that sbatch was called in.
cd "${DALLE_ROOT:-$SLURM_SUBMIT_DIR}"
if [ -d .venv/bin ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export PYTHONUNBUFFERED=1

# resumable COMMAND...: run it by srun, and have Slurm queue the job again where a signal ended it.
#
# SIGUSR1 (from --signal, before the time limit) and SIGTERM (preemption) are handed on. Training then saves and leaves
# with exit code 75; the other commands end at once and go on, when run again, at what they had written.
resumable() {
    local code=0 signalled="" first address
    if [ "${SLURM_NTASKS:-1}" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        # As Slurm itself reaches the first node: its name may be known to nobody else.
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        address=$(scontrol --oneliner show node "$first" | grep -o ' NodeAddr=[^ ]*')
        export MASTER_ADDR="${address#*=}"
    fi
    # Not the first process to leave ends the others, but a minute's wait: all save together.
    srun --kill-on-bad-exit=0 --wait=60 "$@" &
    local step=$!
    trap 'signalled=1; kill -USR1 "$step" 2> /dev/null || true' USR1 TERM
    # A trapped signal ends `wait` before its time.
    while kill -0 "$step" 2> /dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap - USR1 TERM
    if [ "$code" -eq 75 ] || { [ -n "$signalled" ] && [ "$code" -gt 2 ]; }; then
        echo "job $SLURM_JOB_ID: ended by a signal (exit code $code), queued again to go on" >&2
        # Not by itself even where it is preempted: Slurm leaves alone what ends within its grace time.
        scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: is queued again already, or cannot be" >&2
        exit 75
    fi
    return "$code"
}

# The I/N of --shard from the job array's index. SHARDS says N where a part of the array is submitted again.
shard() {
    local count="${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
    if [ -z "${SHARDS:-}" ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" != "1-$count" ]; then
        echo "array $SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX: number it from 1 (--array 1-8), or set SHARDS" >&2
        return 2
    fi
    echo "$SLURM_ARRAY_TASK_ID/$count"
}
