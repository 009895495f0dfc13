"""From a configuration to a model in training on this rank.

opening       check and open everything that the configuration names
assemble      model, data sets, trainer
one_shot_run  the same for scoring and pruning without training
saving        checkpoints of the run;  watch  who else writes there, and whether the launcher still lives
data_order    which samples a run has seen
outputs       config.yaml, summary.json, figures
alike         all ranks read and write the same things
"""
