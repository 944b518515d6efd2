"""Floor 3: the OpenAI HTTP API, written once for both daemons over the Backend protocol. No torch, no gRPC."""
