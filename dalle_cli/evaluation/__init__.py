"""FID, IS, KID, oracle accuracy and the report."""
