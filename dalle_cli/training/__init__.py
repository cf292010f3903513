"""The training loop shared by the dVAE, the prior and CLIP."""
