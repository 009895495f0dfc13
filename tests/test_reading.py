"""Files are opened without waiting, and what stands in their place is called by its kind."""

import errno
import os
import socket
import threading
import time

import pytest

from megatron_prune import reading
from megatron_prune.reading import is_there, open_file, open_stream, read_content, read_words


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes("é\r\n".encode())
    with open_file(tmp_path / "a") as file:
        assert file.read() == "é\r\n".encode()
    assert read_words(str(tmp_path / "a")) == "é\r\n" and is_there(tmp_path / "a")
    assert read_content(tmp_path / "a", largest=4) and not is_there(tmp_path / "b")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


KINDS = {
    "pipe": (os.mkfifo, "is a pipe"),
    "folder": (os.mkdir, "is a folder"),
    "device": (lambda path: os.symlink("/dev/zero", path), "is a device"),
    "socket": (make_socket, "is a socket"),
    "nowhere": (lambda path: os.symlink("absent", path), "link to a file that is not there"),
    "loop": (lambda path: os.symlink(path, path), "symbolic links"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_called_by_its_kind(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = KINDS[kind]
    make(str(tmp_path / "a"))
    for read in (open_file, read_content, is_there):
        with pytest.raises(OSError) as raised:
            read(tmp_path / "a")
        assert raised.value.filename == str(tmp_path / "a")
        assert words in raised.value.strerror or (kind, raised.value.errno) == ("nowhere", errno.ENOENT)


def test_more_than_any_of_its_kind_holds_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(OSError, match="is larger than"):
        read_content(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"12345")
    with pytest.raises(OSError, match="is larger than 4 bytes"):
        read_content(tmp_path / "b", largest=4)


@pytest.mark.timeout(30)
def test_a_pipe_is_read_while_somebody_writes_it_and_refused_where_nobody_does(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SECONDS_WITHOUT_WRITER", 0.5)
    os.mkfifo(tmp_path / "a")
    begin = time.monotonic()
    with pytest.raises(OSError, match="nobody writes into"):
        open_stream(tmp_path / "a")
    assert time.monotonic() - begin < 5

    def write():
        with open(tmp_path / "a", "wb") as pipe:
            time.sleep(1.0)  # longer than a writer is waited for: it has begun
            pipe.write(b"late")

    writer = threading.Thread(target=write)
    writer.start()
    with open_stream(tmp_path / "a") as pipe:
        assert pipe.read() == b"late"
    writer.join()
    reader, end = os.pipe()
    os.write(end, b"anonymous")
    os.close(end)
    with open_stream(f"/dev/fd/{reader}") as pipe:
        assert pipe.read() == b"anonymous"
    os.close(reader)
