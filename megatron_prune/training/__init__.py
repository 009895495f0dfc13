"""The loop: one iteration's forward and backward (`step`), its pruning (`pruner`), learning rates of both phases
(`learning_rate`), what is shown and recorded (`metrics`, `flops`), the state that a checkpoint carries (`state`), the
order of it all (`trainer`), and scoring and pruning without training (`one_shot`)."""
