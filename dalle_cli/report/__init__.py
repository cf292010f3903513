"""Report of a run: one page with everything that the run produced."""
