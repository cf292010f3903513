"""Memory, traffic, time and cost of training a recipe's prior on given nodes."""
