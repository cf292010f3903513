"""The built-in world of captioned shapes: drawing it, writing it, and the oracle that judges pictures of it."""
