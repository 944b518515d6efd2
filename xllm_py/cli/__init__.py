"""Floor 6: commands and flags. Answers --help, --version and every usage error without torch or gRPC."""
