"""FMA-WSSS's learned prompts: context vectors around class names, from labels, then from coarse pseudo-labels."""
