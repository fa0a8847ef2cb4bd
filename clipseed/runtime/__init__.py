"""The streaming engine that every command uses."""
