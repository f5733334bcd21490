"""Weight files held against a config: exact bytes, and what does not fit."""
