"""Distributed training: launching ranks, their process groups and liveness, sharding, PowerSGD between nodes."""
