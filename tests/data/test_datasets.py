"""Blends give their shares, data sets give the stored tokens, and ranks share batches without changing them."""

from __future__ import annotations

import gc
import logging
import os
import re
import resource
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.config import parse_command
from megatron_prune.data.batches import BatchStream
from megatron_prune.data.datasets import Blend, build_datasets, check_vocabulary, parse_blend
from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.testing.helpers.ranks import run_ranks

from .conftest import VOCAB_SIZE

SEQ = 32


@pytest.fixture(scope="session")
def tokenizer(sp_model: Path) -> Tokenizer:
    return build_tokenizer(None, str(sp_model))


def rows(dataset: Any, count: int | None = None) -> np.ndarray:
    """[samples, SEQ + 1]: tokens and the last label."""
    samples = [dataset[i] for i in range(len(dataset) if count is None else count)]
    return np.array([[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples])


# The blend ------------------------------------------------------------------------------------------------------------


def test_one_prefix_and_weighted_prefixes_are_read(make_data: Callable[..., str]) -> None:
    one, two = make_data("one"), make_data("two")
    assert (parse_blend(one).prefixes, parse_blend(one).weights) == ((one,), None)
    assert parse_blend(f"2 {one}").weights is None
    blend = parse_blend(f" 0.5 {one}  1e1 {two}\n")
    assert (blend.prefixes, blend.weights) == ((one, two), (0.5, 10.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1 {p} 2", 'the last weight, "2", has no prefix'),
        ("{p} {p}", 'expected a weight, got ".*p"; give one prefix'),
        ("1 {p} {p}", 'expected a weight, got ".*p"'),
        ("0 {p} 1 {p}", "the weight 0 is not between 1e-15 and 1e"),
        ("-1 {p} 1 {p}", "the weight -1 is not between 1e-15 and 1e"),
        ("nan {p} 1 {p}", "the weight nan is not between 1e-15 and 1e"),
        ("1e-300 {p} 1e300 {p}", "the weight 1e-300 is not between"),
        ("1e308 {p} 1e308 {p}", "the weight 1e308 is not between"),
        ("inf {p} 1 {p}", "the weight inf is not between 1e-15 and 1e"),
        ("1 {p} 1 {p}_", r"p_\.idx: does not exist"),
    ],
)
def test_a_wrong_blend_is_explained(make_data: Callable[..., str], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_blend(text.format(p=make_data("p")))


def test_the_option_is_named(make_data: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"^data\.data_path \(--data-path\): "):
        parse_blend(" ")
    with pytest.raises(UserError, match=r"^data\.valid_data_path \(--valid-data-path\): "):
        parse_blend("x y", field="data.valid_data_path (--valid-data-path)")


def test_prefixes_with_spaces_and_quotes(make_data: Callable[..., str], tmp_path: Path) -> None:
    spaced, quoted = make_data("two words"), make_data('it\'s "mine"')
    for alone in (spaced, quoted):
        assert parse_blend(alone).prefixes == (alone,), "what stands there is one prefix"
    text = f"1 {shlex.quote(spaced)} 2 {shlex.quote(quoted)}"
    assert parse_blend(text).prefixes == (spaced, quoted)
    arguments = ["--data-path", "1", spaced, "2", quoted]
    config = parse_command(arguments).config
    assert config is not None and config.data.data_path is not None
    assert parse_blend(config.data.data_path).prefixes == (spaced, quoted), "several words of a command line"
    with pytest.raises(UserError, match='expected a weight, got ".*two"; .* with quotes around a prefix'):
        parse_blend(f"{tmp_path}/two wordz")
    with pytest.raises(UserError, match="no closing quotation; quote a prefix"):
        parse_blend("1 'a 2 b")


def test_many_data_sets_raise_the_limit_of_open_files(make_data: Callable[..., str], sp_model: Path) -> None:
    ((count, told),) = run_ranks(_open_many, 1, make_data("p", 20), str(sp_model))
    assert count <= 400, "a data set of one split keeps five files open"
    assert re.search(
        r"80 data sets keep \d+ files open, and this system allows 300 \(ulimit -Hn\); raise that to", told
    )


def _open_many(_rank: int, _world_size: int, prefix: str, model: str) -> tuple[int, str]:
    """Files that 80 data sets of one split keep open, begun under a limit of 100; what is said where 300 is all."""
    blend = parse_blend(" ".join([f"1 {prefix}"] * 80))

    def build() -> Any:
        return build_datasets(blend, build_tokenizer(None, model), SEQ, (80, 0, 0), "1,0,0", seed=1)[0]

    before, (_, hard) = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    train = build()
    assert len(rows(train)) == len(train)
    count = len(os.listdir("/proc/self/fd")) - before - 2
    del train
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
    with pytest.raises(UserError) as refusal:
        build()
    return count, str(refusal.value)


def test_vocabularies_that_disagree_are_refused(
    make_data: Callable[..., str], tokenizer: Tokenizer, hf_folder: Path
) -> None:
    prefix = make_data("p")
    blend = parse_blend(prefix, vocab_size=VOCAB_SIZE)
    largest = blend.data[0].max_token_id
    with pytest.raises(UserError, match=f"holds token id {largest}, but the model's vocabulary is {largest}"):
        parse_blend(prefix, vocab_size=largest)
    for model_size in (VOCAB_SIZE, VOCAB_SIZE + 1000):
        check_vocabulary(tokenizer, blend, model_size)
    for model_size in (VOCAB_SIZE - 1, 32000):
        with pytest.raises(UserError, match=f"has {VOCAB_SIZE} ids, the model {model_size}"):
            check_vocabulary(tokenizer, blend, model_size)
    other = build_tokenizer(None, str(hf_folder))
    with pytest.raises(UserError, match=f"was made with a tokenizer of {VOCAB_SIZE} ids"):
        check_vocabulary(other, blend, other.vocab_size)


def test_another_tokenizer_of_the_same_size_is_warned_about(
    make_data: Callable[..., str],
    sp_model: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from .conftest import train_sentencepiece

    caplog.set_level(logging.WARNING)
    blend = parse_blend(make_data("p"))
    check_vocabulary(tokenizer, blend, VOCAB_SIZE)
    assert not caplog.records
    other = build_tokenizer(None, str(train_sentencepiece(tmp_path / "p.txt", tmp_path / "other")))
    check_vocabulary(other, blend, VOCAB_SIZE)
    assert f"was made with the tokenizer {sp_model}, which is another file than {other.path}" in caplog.text


def test_data_whose_tokenizer_is_not_known_says_why(
    make_data: Callable[..., str], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megatron_prune")
    file = Path(prefix := make_data("p")).with_suffix(".json")
    for content, words in (("[1, 2]", "has a .json beside it that is none of preprocessing's"), (None, "has no .json")):
        file.write_text(content) if content else file.unlink()
        check_vocabulary(tokenizer, parse_blend(prefix), VOCAB_SIZE)
        assert words in caplog.records[-1].getMessage()


# megatron-core's data sets --------------------------------------------------------------------------------------------


def test_one_epoch_of_one_document_is_its_tokens_in_order(
    text_file: Path, sp_model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prefix = str(tmp_path / "p")
    preprocess([str(text_file)], prefix, Options(str(sp_model), document_separator="file"))
    train, valid, test = build_datasets(parse_blend(prefix), tokenizer, SEQ, (None, 0, 0), "1,0,0", seed=1)
    assert valid is None and test is None
    stored = np.fromfile(prefix + ".bin", np.uint16)
    expected = [stored[i * SEQ : (i + 1) * SEQ + 1].tolist() for i in range((len(stored) - 1) // SEQ)]
    assert sorted(rows(train).tolist()) == sorted(expected)


def test_items_are_tokens_and_their_successors(make_data: Callable[..., str], tokenizer: Tokenizer) -> None:
    blend = parse_blend(make_data("p"))
    train, _, _ = build_datasets(blend, tokenizer, SEQ, (20, 0, 0), "1,0,0", seed=1)
    masked, _, _ = build_datasets(blend, tokenizer, SEQ, (20, 0, 0), "1,0,0", seed=1, eod_mask_loss=True)
    ends = 0
    for i in range(20):
        tokens, labels, mask = (train[i][name] for name in ("tokens", "labels", "loss_mask"))
        assert tokens.dtype == labels.dtype == torch.int64 and mask.dtype == torch.float32
        assert tokens.shape == labels.shape == mask.shape == (SEQ,)
        assert torch.equal(tokens[1:], labels[:-1])
        assert mask.all()
        assert torch.equal(masked[i]["loss_mask"], (tokens != tokenizer.eod).float())
        ends += int((tokens == tokenizer.eod).sum())
    assert ends > 0


def test_splits_share_no_document(tokenizer: Tokenizer, sp_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(["one"] * 80 + ["two"] * 15 + ["house"] * 5))
    preprocess([str(source)], str(tmp_path / "p"), Options(str(sp_model)))
    built = build_datasets(parse_blend(str(tmp_path / "p")), tokenizer, 4, (30, 5, 2), "80,15,5", seed=1)
    for dataset, word, count in zip(built, ("one", "two", "house"), (30, 5, 2)):
        assert len(dataset) >= count
        seen = set(rows(dataset, count).ravel().tolist())
        assert seen <= set(tokenizer.tokenize(word))
        assert [other for other in ("one", "two", "house") if seen <= set(tokenizer.tokenize(other))] == [word]


def test_seed_decides_the_order(make_data: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    blend = parse_blend(make_data("p"))

    def build(seed: int, cache: str) -> np.ndarray:
        return rows(build_datasets(blend, tokenizer, SEQ, (40, 0, 0), "1,0,0", seed, str(tmp_path / cache))[0], 40)

    first = build(1, "a")
    assert (build(1, "a") == first).all()  # from the cache
    assert (build(1, "b") == first).all()  # made again
    assert (build(2, "a") != first).any()


@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (0.05, 0.9)])
def test_blends_draw_by_weight(make_data: Callable[..., str], tokenizer: Tokenizer, weights: tuple[float, ...]) -> None:
    blend = parse_blend(f"{weights[0]} {make_data('one', 120, 1)} {weights[1]} {make_data('two', 150, 2)}")
    train, valid, _ = build_datasets(blend, tokenizer, SEQ, (1000, 7, 0), "90,10,0", seed=1)
    drawn = Counter(int(train[i]["dataset_id"]) for i in range(1000))
    for i, weight in enumerate(weights):
        assert abs(drawn[i] - 1000 * weight / sum(weights)) <= 1
    assert len(valid) >= 7
    assert valid[0]["tokens"].shape == (SEQ,)


def test_blends_of_many_unequal_parts_do_not_run_dry(make_data: Callable[..., str], tokenizer: Tokenizer) -> None:
    small = make_data("small", 40)
    blend = parse_blend(f"90 {make_data('large')} " + f"1 {small} " * 12)
    train, valid, _ = build_datasets(blend, tokenizer, SEQ, (8, 3, 0), "80,20,0", seed=1)
    assert len(train) >= 8 and len(valid) >= 3
    assert rows(train).shape == (len(train), SEQ + 1)


def test_data_made_anew_is_not_read_through_old_indices(make_data: Callable[..., str], tokenizer: Tokenizer) -> None:
    for count, seed in ((200, 1), (20, 2)):
        prefix = make_data("p", count, seed)
        train, _, _ = build_datasets(parse_blend(prefix), tokenizer, SEQ, (None, 0, 0), "1,0,0", seed=1)
        stored = np.fromfile(prefix + ".bin", np.uint16)
        assert len(train) == (len(stored) - 1) // SEQ
        assert set(rows(train).ravel().tolist()) <= set(stored.tolist())
        del train


def test_splits_that_cannot_be_made_are_explained(make_data: Callable[..., str], tokenizer: Tokenizer) -> None:
    blend = parse_blend(make_data("p", count=5))

    def build(samples: tuple[int | None, int | None, int | None], split: str, blend: Blend = blend) -> None:
        build_datasets(blend, tokenizer, SEQ, samples, split, seed=1)

    with pytest.raises(UserError, match=r"--split\) 969,30,1: leaves no document of .*p for validation, which has 5"):
        build((10, 1, 0), "969,30,1")
    build((10, 0, 0), "969,30,1")  # nobody asks for validation data
    for split in ("a,b,c", "1,2,3,4", "-1,2,0", "0,0,0", "", "nan,1,1"):
        with pytest.raises(UserError, match="expected three shares"):
            build((10, 0, 0), split)
    with pytest.raises(UserError, match="the training part of .*p is shorter than one sample"):
        build_datasets(blend, tokenizer, 100_000, (None, 0, 0), "1,0,0", seed=1)
    two = parse_blend(f"1 {blend.prefixes[0]} 1 {make_data('two')}")
    with pytest.raises(UserError, match="one epoch of training data needs a single data set"):
        build((None, 0, 0), "1,0,0", two)


def test_a_cache_that_cannot_be_made_is_named(
    make_data: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data-cache-path\): .*file"):
        build_datasets(
            parse_blend(make_data("p")), tokenizer, SEQ, (1, 0, 0), "1,0,0", 1, cache_path=str(tmp_path / "file")
        )


def test_megatron_s_chatter_stays_out_of_the_log(
    make_data: Callable[..., str], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    blend = parse_blend(f"1 {make_data('one')} 1 {make_data('two')}")
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, logger="megatron_prune")  # a run in this process may have set it
    caplog.clear()
    train, _, _ = build_datasets(blend, tokenizer, SEQ, (10, 0, 0), "1,0,0", seed=1)
    assert [record.getMessage() for record in caplog.records] == [f"training data: {len(train)} samples of 32 tokens"]


def _build_on_rank(rank: int, _world_size: int, blend_text: str, model: str, cache: str) -> list[Any]:
    """Blend and single data set, on all ranks and on rank 0 alone."""
    found = []
    for text in (blend_text, blend_text.split()[1]):
        for everywhere in (True, False):
            train, valid, _ = build_datasets(
                parse_blend(text),
                build_tokenizer(None, model),
                SEQ,
                (12, 2, 0),
                "90,10,0",
                seed=3,
                cache_path=os.path.join(cache, str(everywhere)),
                is_built_on_rank=lambda everywhere=everywhere: everywhere or rank == 0,
            )
            found.append(None if train is None else (rows(train, 12).tolist(), rows(valid, 2).tolist()))
    return found


def test_all_ranks_read_the_same(make_data: Callable[..., str], sp_model: Path, tmp_path: Path) -> None:
    text = f"1 {make_data('one')} 2 {make_data('two')}"
    alone = _build_on_rank(0, 1, text, str(sp_model), str(tmp_path / "alone"))
    first, second = run_ranks(_build_on_rank, 2, text, str(sp_model), str(tmp_path / "two"))
    assert first == alone
    assert second == [alone[0], None, alone[2], None]


# Micro-batches --------------------------------------------------------------------------------------------------------


class Numbers:
    """A data set whose sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.length
        sample = torch.full((3,), index)
        return {"tokens": sample, "labels": sample + 1, "loss_mask": torch.ones(3), "position_ids": sample}


@given(
    micro_batch_size=st.integers(1, 4),
    data_parallel_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    consumed=st.integers(0, 50),
    ahead=st.integers(0, 4),
)
def test_a_global_batch_is_the_next_samples_for_any_layout(
    micro_batch_size: int, data_parallel_size: int, accumulation: int, consumed: int, ahead: int
) -> None:
    dataset = Numbers(1000)
    streams = [
        BatchStream(dataset, micro_batch_size, rank, data_parallel_size, consumed, ahead)
        for rank in range(data_parallel_size)
    ]
    size = micro_batch_size * data_parallel_size * accumulation
    for step in range(3):
        batch = [int(i) for _ in range(accumulation) for stream in streams for i in next(stream)["tokens"][:, 0]]
        assert batch == list(range(consumed + step * size, consumed + (step + 1) * size))
        assert {stream.position for stream in streams} == {consumed + (step + 1) * size}


def test_a_stream_goes_on_from_its_position_on_another_layout() -> None:
    stream = BatchStream(Numbers(100), 2, 1, 3)
    next(stream)
    assert next(BatchStream(Numbers(100), 4, 0, 1, stream.position))["tokens"][:, 0].tolist() == [6, 7, 8, 9]


def test_micro_batches_are_stacked(make_data: Callable[..., str], tokenizer: Tokenizer) -> None:
    train, _, _ = build_datasets(parse_blend(make_data("p")), tokenizer, SEQ, (8, 0, 0), "1,0,0", seed=1)
    batch = next(iter(BatchStream(train, 4, 1, 2)))
    assert set(batch) == {"tokens", "labels", "loss_mask"}
    assert all(value.shape == (4, SEQ) for value in batch.values())
    assert (batch["tokens"].dtype, batch["labels"].dtype, batch["loss_mask"].dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    assert torch.equal(batch["tokens"][2], train[6]["tokens"])


@pytest.mark.parametrize("ahead", [0, 5])
def test_an_exhausted_data_set_is_explained(ahead: int) -> None:
    stream = BatchStream(Numbers(5), 2, 0, 1, ahead=ahead)
    next(stream), next(stream)
    with pytest.raises(UserError, match="it holds 5 samples and sample 5 is wanted"):
        next(stream)


class Read(Numbers):
    """Notes what is read, and cannot read some."""

    def __init__(self, length: int, broken: int = -1) -> None:
        super().__init__(length)
        self.seen: list[int] = []
        self.broken = broken

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        if index == self.broken:
            raise UserError(f"sample {index} is damaged")
        return super().__getitem__(index)


def test_so_many_micro_batches_are_read_ahead_and_no_more() -> None:
    data = Read(100)
    stream = BatchStream(data, 2, 0, 1, ahead=3)
    assert data.seen == []  # nothing before it is asked for
    next(stream)
    wait_until(lambda: len(data.seen) >= 8)
    next(stream)
    wait_until(lambda: len(data.seen) >= 10)
    assert data.seen == list(range(10))


def test_a_damaged_sample_is_told_with_its_own_micro_batch() -> None:
    stream = BatchStream(Read(100, broken=5), 2, 0, 1, ahead=8)
    next(stream), next(stream)
    with pytest.raises(UserError, match="^sample 5 is damaged$"):
        next(stream)


def test_reading_takes_nothing_from_the_training_and_ends_with_the_stream() -> None:
    before, others = torch.get_rng_state(), set(threading.enumerate())
    stream = BatchStream(Numbers(100), 2, 0, 1, ahead=2)
    next(stream)
    (reader,) = set(threading.enumerate()) - others
    del stream
    gc.collect()
    wait_until(lambda: not reader.is_alive())
    assert torch.equal(before, torch.get_rng_state())


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
