"""Files become documents, and every mistake in them is reported with file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.data.documents import check_inputs, read_documents
from megatron_prune.errors import UserError

from .conftest import mutated

TEXT = "\n  one\ntwo  \n\n \t\nthree\n\n\nfour \n"


def texts(*paths: Path, **options: str) -> list[str]:
    return [document.text for document in read_documents([str(path) for path in paths], **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("blank-line", ["  one\ntwo", "three", "four"]),
        ("line", ["  one", "two", "three", "four"]),
        ("file", ["  one\ntwo  \n\n \t\nthree\n\n\nfour"]),
    ],
)
def test_separators_cut_text(tmp_path: Path, separator: str, expected: list[str]) -> None:
    assert texts(write(tmp_path / "a.txt", TEXT), separator=separator) == expected


def test_documents_know_their_line_and_how_much_was_read(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.jsonl", '\n{"text": "five"}\n')
    found = list(read_documents([str(first), str(second)]))
    assert [(Path(document.path).name, document.line) for document in found] == [
        ("a.txt", 2),
        ("a.txt", 6),
        ("a.txt", 9),
        ("b.jsonl", 2),
    ]
    sizes = [document.disk_bytes for document in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] == check_inputs([str(first), str(second)])


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert texts(windows) == texts(write(tmp_path / "u.txt", TEXT))


def test_json_strings_are_taken_as_they_are(tmp_path: Path) -> None:
    lines = [" a\n\nb ", "", "\u6771\U0001f642"]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": line, "n": 1}) for line in lines))
    assert texts(path, json_key="body") == lines


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_gzip_is_seen_from_the_content(tmp_path: Path, name: str) -> None:
    content = json.dumps({"text": "one"}) if name.endswith("jsonl") else TEXT
    plain = write(tmp_path / name, content)
    packed = write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
    assert texts(packed) == texts(plain)
    misnamed = write(tmp_path / f"other_{name}", gzip.compress(content.encode()))
    assert texts(misnamed) == texts(plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl:2: is no JSON"),
        ('{"text": "a", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", r"a\.jsonl:1: is nested too deeply"),
        ('{"text": "a"}\n' + "[" * 100_000, r"a\.jsonl:2: is nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", r"a\.jsonl:1: is no JSON that can be read"),
        ('\n["a"]\n', r"a\.jsonl:2: expected a JSON object on every line, got list"),
        ('{"body": "a", "id": 1}', r'a\.jsonl:1: has no key "text" \(keys: body, id\); choose one with --json-key'),
        ('{"text": 3}', r'a\.jsonl:1: "text" holds no string but int'),
        ('{"text": "\\ud83d"}', r"a\.jsonl:1: holds half of a surrogate pair"),
        (b'{"text": "a"}\n\xff\xfe', r"a\.jsonl:2: is no UTF-8 text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("name", ["c4.JSONL", "c4.Json.GZ", "part-00000", "c4.txt", "c4.jsonl.txt"])
@pytest.mark.parametrize("before", ["", "\ufeff\n \n"])
def test_json_lines_are_seen_whatever_their_name(
    tmp_path: Path, name: str, before: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    content = before + json.dumps({"id": 1, "text": "one {"}) + "\n" + json.dumps({"text": "two"})
    path = write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("GZ") else content)
    assert texts(path) == ["one {", "two"]
    assert f"{path}: read as JSON lines, by its " in caplog.text
    assert texts(path, input_format="text")[0].startswith('{"id"')


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '[\n  {\n    "text": "a"\n  }\n]',
        '{\n  "text": "a"\n}',
        '{"text": "a",\n "id": 1}',
        "{'text': 'a'}\n{'text': 'b'}\n",
        '{"text": "a"}{"text": "b"}\n',
    ],
)
def test_json_of_another_layout_is_no_training_text(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "part-00000", content)
    with pytest.raises(UserError, match=r"part-00000: begins like JSON, but .* --input-format text"):
        texts(path)
    assert texts(path, input_format="text", separator="file") == [content.rstrip()]


@pytest.mark.parametrize("content", ["{braces} of prose", "[1] a note", "{ x: 1 }", '"quoted": yes', "[Verse]\n{la}"])
def test_prose_that_begins_with_a_bracket_is_text(tmp_path: Path, content: str) -> None:
    assert texts(write(tmp_path / "part-00000", content)) == [content]


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress])
@pytest.mark.parametrize("name", ["a.txt", "a.JSONL.bz2", "part-1"])
def test_packed_files_are_seen_from_their_content(tmp_path: Path, pack: Callable[[bytes], bytes], name: str) -> None:
    content = json.dumps({"text": "one\n\ntwo"}).encode()
    assert texts(write(tmp_path / name, pack(content))) == ["one\n\ntwo"]
    with pytest.raises(UserError, match=f"{name}: the (gzip|bzip2|xz) file is damaged or cut short"):
        texts(write(tmp_path / name, pack(content * 100)[:-20]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x28\xb5\x2f\xfd" + b"a" * 50, r"packed with zstd: give a pipe, <\(zstd -dc FILE\)"),
        (b"PAR1" + b"a" * 50, "a parquet file"),
        (b"PK\x03\x04" + b"a" * 50, "a zip archive"),
        (b"name" + b"\0" * 253 + b"ustar" + b"\0" * 500, "a tar archive"),
        (gzip.compress(b"name" + b"\0" * 253 + b"ustar" + b"\0" * 500, mtime=0), "a tar archive"),
        ("words".encode("utf-16-le"), "holds NUL bytes"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(UserError, match=rf"a\.txt: (is )?{words}"):
        texts(write(tmp_path / "a.txt", content))


def test_pipes_are_read_once_and_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "word " * 5000 + str(i)}) for i in range(100)]  # more than a pipe holds
    for content in ("\n".join(lines).encode(), gzip.compress("\n".join(lines).encode())):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert check_inputs([str(pipe)]) == 0, "nobody knows how much will come"
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert texts(pipe) == [json.loads(line)["text"] for line in lines]
        writer.join()
        pipe.unlink()


@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_is_read_or_refused_in_one_line(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    random, path = Random(seed), tmp_path_factory.getbasetemp() / "mutated"
    for _ in range(8):
        content = "\n".join(json.dumps({"text": "one\ttwo \u6771", "n": i}) for i in range(4)).encode()
        pack = random.choice((bytes, gzip.compress, bz2.compress, lzma.compress))
        content = pack(mutated(content, random)) if random.random() < 0.5 else mutated(pack(content), random)
        try:
            found = texts(write(path, content))
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert all(isinstance(text, str) and text.encode() is not None for text in found)


def test_damaged_gzip_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode() * 100)
    with pytest.raises(UserError, match=r"cut\.gz: the gzip file is damaged or cut short"):
        texts(write(tmp_path / "cut.gz", whole[: len(whole) // 2]))
    with pytest.raises(UserError, match=r"bad\.gz: the gzip file is damaged or cut short"):
        texts(write(tmp_path / "bad.gz", whole[:20] + b"\xff" * 20 + whole[40:]))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input: .*nowhere\.txt cannot be read: No such file"):
        check_inputs([str(tmp_path / "nowhere.txt")])
    with pytest.raises(UserError, match=r"--input: .* is a folder"):
        check_inputs([str(tmp_path)])
    with pytest.raises(UserError, match="--input: no file"):
        check_inputs([])
    with pytest.raises(UserError, match='--document-separator: "page" is unknown'):
        texts(write(tmp_path / "a.txt", TEXT), separator="page")
