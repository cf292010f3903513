# Sourced by what runs several stages: `stage COMMAND ...` is `dalle COMMAND ...`, with its name and seconds on stderr.
stage() {
    local start=$SECONDS
    echo "== dalle $*" >&2
    dalle "$@"
    echo "   $((SECONDS - start)) s" >&2
}
