"""Segment Anything: mask proposals, and seeds made from them."""
