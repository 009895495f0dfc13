"""What a job is asked to do: its command line, `CONFIG [--stage NAMES] [-- training flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.config import CommandLine, Config, load_config
from megatron_prune.config.command_line import PRETRAIN
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.launch.jobs import stages

ENDING = """\
Flags of the training go after --, as in CONFIG -- --lr 1e-4; `megatron-prune pretrain --help` lists them.
Runs the stages that are not done yet; the same command goes on where a job stopped. By itself it starts torchrun on
this node (NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE); torchrun, or srun with one task per node
(NPROC_PER_NODE set) or one per rank, can start it, too. examples/pretrain_efficientllm.sh is the same as a script.
LOG_DIR: folder for one log file per rank. GRACE_SECONDS (240): time to save after SIGTERM or SIGUSR1.
"""


@dataclass(frozen=True)
class LaunchOptions:
    """The launcher's own flags."""

    stage: str = option(
        stages.ALL, f"what to run, separated by commas: {', '.join((*stages.STAGES, stages.ALL))}", metavar="NAMES"
    )
    should_requeue: bool = option(
        False, "start nothing; exit 0 if the job was told to leave before these stages were done, else 1"
    )


LINE = CommandLine(
    "megatron-prune launch",
    "Train and prune, train on, export and evaluate what the configuration in the file CONFIG says.",
    LaunchOptions,
    argument="CONFIG",
    ending=ENDING,
)


@dataclass(frozen=True)
class Request:
    """The command line.

    Args:
        stages: in order. flags: for the training. words: the command line itself, to hand on.
    """

    config_file: str
    stages: tuple[str, ...]
    flags: tuple[str, ...]
    words: tuple[str, ...]
    asks_requeue: bool = False

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Request | None:
        """Read the command line; None: it asks for help. Raises UserError for what is wrong with it."""
        own, flags = list(argv), list[str]()
        if "--" in own:
            cut = own.index("--")
            own, flags = own[:cut], own[cut + 1 :]
        for word in own:
            name = word.partition("=")[0]
            if name in PRETRAIN.flags() and name not in LINE.flags():
                raise UserError(f"{name}: flags of the training go after --, as in CONFIG -- {word} ...")
        given = LINE.read(own)
        if given is None:
            return None
        options: LaunchOptions = given.own()
        files = given.arguments
        if len(files) != 1:
            problem = "no configuration is given" if not files else f"one configuration, please, not {len(files)}"
            raise UserError(f"{problem}: CONFIG [--stage NAMES] [-- training flags]")
        words = tuple(word for word in argv if word != "--should-requeue")
        return cls(files[0], stages.parse_stages(options.stage), tuple(flags), words, options.should_requeue)

    def training_arguments(self, more: Sequence[str] = ()) -> list[str]:
        """The training's command line; `more` wins over the user's own flags."""
        return ["--config", self.config_file, *self.flags, *more]

    def read(self) -> Config:
        """The effective configuration. Raises UserError."""
        config = load_config(self.training_arguments())
        if config.checkpoint.save is None:
            raise UserError("checkpoint.save (--save) is not set: stages need a folder to keep their results in")
        return config
