"""megatron-core's DDP and optimizer around the model (`build`), and what of it this rank owns (`owned`)."""
