"""Generated from ../xllm.proto by scripts/gen_proto.sh; checked in, never edited."""
