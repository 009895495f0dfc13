"""The loop: one iteration's forward and backward (`step`), its pruning (`pruner`), learning rates of both phases
(`learning_rate`), what is shown and recorded (`metrics`, `flops`), the state that a checkpoint carries (`state`), and
the order of it all (`trainer`)."""
