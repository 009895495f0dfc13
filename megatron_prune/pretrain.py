"""Train, prune while training, and train on.

    torchrun --nproc-per-node 8 -m megatron_prune.pretrain --config run.yaml [--some-field value ...]
    python -m megatron_prune.pretrain --config run.yaml        (one rank, no launcher)

Reads a configuration, opens what it names, builds the model on this rank's place in the mesh and runs the loop.
Mistakes end in one line on one rank and exit status 2 on all (see `launch.failures`).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Optional accelerators that megatron-core misses are its own remark at every import, not news for the user.
warnings.filterwarnings("ignore", module=r"megatron\.core")


def main(argv: list[str] | None = None) -> int:
    """Run one job on this rank; returns the exit status."""
    from megatron_prune.launch.failures import exit_status

    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    from megatron_prune.config import parse_command, validate

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("megatron_prune").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    command = parse_command(argv)
    if command.text is not None:
        if rank == 0:
            sys.stdout.write(command.text + "\n")
        return 0
    config = command.config
    validate(config, (command.world_size or world_size) if command.dry_run else world_size)
    if command.dry_run:
        from megatron_prune.launch.dry_run import dry_run

        return dry_run(config, command.world_size or world_size)
    return _train(config)


def _train(config: object) -> int:
    from megatron_prune.config import Config
    from megatron_prune.launch.build import build_trainer
    from megatron_prune.launch.failures import agreed
    from megatron_prune.launch.inputs import open_inputs
    from megatron_prune.launch.outputs import write_config, write_summary
    from megatron_prune.runtime.device import choose_device
    from megatron_prune.runtime.mesh import close_mesh, init_mesh

    assert isinstance(config, Config)
    logger, parallel = logging.getLogger(__name__), config.parallel
    mesh = init_mesh(
        choose_device(parallel.device),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.distributed_timeout_minutes,
    )
    try:
        inputs = agreed(mesh, lambda: open_inputs(config))
        logger.info("%s; %d parameters to start with", mesh.describe(), inputs.architecture.parameters)
        trainer = build_trainer(config, inputs, mesh)
        if trainer.history is not None:
            write_config(config, trainer.history.path.parent)
        trainer.fit()
        trainer.reporter.close()
        if trainer.history is not None:
            trainer.history.close()
            write_summary(config, trainer.state, trainer.history.path.parent)
    finally:
        close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
