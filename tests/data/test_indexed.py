"""A data set whose files are missing, damaged or someone else's is refused with the file's name."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.data import indexed
from megatron_prune.data.datasets import parse_blend
from megatron_prune.data.indexed import inspect, read_metadata
from megatron_prune.errors import UserError

from .conftest import mutated


def test_a_whole_data_set_is_described(make_data: Callable[..., str]) -> None:
    data = inspect(make_data("p", count=50))
    assert data.metadata is not None
    assert (data.sequences, data.tokens) == (50, data.metadata.tokens)
    assert data.lengths.sum() == data.tokens
    assert data.max_token_id == data.metadata.max_token_id


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_truncated_files_are_named(make_data: Callable[..., str], suffix: str) -> None:
    prefix = make_data("p")
    path = Path(prefix + suffix)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"p\{suffix}: is truncated"):
            inspect(prefix)
    path.unlink()
    with pytest.raises(UserError, match=rf"p\{suffix}: does not exist"):
        inspect(prefix)


def test_files_that_do_not_belong_together_are_refused(make_data: Callable[..., str]) -> None:
    one, two = make_data("one", count=50), make_data("two", count=80)
    Path(one + ".bin").write_bytes(Path(two + ".bin").read_bytes())
    with pytest.raises(UserError, match=r"one\.bin: does not belong to one\.idx"):
        inspect(one)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"p{suffix}").write_bytes(b"something else entirely" * 10)
    with pytest.raises(UserError, match=r"p\.idx: is no index"):
        inspect(str(tmp_path / "p"))


def test_a_file_given_for_its_prefix_is_explained(make_data: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"give the prefix without \.idx"):
        inspect(make_data("p") + ".idx")


def test_data_of_other_tools_is_read_without_metadata(make_data: Callable[..., str]) -> None:
    prefix = make_data("p")
    known = inspect(prefix)
    Path(prefix + ".json").write_text('{"text": "a corpus of the same name"}\n{"text": "b"}\n')
    data = inspect(prefix)
    assert data.metadata is None
    assert data.max_token_id == known.max_token_id


def test_incomplete_metadata_is_named(make_data: Callable[..., str]) -> None:
    prefix = make_data("p")
    path = Path(prefix + ".json")
    path.write_text(path.read_text().replace('"tokens"', '"coins"'))
    with pytest.raises(UserError, match=r"p\.json: fields are missing or unknown \(coins, tokens\)"):
        read_metadata(prefix)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("absent", path)], ids=["pipe", "nowhere"])
@pytest.mark.timeout(60)
def test_metadata_that_are_no_file_are_not_taken_for_absent(make_data: Callable[..., str], make: Any) -> None:
    prefix = make_data("p")
    Path(prefix + ".json").unlink()
    make(prefix + ".json")
    with pytest.raises(UserError, match=r"p\.json: is a (pipe|link)"):
        inspect(prefix)


def test_metadata_of_other_data_is_refused(make_data: Callable[..., str]) -> None:
    one, two = make_data("one", count=50), make_data("two", count=80)
    Path(one + ".json").write_text(Path(two + ".json").read_text())
    with pytest.raises(UserError, match=r"one\.json: describes other data \(\d+ tokens as uint16"):
        inspect(one)
    Path(one + ".json").write_text(Path(two + ".json").read_text().replace('"max_token_id": ', '"max_token_id": -'))
    with pytest.raises(UserError, match=r"one\.json: max_token_id has a value of the wrong kind"):
        inspect(one)


def write_index(prefix: Path, lengths: list[int], offsets: list[int], borders: list[int], tokens: int = 9) -> str:
    """A data set of uint16 ids 0, 1, ... whose index says what it is told to."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(borders))
    arrays = [np.array(lengths, "<i4"), np.array(offsets, "<i8"), np.array(borders, "<i8")]
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    np.arange(tokens, dtype=np.uint16).tofile(f"{prefix}.bin")
    return str(prefix)


@pytest.mark.parametrize(
    ("lengths", "offsets", "borders", "words"),
    [
        ([2, -3, 10], [0, 4, -2], [0, 1, 2, 3], "sequence 1 has -3 tokens at byte 4"),
        ([2, 3, 4], [0, 8, 10], [0, 1, 2, 3], "sequence 1 has 3 tokens at byte 8, where byte 4 is due"),
        ([2, 3, 4], [4, 4, 10], [0, 1, 2, 3], "sequence 0 has 2 tokens at byte 4, where byte 0 is due"),
        ([2, 3, 4], [0, 4, 10], [0, 1, 2], "the documents end at sequence 2 of 3"),
        ([2, 3, 4], [0, 4, 10], [], "the documents end at sequence 0 of 3"),
        ([2, 3, 4], [0, 4, 10], [0, 2, 1, 3], "the documents' borders do not rise"),
    ],
)
def test_every_entry_of_an_index_is_looked_at(
    tmp_path: Path,
    lengths: list[int],
    offsets: list[int],
    borders: list[int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for together in (1 << 20, 2, 1):
        monkeypatch.setattr(indexed, "_ENTRIES", together)
        assert inspect(write_index(tmp_path / "good", [2, 3, 4], [0, 4, 10], [0, 1, 2, 3])).tokens == 9
        with pytest.raises(UserError, match=rf"p\.idx: is damaged: .*{words}"):
            inspect(write_index(tmp_path / "p", lengths, offsets, borders))


def test_ids_below_zero_are_seen(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "p", [2, 3, 4], [0, 4, 10], [0, 1, 2, 3])
    content = bytearray(Path(prefix + ".idx").read_bytes())
    content[17] = 3  # int16
    Path(prefix + ".idx").write_bytes(content)
    np.array([1, 2, 3, -5, 4, 5, 6, 7, 8], np.int16).tofile(prefix + ".bin")
    with pytest.raises(UserError, match="p: holds token id -5, but the model's vocabulary is 100"):
        parse_blend(prefix, vocab_size=100)


@given(seed=st.integers(0, 2**32))
def test_a_mutated_data_set_is_refused_in_one_line_or_read_whole(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    random, folder = Random(seed), tmp_path_factory.getbasetemp()
    for _ in range(8):
        lengths = [random.randrange(4) for _ in range(random.randint(1, 6))]
        ends = np.cumsum(lengths).tolist()
        offsets = [2 * start for start in [0, *ends[:-1]]]
        prefix = write_index(folder / "mutated", lengths, offsets, list(range(len(lengths) + 1)), ends[-1])
        path = Path(prefix + random.choice((".idx", ".bin")))
        path.write_bytes(mutated(path.read_bytes(), random))
        try:
            data = inspect(prefix)
        except UserError as error:
            assert "\n" not in str(error) and prefix in str(error)
            continue
        whole = IndexedDataset(prefix)
        assert sum(len(whole[i]) for i in range(len(whole))) == data.tokens == int(data.lengths.sum())


def test_a_data_set_made_anew_has_another_fingerprint(make_data: Callable[..., str]) -> None:
    before = inspect(make_data("p")).fingerprint
    assert inspect(make_data("p")).fingerprint == before
    assert inspect(make_data("p", seed=7)).fingerprint != before
