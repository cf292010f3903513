# Sourced by the benchmarks that compare with dalle-pytorch: make .bench-venv, whose path is in $bench. It has the package
# and finds all others in .venv, or in the environment that VENV names.
if [ -z "${VENV:-}" ]; then
    scripts/venv
    VENV=.venv
fi
bench=.bench-venv
if [ ! -e "$bench/installed" ]; then
    "$VENV/bin/python" -m venv "$bench"
    # --no-deps leaves out packages that the model does not use, such as a trainer and a web framework.
    "$bench/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        dalle-pytorch==1.6.6 axial-positional-embedding==0.3.12 einops==0.8.1 rotary-embedding-torch==0.8.9
    touch "$bench/installed"
fi
site='import sysconfig; print(sysconfig.get_paths()["purelib"])'
"$VENV/bin/python" -c "$site" > "$("$bench/bin/python" -c "$site")/project.pth"
