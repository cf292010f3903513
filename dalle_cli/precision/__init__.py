"""Training in 16 bit: number formats, Adam with 16-bit moments, gradient scales (paper, section 2.4, appendix D)."""
