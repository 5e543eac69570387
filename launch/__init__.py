"""Commands: argument parsing and words to people."""
