"""Training and measuring the tiny CLIP and the tiny SAM that ship with clipseed."""
