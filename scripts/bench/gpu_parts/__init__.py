"""One run that proves, on a GPU, what the tests prove on a CPU, and measures each stage."""
