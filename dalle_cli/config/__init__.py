"""Typed settings of a recipe, the YAML loader, the layout of attention kinds and the folders of a run."""
