"""From a configuration to a model in training on this rank.

inputs      check and open everything that the configuration names
build       model, data sets, trainer
one_shot    the same for scoring and pruning without training
saving      checkpoints of the run;  watch  who else writes there, and whether the launcher still lives
data_order  which samples a run has seen
outputs     config.yaml, summary.json, figures
alike       all ranks read and write the same things
"""
