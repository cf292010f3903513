"""Readers of the formats of captioned pictures, one file for each format."""
