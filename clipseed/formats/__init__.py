"""Foreign annotation files, one format per file; :mod:`clipseed.formats.open` finds out which one a path holds."""
