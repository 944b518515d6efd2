"""Floor 5: the engine program: loop, handoff agent, executors. Started by exec; no HTTP, no gRPC."""
