"""The built-in world: a procedural data set and a tiny CLIP trained on it."""
