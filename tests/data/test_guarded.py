"""Data that turn out wrong while they are read: one line with the file's name, on all ranks, and no signal."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.data import indexed
from megatron_prune.data.datasets import build_datasets, parse_blend
from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.pretrain import main
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import TinyRun, prepare

SEQ = 32


def open_data(prefix: str, sp_model: Path, vocab_size: int) -> Any:
    blend = parse_blend(prefix, vocab_size)
    return build_datasets(blend, build_tokenizer(None, str(sp_model)), SEQ, (20, 0, 0), "1,0,0", seed=1)[0]


def read_all(dataset: Any) -> None:
    for number in range(len(dataset)):
        dataset[number]


@pytest.mark.parametrize("suffix", [".bin", ".idx", "-document_index.npy", "-sample_index.npy", "-shuffle_index.npy"])
def test_a_file_cut_under_a_running_job_is_named(
    make_data: Callable[..., str], sp_model: Path, suffix: str, tmp_path: Path
) -> None:
    dataset = open_data(make_data("p"), sp_model, 400)
    read_all(dataset)
    (path,) = [path for path in tmp_path.rglob(f"*{suffix}") if path.is_file()]
    os.truncate(path, 100)
    with pytest.raises(UserError, match=rf"{path.name}: was cut short while it was in use"):
        read_all(dataset)


def test_an_id_that_lies_beyond_what_is_looked_at_first_is_found_when_it_is_read(
    make_data: Callable[..., str], sp_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = make_data("p")
    Path(prefix + ".json").unlink()
    ids = np.fromfile(prefix + ".bin", np.uint16)
    ids[-2] = 40000
    ids.tofile(prefix + ".bin")
    with pytest.raises(UserError, match="p: holds token id 40000, but the model's vocabulary is 400"):
        parse_blend(prefix, 400)
    monkeypatch.setattr(indexed, "_PEEK_BYTES", 1000)
    dataset = open_data(prefix, sp_model, 400)
    with pytest.raises(
        UserError, match=r"p: holds token id 40000 near document \d+, but the model's vocabulary is 400"
    ):
        read_all(dataset)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return prepare(tmp_path_factory.mktemp("tiny"))


def _run(rank: int, _world_size: int, arguments: list[str], cut: str | None) -> None:
    """A run in which the first ids of data are not looked at before training, and `cut` is shortened in its middle."""
    indexed._PEEK_BYTES = 2
    if cut is not None and rank == 0:
        threading.Thread(target=_cut, args=(cut, Path(arguments[arguments.index("--save") + 1])), daemon=True).start()
    os._exit(main(arguments))


def _cut(path: str, save: Path) -> None:
    while not list(save.glob("iter_*")):
        time.sleep(0.001)
    os.truncate(path, 64)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
@pytest.mark.parametrize("fault", ["id", "cut"])
def test_a_run_ends_with_one_line(tiny: TinyRun, tmp_path: Path, layout: str, fault: str) -> None:
    data = tmp_path / "mine"
    for suffix in (".bin", ".idx"):
        Path(f"{data}{suffix}").write_bytes(Path(f"{tiny.data()}{suffix}").read_bytes())
    if fault == "id":
        ids = np.fromfile(f"{data}.bin", np.uint16)
        ids[500::1000] = 64  # one beyond the model's
        ids.tofile(f"{data}.bin")
    layouts = {
        "tp2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        "dp2": ("--use-distributed-optimizer",),
    }
    arguments = tiny.arguments(tmp_path / "run", *layouts[layout], "--save-interval", 1, "--data-path", data)
    arguments += ["--data-cache-path", str(tmp_path / "cache")]
    fates = watch_ranks(_run, 2, arguments, f"{data}.bin" if fault == "cut" else None)
    output = "".join(fate.output for fate in fates)
    assert [fate.exit_code for fate in fates] == [2, 2], output
    words = "mine: holds token id 64 near document" if fault == "id" else "mine.bin: was cut short while it was in use"
    assert output.count(f"error: {tmp_path}/{words}") == output.count("error:") == 1, output
    assert "Traceback" not in output
