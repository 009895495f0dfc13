"""What a checkpoint says about itself, readable before a model exists.

    Header         iteration, architecture, slot map, the run's own state, and facts about the stored tensors
    read_header    DIR -> Header; no torch.distributed needed
    header_files   the small files of a checkpoint, as bytes

In each `iter_...` folder, beside megatron-core's own files (`.metadata`, `metadata.json`, `*.distcp`):

    architecture.json   widths and live units, for people and machines
    layout.json         which unit sat in which slot, empty slots included: the same layout resumes bit for bit
    run_state.json      facts needed to load, the scalars of the run's state
    config.yaml         the effective configuration, when the state has one
    common.pt           the whole of the run's state, and random generators per rank
    checksums.json      sizes and CRC-32 of all these

The run's state is any nesting of dicts, lists, tuples, numbers, strings, None, numpy arrays and tensors. By convention
`config` (YAML text), `tokens`, `consumed_samples`, `history` (list of removals as JSON objects) are in it; tools look
for them, nothing depends on them.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch import Tensor

from megatron_prune import __version__
from megatron_prune.checkpoint.files import MANIFEST, damages, read_manifest, refuse_damaged, resolve
from megatron_prune.checkpoint.guarded import load_plain
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import Quanta, ShardLayout

FORMAT = 1
HEADER_FILES = ("architecture.json", "layout.json", "run_state.json", "common.pt", "metadata.json")
CONFIG_FILE = "config.yaml"
_ARRAY = "__ndarray__"


@dataclass(frozen=True)
class Facts:
    """What the stored tensors are.

    Args:
        dtype: of the model weights, e.g. `float32`.
        optimizer: kinds of optimizer state stored, out of `exp_avg`, `exp_avg_sq`, `main`.
        adam_step: steps taken (bias correction).
        tensor, pipeline, data: sizes of the mesh that saved it.
    """

    dtype: str
    optimizer: tuple[str, ...]
    adam_step: int
    tensor: int
    pipeline: int
    data: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """(tensor, pipeline, data)."""
        return self.tensor, self.pipeline, self.data


@dataclass(frozen=True)
class Header:
    """All of a checkpoint except its tensors.

    Args:
        path: its folder.
        layout_state: slot map (see `ShardLayout.to_state`).
        state: what the run gave to `save_checkpoint`.
        rng: per rank, states of the random generators.
    """

    iteration: int
    path: Path
    architecture: Architecture
    layout_state: dict[str, Any]
    state: dict[str, Any]
    facts: Facts
    rng: list[dict[str, Any]]

    @property
    def saved_layout(self) -> ShardLayout:
        """The layout that was saved, empty slots included."""
        return ShardLayout.from_state(self.architecture, self.layout_state)

    def layout(self, tp: int, quanta: Quanta) -> ShardLayout:
        """The layout to build the model with: the saved slots when TP and quanta are the same, else packed anew."""
        if tp == self.layout_state["tp"] and dataclasses.asdict(quanta) == self.layout_state["quanta"]:
            return self.saved_layout
        return ShardLayout.pack(self.architecture, tp, quanta)


def header_files(
    iteration: int, layout: ShardLayout, facts: Facts, state: dict[str, Any], rng: list[dict[str, Any]]
) -> dict[str, bytes]:
    """File name -> content, a snapshot of everything given.

    Raises:
        TypeError: `state` holds something that is not plain; names where.
    """
    common = io.BytesIO()
    torch.save({"state": encode(state), "rng": encode(rng)}, common)
    run = {
        "format": FORMAT,
        "iteration": iteration,
        **dataclasses.asdict(facts),
        "written_by": f"megatron_prune {__version__}",
        "state": {k: v for k, v in state.items() if k != "config" and isinstance(v, (bool, int, float, str))},
    }
    files = {
        "architecture.json": _json(layout.architecture.to_json()),
        "layout.json": json.dumps(layout.to_state()).encode(),
        "run_state.json": _json(run),
        "common.pt": common.getvalue(),
        "metadata.json": _json(dataclasses.asdict(CheckpointingConfig("torch_dist"))),
    }
    if isinstance(state.get("config"), str):
        files[CONFIG_FILE] = state["config"].encode()
    return files


def read_header(directory: str | Path, step: int | None = None) -> Header:
    """Read and verify the small files of a checkpoint.

    Args:
        directory: the folder that was saved to, or one `iter_...` folder in it.
        step: iteration; None: the newest complete one.

    Raises:
        UserError: there is no such checkpoint, or one of these files is damaged; names the newest good one.
    """
    directory = Path(directory)
    iteration, folder = resolve(directory, step)
    refuse_damaged(folder.parent, iteration, damages(folder, HEADER_FILES))
    run = _load_json(folder / "run_state.json")
    if run.get("format") != FORMAT:
        raise UserError(
            f"{folder / 'run_state.json'}: format {str(run.get('format'))[:60]}, this version reads {FORMAT}"
        )
    if run.get("iteration") != iteration:
        found = str(run.get("iteration"))[:60]
        raise UserError(
            f"{folder}: holds the checkpoint of iteration {found}; folders of checkpoints keep their "
            "names: rename it back"
        )
    common, layout = load_plain(folder / "common.pt"), _load_json(folder / "layout.json")
    if type(layout.get("tp")) is not int or not isinstance(layout.get("quanta"), dict):
        raise UserError(f"{folder / 'layout.json'}: is no slot map")
    if (
        not isinstance(common, dict)
        or not isinstance(common.get("state"), dict)
        or not isinstance(common.get("rng"), list)
    ):
        raise UserError(f"{folder / 'common.pt'}: holds no state of a run")
    return Header(
        iteration=iteration,
        path=folder,
        architecture=Architecture.from_json(_load_json(folder / "architecture.json")),
        layout_state=layout,
        state=decode(common["state"]),
        facts=_facts(run, folder / "run_state.json"),
        rng=decode(common["rng"]),
    )


def _facts(run: dict[str, Any], file: Path) -> Facts:
    names = [field.name for field in dataclasses.fields(Facts)]
    kinds = run.get("optimizer")
    if run.get("dtype") not in ("float32", "float16", "bfloat16") or not isinstance(kinds, list):
        raise UserError(f"{file}: dtype or optimizer are none that is stored here")
    for name in names[2:]:
        if type(run.get(name)) is not int or not 0 <= run[name] < 1 << 62:
            raise UserError(f"{file}: {name}: {str(run.get(name))[:60]!r} is no whole number")
    if not set(map(str, kinds)) <= {"exp_avg", "exp_avg_sq", "main"}:
        raise UserError(f"{file}: optimizer: {str(kinds)[:60]!r} are no kinds of state")
    return Facts(**{name: run[name] for name in names} | {"optimizer": tuple(map(str, kinds))})


def stored_bytes(header: Header) -> int:
    """Size of the whole checkpoint."""
    return sum(d.size for d in read_manifest(header.path).values()) + (header.path / MANIFEST).stat().st_size


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _load_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no JSON object")
    return found


def encode(value: Any, where: str = "state") -> Any:
    """A copy of `value` that torch loads without running code: arrays become marked tensors.

    Raises:
        TypeError: something else than plain values, containers, arrays and tensors; names where.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: keys must be strings or integers, not {key!r}")
        return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} cannot be stored; give plain values, arrays or tensors")


def decode(value: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return value[_ARRAY].numpy()
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item) for item in value)
    return value
