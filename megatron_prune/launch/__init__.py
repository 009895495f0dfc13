"""From a configuration to a running job: check and open everything it names (`inputs`), build model and trainer
(`build`, or `one_shot` for scoring and pruning without training), write what a finished run leaves behind (`outputs`),
and tell people what is wrong on one rank only (`failures`)."""
