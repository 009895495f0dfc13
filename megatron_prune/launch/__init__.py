"""From a configuration to a running job, in three parts:

assembly   open what the configuration names, build model and trainer, write what a run leaves behind
jobs       the launcher: stages in processes of their own, watched, again after failures
estimate   the dry run: memory, traffic and the way to the target, before anything is started
"""
