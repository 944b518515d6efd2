"""Floor 1: what a cluster decides. Pure: no I/O, no clock, no randomness, no logging, no third party."""
