"""One page with everything a run has produced."""
