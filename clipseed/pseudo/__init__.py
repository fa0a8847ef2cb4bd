"""From class activation maps (and segments) to label masks: pure functions, for every command and trainer."""
