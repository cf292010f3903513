"""What lies on disk: token stores and checkpoints."""
