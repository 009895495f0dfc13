"""examples/prepare_data.sh says what it would do, encodes files that are there, skips what is done."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "prepare_data.sh"


fetch_corpus = load_script(ROOT / "examples" / "fetch_corpus.py")


def run(*words, folder):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["bash", SCRIPT, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_dry_run_names_every_data_set_that_the_recipes_blend(tmp_path):
    code, output = run("--tokenizer-model", "SmolLM-1.7B", "--dry-run", folder=tmp_path)
    recipe = yaml.safe_load((ROOT / "examples/configs/smollm_1.7b_to_469m.yaml").read_text())
    words = recipe["data"]["data_path"].split()
    assert code == 0 and list(tmp_path.iterdir()) == []
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        assert f", {weight} B tokens -> {prefix}\n" in output
        assert f"--output-prefix {prefix} --tokenizer-model SmolLM-1.7B --append-eod" in output


@pytest.mark.timeout(900)
def test_local_files_are_encoded_once(tmp_path, stories260k):
    raw = tmp_path / "texts"
    texts = ["Once upon a time there was a fox.", "", "The end."]
    assert fetch_corpus.write(iter(texts), raw / "open_web_math.jsonl.gz") == 3
    words = ("--tokenizer-model", stories260k / "tokenizer.model", "--raw", raw, "--no-download", "--workers", 1)
    code, output = run(*words, "--corpora", "open_web_math", folder=tmp_path)
    assert code == 0, output
    facts = json.loads((tmp_path / "data" / "open_web_math.json").read_text())
    assert facts["documents"] == 2 and (tmp_path / "data" / "open_web_math.bin").exists()
    code, output = run(*words, "--corpora", "open_web_math", folder=tmp_path)
    assert code == 0 and "is done, skipped" in output
    code, output = run(*words, folder=tmp_path)
    assert code == 2 and "fineweb_edu.jsonl.gz: no such file, and --no-download" in output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--tokenizer-model is not set"),
        (["--tokenizer-model", "nowhere"], "nowhere: no such file"),
        (
            ["--tokenizer-model", "m", "--dry-run", "--corpora", "the_pile"],
            "unknown corpus the_pile; there are fineweb",
        ),
        (["--model", "m"], "unknown option --model"),
    ],
)
def test_mistakes_are_one_line(words, told, tmp_path):
    code, output = run(*words, folder=tmp_path)
    assert code == 2 and told in output and output.count("\n") == 1


def test_only_as_much_is_taken_as_is_wanted():
    records = [{"text": "a" * 60}, {"text": None, "blob_id": "x"}, {"text": "b" * 60}, {"text": "c" * 60}]
    taken = fetch_corpus.take(records, lambda record: record["text"] or "", limit=100)
    assert [text[0] for text in taken] == ["a", "b"]


def test_a_file_appears_when_it_is_complete(tmp_path):
    def breaks():
        yield "first"
        assert not (tmp_path / "c.jsonl.gz").exists()
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        fetch_corpus.write(breaks(), tmp_path / "c.jsonl.gz")
    assert not (tmp_path / "c.jsonl.gz").exists()
    fetch_corpus.write(["first", "second"], tmp_path / "c.jsonl.gz")
    with gzip.open(tmp_path / "c.jsonl.gz", "rt") as file:
        assert [json.loads(line)["text"] for line in file] == ["first", "second"]


def test_records_without_text_are_said(monkeypatch):
    text_of = fetch_corpus.reader("text")
    assert text_of({"text": "here", "blob_id": "x"}) == "here"
    with pytest.raises(KeyError, match="neither text nor blob_id"):
        text_of({"url": "x"})
