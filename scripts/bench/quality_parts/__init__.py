"""Parts of the benchmark of picture quality; see scripts/bench/quality."""
