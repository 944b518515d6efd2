"""Floor 3: gRPC between daemons: messages, conversion to our values, client, server."""
