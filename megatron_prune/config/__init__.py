"""What to run: frozen dataclasses, one per section, filled from strict YAML and Megatron's flag names.

    schema.py        every section but pruning, and `Config` that holds them all: read this one first
    pruning.py       the sections `pruning` and `continued`
    moved.py         old names of options
    options.py       a dataclass field -> `Option` (flag, type, limits, help): the only reader of the field metadata
    values.py        strict conversion of a YAML value or of flag words into an option's type
    yaml_file.py     YAML -> `Config`, `Config` -> YAML (plain, or documented with a comment above each field)
    flags.py         the one way of reading command lines: `CommandLine`, for every command
    recipe.py        how a run pruned, as a file to share, and the `Config` that repeats it
    command_line.py  argv of a run -> `Command` (the config and the few flags that are not part of it)
    validation.py    limits of single fields, refused features, and what fields must say about each other

To add an option, add one field to one section: its flag, help, YAML, limits and error messages follow from it.
"""

from megatron_prune.config.command_line import Command, configured, load_config, parse_command
from megatron_prune.config.flags import CommandLine, Given
from megatron_prune.config.pruning import (
    ContinuedConfig,
    Curve,
    DistillationConfig,
    GroupConfig,
    GroupConfigs,
    PruningConfig,
    SecondOrder,
    Target,
)
from megatron_prune.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_prune.config.validation import check_fields, check_head_score, data_parallel_size, validate
from megatron_prune.config.yaml_file import dump, load_plain_yaml, read_file, read_yaml, yaml_value
