"""The built-in world of captioned shapes: its pictures, its writer, and the oracle that judges pictures of it."""
