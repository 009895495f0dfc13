"""megatron-core's DDP and optimizer around a model (`build`), what of it this rank owns (`owned`), and both as one
thing (`wrapped`)."""
