"""Floor 5: the `xllm-master` daemon. No torch, ever."""
