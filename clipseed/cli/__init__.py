"""The command line: one module per command; parses, calls one function, prints."""
