"""Preprocessing writes what the tokenizer says, whatever the number of processes, and never half of it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece

from megatron_prune.commands import preprocess_data
from megatron_prune.data.indexed import inspect
from megatron_prune.data.leftovers import claim
from megatron_prune.data.preprocess import EncodingProgress, Options, preprocess
from megatron_prune.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def stored_documents(prefix: str) -> list[list[int]]:
    """The ids of every document, as megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [list(map(int, dataset[i])) for i in range(len(dataset))]


def files_of(prefix: str) -> list[bytes]:
    return [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_ids_are_sentencepiece_s_document_by_document(
    text_file: Path, documents: list[str], sp_model: Path, tmp_path: Path
) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    expected = [library.encode(document) for document in documents]
    summary = preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model)))
    assert stored_documents(str(tmp_path / "p")) == expected
    facts = summary.metadata
    assert (facts.documents, facts.tokens) == (len(documents), sum(map(len, expected)))
    assert facts.max_token_id == max(max(ids) for ids in expected)
    assert facts.text_bytes == sum(len(document.encode()) for document in documents)
    assert summary.bin_bytes == 2 * facts.tokens
    assert inspect(str(tmp_path / "p")).metadata == facts


def test_real_text_round_trips(tinystories: Path, stories260k: Path, tmp_path: Path) -> None:
    model = stories260k / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    preprocess([str(tinystories)], str(tmp_path / "p"), Options(str(stories260k), prepend_bos=True))
    paragraphs = [part.strip() for part in tinystories.read_text(encoding="utf-8").split("\n\n")]
    stored = stored_documents(str(tmp_path / "p"))
    # Lines that hold spaces only end a document too, so that the file's few of them give further documents.
    assert len(stored) >= len(paragraphs)
    assert all(ids[0] == library.bos_id() for ids in stored)
    together = " ".join(library.decode(ids) for ids in stored)
    assert together.split() == " ".join(paragraphs).split()


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [({"append_eod": True}, [], [2]), ({"prepend_bos": True}, [1], [])],
)
def test_bos_and_eod_frame_every_document(
    sp_model: Path, tmp_path: Path, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("the cat\n\none two")
    preprocess([str(source)], str(tmp_path / "p"), Options(str(sp_model), **flags))
    library = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    assert stored_documents(str(tmp_path / "p")) == [
        before + library.encode(text) + after for text in ("the cat", "one two")
    ]


@pytest.mark.timeout(300)
def test_the_number_of_processes_does_not_show(
    text_file: Path, documents: list[str], sp_model: Path, hf_folder: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "more.jsonl.gz"
    lines = [json.dumps({"text": document * 400}) for document in documents]  # many chunks
    packed.write_bytes(gzip.compress("\n".join(lines[:30]).encode()))
    inputs = [str(text_file), str(packed)]
    for tokenizer in (sp_model, hf_folder):
        results = []
        for workers in (1, 3):
            prefix = str(tmp_path / f"{tokenizer.name}_{workers}")
            preprocess(inputs, prefix, Options(str(tokenizer), append_eod=True, workers=workers))
            results.append(files_of(prefix))
        assert results[0] == results[1]


def test_a_worker_s_mistake_reaches_the_user(sp_model: Path, text_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2"):
        preprocess([str(text_file), str(broken)], str(tmp_path / "p"), Options(str(sp_model), workers=2))
    assert list(tmp_path.glob("p*")) == []


def test_gzipped_input_gives_the_same_data(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    preprocess([str(text_file)], str(tmp_path / "plain"), Options(str(sp_model)))
    preprocess([str(packed)], str(tmp_path / "packed"), Options(str(sp_model)))
    assert files_of(str(tmp_path / "plain"))[:2] == files_of(str(tmp_path / "packed"))[:2]


def test_ids_beyond_16_bits_are_stored_whole(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers

    for size, dtype in ((65536, "uint16"), (65537, "int32")):
        words = {"<end>": 0, **{f"w{i}": i for i in range(1, size)}}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<end>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        folder = tmp_path / dtype
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
        (folder / "a.txt").write_text(f"w1 w{size - 1} w2")
        summary = preprocess([str(folder / "a.txt")], str(folder / "p"), Options(str(folder)))
        assert stored_documents(str(folder / "p")) == [[1, size - 1, 2]]
        assert summary.metadata.dtype == dtype
        assert inspect(str(folder / "p")).dtype == np.dtype(dtype)


def test_empty_documents_are_left_out_and_counted(sp_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\n{"text": "one"}\n{"text": ""}\n')
    facts = preprocess([str(source)], str(tmp_path / "p"), Options(str(sp_model), append_eod=True)).metadata
    assert (facts.documents, facts.empty_documents) == (1, 2)


def test_progress_ends_at_the_whole(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    seen: list[EncodingProgress] = []
    summary = preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model)), seen.append)
    assert seen[-1].disk_bytes == seen[-1].total_bytes == text_file.stat().st_size
    assert (seen[-1].documents, seen[-1].tokens) == (summary.metadata.documents, summary.metadata.tokens)


# What must not happen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("boom")])
def test_nothing_is_left_of_an_interrupted_run(
    text_file: Path, sp_model: Path, tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    def fail(_progress: EncodingProgress) -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, UserError, RuntimeError)):
        preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model)), fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_one(
    text_file: Path, sp_model: Path, tmp_path: Path, make_data: Callable[..., str]
) -> None:
    left = [tmp_path / f"p{suffix}.tmp4711" for suffix in (".bin", ".idx", ".json")]
    orphan, just_made = tmp_path / "p.idx.tmp4712", tmp_path / "p.json.tmp4713"
    others = [tmp_path / "p.bin.tmpl", tmp_path / "p2.bin.tmp4711", just_made]
    for path in (*left, orphan, *others):
        path.write_text("")
    os.utime(orphan, (0, 0))
    with claim(tmp_path / "p.bin.tmp4714"):  # of a run that goes on
        preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model)))
        expected = {*others, tmp_path / "p.bin.tmp4714", *(tmp_path / f"p{end}" for end in (".bin", ".idx", ".json"))}
        assert set(tmp_path.iterdir()) == expected


def test_two_at_one_prefix_are_refused_in_one_line(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    def again(_progress: EncodingProgress) -> None:
        with pytest.raises(UserError, match=rf"is being written by pid {os.getpid()} on .*; wait for it"):
            preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model), overwrite=True))

    preprocess([str(text_file)], str(tmp_path / "p"), Options(str(sp_model)), again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx", "p.json"]


@contextlib.contextmanager
def started(text_file: Path, sp_model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """A preprocessing of its own process that takes long, and its two workers, once they are there."""
    source = tmp_path / "a.txt"
    source.write_text(text_file.read_text() * 200)
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--workers", "2"]
    command += ["--input", str(source)]
    command += ["--output-prefix", str(tmp_path / "out" / "p"), "--tokenizer-model", str(sp_model)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as job:
        try:
            workers = list[Any]()
            while len(workers) < 2:
                time.sleep(0.01)
                children = psutil.Process(job.pid).children()
                workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            yield job, workers
        finally:
            job.kill()  # one that hangs must not hold up the rest


def test_a_worker_that_is_killed_is_one_line(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    with started(text_file, sp_model, tmp_path) as (job, workers):
        workers[0].kill()
        _, told = job.communicate(timeout=90)
    assert job.returncode == 2
    lines = [line for line in told.splitlines() if not line.endswith(("read as text", "tokens/s"))]
    assert len(lines) == 1 and "--workers 2: a process was killed or ran out of memory" in lines[0], told
    assert not (tmp_path / "out").exists()


def test_workers_do_not_outlive_a_killed_run(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    with started(text_file, sp_model, tmp_path) as (job, workers):
        job.kill()
        job.wait(30)
        _, alive = psutil.wait_procs(workers, timeout=20)
        for worker in alive:
            worker.kill()
    assert not alive


@pytest.mark.parametrize(("workers", "inputs"), [(1, "--input <(zcat a.gz)"), (2, "--input /dev/stdin < <(zcat a.gz)")])
def test_pipes_and_standard_input_give_the_same_data(
    text_file: Path, sp_model: Path, tmp_path: Path, workers: int, inputs: str
) -> None:
    preprocess([str(text_file)], str(tmp_path / "plain"), Options(str(sp_model)))
    tool = f"{sys.executable} {REPOSITORY}/tools/preprocess_data.py --tokenizer-model {sp_model} --workers {workers}"
    (tmp_path / "a.gz").write_bytes(gzip.compress(text_file.read_bytes()))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", "-c", f"{tool} --output-prefix {tmp_path}/p {inputs}"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert files_of(str(tmp_path / "p"))[:2] == files_of(str(tmp_path / "plain"))[:2]
    assert "read as text" in result.stderr


def words(source: Path, prefix: Path, sp_model: Path) -> list[str]:
    return ["--input", str(source), "--output-prefix", str(prefix), "--tokenizer-model", str(sp_model)]


def test_strange_names_are_names(sp_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "a b",
        "-p",
        "*",
        "[x]",
        "q'; touch X; '",
        "$(touch X)",
        "a\nb",
        "\x1b[2J",
        "\udcff",
        "東京",
        "x" * 240,
    ):
        source = tmp_path / f"{name}.txt"
        source.write_text("the cat")
        arguments = words(source, tmp_path / name, sp_model)
        assert preprocess_data.main(arguments) == 0
        assert stored_documents(str(tmp_path / name)) and inspect(str(tmp_path / name)).metadata
        assert preprocess_data.main(arguments) == 2, "it is there"
        out, err = capsys.readouterr()
        assert out.count("\n") == err.count("\n") == 1 and (out + err).replace("\n", "").isprintable()
    assert not (tmp_path / "X").exists() and not Path("X").exists()
    for name in ("x" * 300, "a\0b"):
        arguments = words(source, tmp_path / name, sp_model)
        assert preprocess_data.main(arguments) == 2
        with pytest.raises(UserError, match="does not exist"):
            inspect(str(tmp_path / name))


def test_an_output_is_replaced_only_when_asked(make_data: Callable[..., str], sp_model: Path) -> None:
    prefix = make_data("p")
    before = files_of(prefix)
    options = Options(str(sp_model))
    with pytest.raises(UserError, match=r"--output-prefix .*p\.bin exists; .* --overwrite"):
        preprocess([prefix + ".txt"], prefix, options)
    assert files_of(prefix) == before
    broken = Path(prefix + "_broken.jsonl")
    broken.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        preprocess([str(broken)], prefix, Options(str(sp_model), overwrite=True))
    assert files_of(prefix) == before
    preprocess([prefix + ".txt"], prefix, Options(str(sp_model), overwrite=True))
    assert files_of(prefix) != before


def test_an_input_is_never_overwritten(sp_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "corpus.json"
    source.write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"corpus\.json is an input file"):
        preprocess([str(source)], str(tmp_path / "corpus"), Options(str(sp_model), overwrite=True))
    other = tmp_path / "other.txt"
    other.write_text("one")
    with pytest.raises(UserError, match=r"corpus\.json is no data set's"):
        preprocess([str(other)], str(tmp_path / "corpus"), Options(str(sp_model), overwrite=True))
    assert source.read_text() == '{"text": "one"}\n'


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_input_without_text_is_refused(sp_model: Path, tmp_path: Path, content: str) -> None:
    source = tmp_path / "a.txt"
    source.write_text(content)
    with pytest.raises(UserError, match=r"--input: no text in .*a\.txt"):
        preprocess([str(source)], str(tmp_path / "p"), Options(str(sp_model)))
    assert list(tmp_path.iterdir()) == [source]


def test_wrong_options_are_named(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    from .conftest import train_sentencepiece

    inputs = [str(text_file)]
    (tmp_path / "file").write_text("")
    for prefix, message in (
        (str(tmp_path), "is a folder; add a name"),
        (str(tmp_path / "p.bin"), r"give it without \.bin"),
        (str(tmp_path / "file" / "p"), "its folder cannot be made: "),
    ):
        with pytest.raises(UserError, match=f"--output-prefix .*{message}"):
            preprocess(inputs, prefix, Options(str(sp_model)))
    with pytest.raises(UserError, match="--workers: expected at least 1, got 0"):
        preprocess(inputs, str(tmp_path / "p"), Options(str(sp_model), workers=0))
    without_bos = train_sentencepiece(text_file, tmp_path / "no_bos", bos_id=-1)
    with pytest.raises(UserError, match="--prepend-bos: the tokenizer .* has no begin-of-sequence id"):
        preprocess(inputs, str(tmp_path / "p"), Options(str(without_bos), prepend_bos=True))


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(
    text_file: Path, sp_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_data, "SECONDS_BETWEEN_LINES", 0.0)
    prefix = str(tmp_path / "deep" / "p")
    command = ["--input", str(text_file), "--output-prefix", prefix, "--tokenizer-model", str(sp_model)]
    assert preprocess_data.main([*command, "--append-eod", "--document-separator", "file"]) == 0
    out, err = capsys.readouterr()
    assert "1 documents" in out and f"{inspect(prefix).tokens:,} tokens" in out and "tokens/s" in out
    assert "100% of the input" in err
    assert preprocess_data.main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--input", "nowhere.txt"]
    command += ["--output-prefix", str(tmp_path / "p"), "--tokenizer-model", "nothing"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: --input: nowhere.txt cannot be read: No such file or directory"]
    assert list(tmp_path.iterdir()) == []
