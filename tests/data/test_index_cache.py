"""Index caches: whoever wrote them, nothing in them is executed, and what is not whole is made again or named."""

from __future__ import annotations

import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.data import index_cache
from megatron_prune.data.datasets import build_datasets, parse_blend
from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.ranks import run_ranks

from .conftest import make_documents, mutated

SEQ = 32


@pytest.fixture(scope="module")
def tokenizer(sp_model: Path) -> Tokenizer:
    return build_tokenizer(None, str(sp_model))


@pytest.fixture(scope="module")
def blend_text(sp_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two data sets."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        source = folder / f"{number}.txt"
        source.write_text("\n\n".join(make_documents(60, number)), encoding="utf-8")
        preprocess([str(source)], str(folder / f"d{number}"), Options(str(sp_model)))
    return f"1 {folder}/d0 2 {folder}/d1"


def samples(blend_text: str, tokenizer: Tokenizer, cache: Path) -> list[list[int]]:
    train, valid, _ = build_datasets(
        parse_blend(blend_text), tokenizer, SEQ, (40, 3, 0), "80,20,0", seed=1, cache_path=str(cache)
    )
    return [dataset[i]["tokens"].tolist() for dataset, count in ((train, 40), (valid, 3)) for i in range(count)]


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npy"))


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_nothing_in_a_cache_is_executed(blend_text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = samples(blend_text, tokenizer, tmp_path / "cache")
    found, mark = files(tmp_path / "cache"), tmp_path / "ran"
    assert len(found) == 2 * 2 * 3 + 2 * 2, "of two data sets and two splits, and of the blends"
    payload = np.empty(1, dtype=object)
    payload[0] = Payload(mark)
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Payload(mark))),
        lambda path: np.save(path, payload, allow_pickle=True),
        lambda path: path.write_bytes(b"PK\x03\x04" + pickle.dumps(payload)),
    ):
        for path in found:
            write(path)
        assert samples(blend_text, tokenizer, tmp_path / "cache") == expected
    assert not mark.exists()
    assert all(np.load(path, allow_pickle=False).dtype != object for path in found)
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(Payload(tmp_path / "no" / "folder")))  # the payload does what it says


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:50],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:128] + bytes(len(content) - 128),
        lambda content: content[:128] + b"\xff" * (len(content) - 128),
        lambda content: content.replace(b"'<i4'", b"'<f4'").replace(b"'<u4'", b"'>u4'"),
    ],
    ids=["half", "header", "empty", "longer", "zeros", "ones", "types"],
)
def test_a_cache_that_is_not_whole_is_made_again(
    blend_text: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    expected, whole = samples(blend_text, tokenizer, cache), [path.read_bytes() for path in files(cache)]
    for path, content in zip(files(cache), whole):
        path.write_bytes(damage(content))
    assert samples(blend_text, tokenizer, cache) == expected
    assert "is no whole index (" in caplog.text
    made = [path.read_bytes() for path in files(cache)]
    assert [len(content) for content in made] == [len(content) for content in whole]
    samples_again = samples(blend_text, tokenizer, cache)
    assert samples_again == expected


@given(seed=st.integers(0, 2**32))
def test_a_mutated_cache_gives_samples_or_one_line(
    seed: int, blend_text: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random, cache = Random(seed), tmp_path_factory.getbasetemp() / "mutated_cache"
    samples(blend_text, tokenizer, cache)
    for _ in range(4):
        path = random.choice(files(cache))
        path.write_bytes(mutated(path.read_bytes(), random))
        try:
            samples(blend_text, tokenizer, cache)
        except UserError as error:
            assert "\n" not in str(error) and str(cache) in str(error)
            path.unlink()


def test_builders_that_race_all_read_whole_indices(blend_text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    expected = samples(blend_text, tokenizer, tmp_path / "alone")
    found: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: found.append(samples(blend_text, tokenizer, tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".partial")]


def test_what_a_killed_builder_left_is_removed(blend_text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    samples(blend_text, tokenizer, tmp_path)
    for path in files(tmp_path):
        path.rename(path.with_name(f".{path.name}.0123abcd.partial"))
    samples(blend_text, tokenizer, tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_a_whole_cache_is_enough_where_nothing_can_be_written(
    blend_text: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = samples(blend_text, tokenizer, tmp_path)
    monkeypatch.setattr(index_cache.os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(index_cache, "_publish", None)
    assert samples(blend_text, tokenizer, tmp_path) == expected
    files(tmp_path)[0].unlink()
    with pytest.raises(UserError, match=r"--data-cache-path\): .* holds no whole index of this data and cannot be wr"):
        samples(blend_text, tokenizer, tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing(blend_text: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))  # bytes of a file: the disk's own end is as sudden
    try:
        with pytest.raises(
            UserError, match=r"--data-cache-path\): .* cannot take the index .*: File too large; make room"
        ):
            samples(blend_text, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name.endswith(".partial")]
    assert samples(blend_text, tokenizer, tmp_path) == samples(blend_text, tokenizer, tmp_path / "other")


def _on_its_own_disk(rank: int, _world_size: int, text: str, model: str, folder: str) -> list[list[int]]:
    return samples(text, build_tokenizer(None, model), Path(folder) / str(rank))


def _with_a_wrong_rank(rank: int, _world_size: int, text: str, model: str, folder: str) -> str:
    cache = Path(folder) / str(rank)
    if rank == 1:
        cache.parent.mkdir(exist_ok=True)
        cache.write_text("")
    with pytest.raises(UserError) as refusal:
        samples(text, build_tokenizer(None, model), cache)
    return str(refusal.value)


def test_ranks_without_a_shared_cache_make_their_own(blend_text: str, sp_model: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_on_its_own_disk, 2, blend_text, str(sp_model), str(tmp_path))
    assert first == second
    told = run_ranks(_with_a_wrong_rank, 2, blend_text, str(sp_model), str(tmp_path / "other"))
    assert told[0] == told[1] and "Not a directory" in told[0], "all ranks say it, and none waits"
