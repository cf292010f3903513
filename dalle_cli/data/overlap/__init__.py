"""Search for near-duplicate pictures within one source or between two."""
