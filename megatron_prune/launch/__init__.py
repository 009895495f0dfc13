"""From a configuration to a running job: check and open everything it names (`inputs`), build model and trainer
(`build`), write what a finished run leaves behind (`outputs`), and tell people what is wrong on one rank only
(`failures`)."""
