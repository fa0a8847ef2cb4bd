"""Foreign annotation files, one format per file, read and written.

:mod:`clipseed.formats.open` finds out which one a path holds, :mod:`clipseed.formats.writers` what can be written.
"""
