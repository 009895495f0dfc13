"""A data set whose files are missing, damaged or someone else's is refused with the file's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.data.indexed import inspect, read_metadata
from megatron_prune.errors import UserError


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


def test_a_data_set_made_anew_has_another_fingerprint(make_data: Callable[..., str]) -> None:
    before = inspect(make_data("p")).fingerprint
    assert inspect(make_data("p")).fingerprint == before
    assert inspect(make_data("p", seed=7)).fingerprint != before
