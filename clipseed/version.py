"""The version of clipseed."""

__version__ = "0.1.0"
