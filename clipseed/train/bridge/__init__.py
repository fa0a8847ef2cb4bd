"""A bridge decoder after the description in Jin & Yang 2023, on light backbones; hyperparameters are ours.

"CLIP for Lightweight Semantic Segmentation" (PRCV 2023) describes a module of two streams, convolutions and text
tokens, with a two-way bridge between them. Only its abstract could be read, so this is no reproduction.
"""
