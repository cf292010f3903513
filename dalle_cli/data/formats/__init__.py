"""Readers of the formats that captioned pictures come in, one file each."""
