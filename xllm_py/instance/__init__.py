"""Floor 5: the `xllm` daemon: the API process of one instance. No torch."""
