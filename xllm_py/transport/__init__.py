"""Floor 3: what moves bytes. KV links between engines (tcp, memory) and the pipe between API and engine process."""
