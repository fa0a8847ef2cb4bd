"""What Python users call: images in memory in, results with behaviour out."""
