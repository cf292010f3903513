"""dalle: train and run a DALL-E from raw image-caption pairs to scored pictures."""

__version__ = "0.1.0"
