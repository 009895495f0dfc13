"""The loop, and what an iteration is made of.

trainer            the order of it all;  learning_rate  of both phases;  stopping  when it ends
step               forward and backward over a global batch, validation, and what is minimised
pruner             one iteration's pruning;  pruning_settings  the configuration as it takes it
one_shot           scoring and pruning without training
state              what a checkpoint carries of a run
metrics            what is shown and recorded (`sinks`, `dashboard`)
"""
