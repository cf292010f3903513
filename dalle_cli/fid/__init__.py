"""FID, KID, Inception Score, precision and recall of systems against reference pictures."""
