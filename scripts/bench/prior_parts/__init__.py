"""The measurements of scripts/bench/prior."""
