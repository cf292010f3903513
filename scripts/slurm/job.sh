# Functions of the batch files in this folder, which source it; see README.md.

# Paths such as recipes/ and runs/ are relative to the folder where sbatch was called.
cd "${DALLE_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
# setup: put dalle on the path, from the file DALLE_SETUP or from .venv.
setup() {
    if [ -n "${DALLE_SETUP:-}" ]; then
        set +eu  # such files often read variables that are not set
        source "$DALLE_SETUP"
        set -eu
    elif [ -d .venv/bin ]; then
        export PATH="$PWD/.venv/bin:$PATH"
    fi
}
setup
export PYTHONUNBUFFERED=1

# resumable COMMAND...: run a command with srun, and queue the job again if a signal ended it.
#
# SIGUSR1 (from --signal, before the time limit) and SIGTERM (preemption) are passed to the command. Training then saves
# and exits with code 75. The other commands end at once; when they run again, they resume from the output they wrote.
# If share_files is a function that lists what the job's share has made, a job that its time limit ended without anything
# new is not queued again, because the next one would come no further.
resumable() {
    local code=0 signalled="" first address made=""
    if declare -F share_files > /dev/null; then
        made=$(share_files)
    fi
    if [ "${SLURM_NTASKS:-1}" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        # Use the address by which Slurm reaches the first node, because its name may not resolve elsewhere.
        read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        address=$(scontrol --oneliner show node "$first" | grep -o ' NodeAddr=[^ ]*')
        export MASTER_ADDR="${address#*=}"
    fi
    # Give all ranks a minute to exit after the first one, because they save a checkpoint together.
    # srun does not take the number of cores from sbatch since Slurm 22.05.
    srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
    local step=$!
    trap 'signalled=limit; kill -USR1 "$step" 2> /dev/null || true' USR1
    trap 'signalled=preempted; kill -USR1 "$step" 2> /dev/null || true' TERM
    # A trapped signal ends `wait` early.
    while kill -0 "$step" 2> /dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap - USR1 TERM
    if [ "$code" -eq 75 ] || { [ -n "$signalled" ] && [ "$code" -gt 2 ]; }; then
        if [ "$signalled" = limit ] && declare -F share_files > /dev/null && [ "$made" = "$(share_files)" ]; then
            echo "job $SLURM_JOB_ID: its time limit ended it before it made anything that the next job could go on" \
                "with, so it is not queued again; give it more time (--time), or make more shares (--array)" >&2
            exit 1
        fi
        echo "job $SLURM_JOB_ID: ended by a signal (exit code $code), queued again to resume" >&2
        # This is needed after a preemption too, since Slurm does not requeue a job that ends within its grace time.
        scontrol requeue "$SLURM_JOB_ID" || echo "job $SLURM_JOB_ID: cannot be queued again, or already is" >&2
        exit 75
    fi
    return "$code"
}

# files_of_share FOLDER I/N: list the files of a share in a folder, with their sizes.
files_of_share() {
    local name
    name=$(printf '%04d-of-%04d' "${2%/*}" "${2#*/}")
    if [ -d "$1" ]; then
        find "$1" -name "*$name*" -printf '%p %s\n' | sort
    fi
}

# value_of OPTION ARGUMENT...: print the value of an option among the arguments of a command.
value_of() {
    local option=$1
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            "$option") echo "${2:-}" ;;
            "$option="*) echo "${1#*=}" ;;
        esac
        shift
    done
}

# shard: print the I/N of --shard from the index in the job array. N is SHARDS if only some shares are submitted again.
shard() {
    local count="${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
    if [ -z "${SHARDS:-}" ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" != "1-$count" ]; then
        echo "array $SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX: number it from 1 (--array 1-8), or set SHARDS" >&2
        return 2
    fi
    echo "$SLURM_ARRAY_TASK_ID/$count"
}
