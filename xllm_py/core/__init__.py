"""Floor 1: what an engine decides. Pure: no I/O, no clock, no randomness, no logging, no third party."""
