"""Typed settings of a recipe and the YAML loader."""
