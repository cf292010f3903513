"""Training in 16 bit: gradient scales of each resblock, and Adam with 16-bit moments (paper, 2.4 and appendix D)."""
