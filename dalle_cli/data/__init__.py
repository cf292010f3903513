"""Sources of captioned pictures, their preprocessing and the built-in shapes world."""
