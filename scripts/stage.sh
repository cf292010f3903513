# Source this file to run several stages: `stage COMMAND ...` runs `dalle COMMAND ...` and prints its name and seconds.
stage() {
    local start=$SECONDS
    echo "== dalle $*" >&2
    dalle "$@"
    echo "   $((SECONDS - start)) s" >&2
}
