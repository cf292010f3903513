"""The discrete VAE: model, objective, training, encoding, OpenAI's release (paper, section 2.1, appendix A)."""
