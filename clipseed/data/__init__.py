"""Data sets, labels, vocabularies and safe decoding."""

from clipseed.data.types import ImageSet, Sample
from clipseed.data.vocabulary import ClassText, Vocabulary, load_vocabulary

__all__ = ["ClassText", "ImageSet", "Sample", "Vocabulary", "load_vocabulary"]
