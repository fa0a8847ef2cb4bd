"""Seeds and masks on disk."""

from clipseed.store.reader import Seeds, open_seeds
from clipseed.store.records import SeedMap

__all__ = ["SeedMap", "Seeds", "open_seeds"]
