"""Files that stages exchange: token stores, checkpoints, samples, and the records of how they were made."""
