"""megatron-core's DDP and optimizer around a model (`wrapped`), and what of it this rank owns (`owned`)."""
