"""CLIP: training, and scoring pictures against captions."""
