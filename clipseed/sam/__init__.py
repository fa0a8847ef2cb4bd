"""Segment Anything: mask proposals, and CAMs made from them."""
