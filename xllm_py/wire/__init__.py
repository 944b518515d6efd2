"""Floor 2: what travels, as bytes and as conversations. Pure: no sockets, no clock, no third party."""
