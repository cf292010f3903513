"""The discrete VAE: model, likelihood, relaxations, training (paper, section 2.1)."""
