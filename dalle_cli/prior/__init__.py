"""The prior: a sparse transformer over text and image tokens (paper, section 2.2)."""
