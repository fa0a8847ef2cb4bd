"""Every failure a user can cause, as one small family of exceptions.

The message of each names the file or option at fault and what to do about it; the command line prints it as one
``error:`` line and exits with :attr:`ClipseedError.exit_code`. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class ClipseedError(Exception):
    """Something the user can put right. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(ClipseedError):
    """The options contradict each other, or one has an impossible value."""

    exit_code = 2


class InputError(ClipseedError):
    """A data set, label, split or vocabulary file is missing, malformed or inconsistent."""


class ImageError(ClipseedError):
    """One image cannot be read. Commands that stream images skip it and report it."""


class WeightsError(ClipseedError):
    """Model weights are missing, damaged, of an unsupported kind, or do not fit the model."""


class StoreError(ClipseedError):
    """A CAM file is damaged, not ours, locked, or was made with other settings."""
