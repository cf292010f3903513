"""FID, KID, inception score, precision and recall of systems against reference pictures."""
