"""FMA-WSSS's learned prompts: context vectors around class names, learned from labels, then from coarse pseudo-labels."""
