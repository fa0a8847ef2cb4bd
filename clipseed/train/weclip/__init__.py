"""WeCLIP: a decoder on frozen CLIP's tokens, whose pseudo-labels are refined by its own affinity while it learns."""
