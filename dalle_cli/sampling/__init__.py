"""Drawing image tokens from the prior and decoding them to pictures."""
