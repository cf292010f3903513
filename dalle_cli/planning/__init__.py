"""Memory, traffic, time and cost of a recipe's training on given machines."""
