"""xllm_py: a prefill/decode-disaggregated LLM server in Python. See ARCHITECTURE.md for the map."""

__version__ = "0.1.0"
