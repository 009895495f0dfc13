"""A stranger's checkpoint runs no code: each file that is a pickle, through each tool that reads it.

The payload makes a folder; where it is refused there is none, one line that names the pickle and what it asked for,
and status 2. Checksums are those of the hostile files, as their author would have written them.
"""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_prune.checkpoint.files import MANIFEST, digest, latest_number, resolve, write_manifest
from megatron_prune.checkpoint.guarded_reader import GuardedReader, read_metadata
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.commands import inspect_checkpoint
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import table_of
from megatron_prune.runtime.folders import replace_file
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.checkpoint.small_run import SHAPE, Kind, build, mesh_of
from tests.commands import run, torchrun
from tests.strange import ANYTHING, is_read_or_refused, mutated, places

ITERATION = "iter_0000003"
EMBEDDING = "model/model.embed_tokens.weight"


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def sign(folder):
    """Checksums of what is there now."""
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    write_manifest(folder, {name: digest(folder / name) for name in names})


def metadata_of(folder):
    with (folder / ".metadata").open("rb") as file:
        return pickle.load(file)


def write_metadata(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def trap_in_metadata(folder, mark):
    """As genuine as it can be: all that torch reads is there, and the code runs on the way."""
    metadata = metadata_of(folder)
    metadata.planner_data = Trap(mark)
    write_metadata(folder, metadata)


def trap_in_common(folder, mark):
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save({**common, "more": Trap(mark)}, folder / "common.pt")


def place_of(metadata):
    return metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == EMBEDDING)]


def write_object(folder, place, thing):
    """`thing` in a shard file of its own, where the embedding is said to lie."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    (folder / "__9_0.distcp").write_bytes(buffer.getvalue())
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(buffer.getvalue())


def trap_as_tensor(folder, mark):
    metadata = metadata_of(folder)
    write_object(folder, place_of(metadata), Trap(mark))
    write_metadata(folder, metadata)


def trap_as_object(folder, mark):
    """The weight is said to be an object, which torch's planner would unpickle."""
    metadata = metadata_of(folder)
    place = place_of(metadata)
    write_object(folder, place, Trap(mark))
    metadata.state_dict_metadata[EMBEDDING] = BytesStorageMetadata()
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != EMBEDDING}
    metadata.storage_data[MetadataIndex(EMBEDDING)] = place
    write_metadata(folder, metadata)


TRAPS = {
    trap_in_metadata: (".metadata: asks for posix.mkdir",),
    trap_in_common: ("common.pt: asks for posix.mkdir",),
    trap_as_tensor: ("__9_0.distcp: asks for posix.mkdir",),
    trap_as_object: ("holds no tensor", EMBEDDING),
}


def save(rank, world, folder):
    from megatron_prune.checkpoint.save import save_weights

    architecture = Architecture.full(SHAPE)
    shapes = table_of(SHAPE).hf_shapes(architecture)
    save_weights(mesh_of(Kind()), folder, 3, architecture, lambda name: torch.ones(shapes[name]), torch.float32, {})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "good"
    run_ranks(save, 1, str(path))
    return path


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
@pytest.mark.parametrize("tool", ["inspect_checkpoint", "convert_to_hf"])
def test_tools_run_nothing_of_a_checkpoint(tool, trap, folder, tmp_path, capsys):
    from megatron_prune.commands import convert_to_hf, inspect_checkpoint

    mark = tmp_path / "ran"
    trap(folder / ITERATION, mark)
    sign(folder / ITERATION)
    if tool == "inspect_checkpoint":
        status = inspect_checkpoint.main(["--load", str(folder), "--verify"])
    else:
        status = convert_to_hf.main(["--load", str(folder), "--save", str(tmp_path / "hf"), "--no-tokenizer"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert all(words in error for words in TRAPS[trap])
    assert not mark.exists()
    assert not (tmp_path / "hf").exists()


def test_the_payload_does_what_it_says(folder, tmp_path):
    trap_in_metadata(folder / ITERATION, tmp_path / "ran")
    metadata_of(folder / ITERATION)
    assert (tmp_path / "ran").exists()


# Files that are larger than they look ---------------------------------------------------------------------------------


def packed(content):
    """The same archive, its parts compressed and followed by a gigabyte of nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as plain, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name) + bytes(64 << 20 if name.endswith("/data/0") else 0))
    return out.getvalue()


def bomb_in_common(folder):
    torch.save({**torch.load(folder / "common.pt", weights_only=True), "more": torch.ones(9)}, folder / "common.pt")
    (folder / "common.pt").write_bytes(packed((folder / "common.pt").read_bytes()))


def endless_array_in_common(folder):
    common = torch.load(folder / "common.pt", weights_only=True)
    torch.save({**common, "more": {"__ndarray__": torch.ones(1).expand(1 << 45)}}, folder / "common.pt")


def bomb_as_tensor(folder):
    metadata = metadata_of(folder)
    place = place_of(metadata)
    write_object(folder, place, torch.ones(metadata.state_dict_metadata[EMBEDDING].size))
    content = packed((folder / "__9_0.distcp").read_bytes())
    (folder / "__9_0.distcp").write_bytes(content)
    place.length = len(content)
    write_metadata(folder, metadata)


def packed_by_extension(folder):
    """As torch writes it with an extension, whose reader unpacks whatever comes."""
    metadata = metadata_of(folder)
    place_of(metadata).transform_descriptors = ["stream.zstd"]
    write_metadata(folder, metadata)


BOMBS = {
    bomb_in_common: "common.pt: damaged or of another kind (its parts are packed",
    endless_array_in_common: "common.pt: holds what is never stored",
    bomb_as_tensor: "__9_0.distcp: damaged or of another kind (its parts are packed",
    packed_by_extension: ".metadata: damaged",
}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_nothing_is_unpacked(bomb, folder, capsys):
    from megatron_prune.commands import inspect_checkpoint

    bomb(folder / ITERATION)
    sign(folder / ITERATION)
    assert inspect_checkpoint.main(["--load", str(folder), "--verify"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and BOMBS[bomb] in error, error


def test_links_in_a_strangers_folder_lead_no_write_out_of_it(folder, tmp_path):
    """What a run writes there replaces the link, and what it leads to stays as it is."""
    mine = tmp_path / "mine"
    mine.write_text("dear")
    for name in ("latest_checkpointed_iteration.txt", "run_status.json", "config.yaml"):
        for place in (folder / name, folder / f"{name}.tmp"):
            place.unlink(missing_ok=True)
            place.symlink_to(mine)
        replace_file(folder / name, b"new")
        assert (folder / name).read_text() == "new" and not (folder / name).is_symlink()
    assert mine.read_text() == "dear"


def load_it(rank, world, folder):
    from megatron_prune.checkpoint.load import load_checkpoint
    from megatron_prune.checkpoint.record import RunRecord

    model = build(Kind(tp=2), SHAPE, RunRecord.read(folder))
    try:
        load_checkpoint(model, folder, load_optim=False)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("trap", [trap_in_metadata, trap_as_tensor, trap_as_object], ids=lambda trap: trap.__name__)
def test_loading_on_ranks_is_one_line_on_all(trap, folder, tmp_path):
    mark = tmp_path / "ran"
    trap(folder / ITERATION, mark)
    sign(folder / ITERATION)
    first, second = run_ranks(load_it, 2, str(folder))
    assert first == second and "\n" not in first
    assert all(words in first for words in TRAPS[trap])
    assert not mark.exists()


def test_resuming_runs_nothing(tmp_path):
    run_folder, mark = tmp_path / "run", tmp_path / "ran"
    files = prepare(tmp_path / "files")
    arguments = files.arguments(run_folder, "--exit-interval", 1)
    torchrun(1, *arguments)
    newest = resolve(run_folder)[1]
    trap_in_metadata(newest, mark)
    sign(newest)
    done = run(sys.executable, "-m", "megatron_prune.pretrain", *files.arguments(run_folder), ok=False)
    assert ".metadata: asks for posix.mkdir" in done and "Traceback" not in done
    assert not mark.exists()


@pytest.fixture
def megatron(real_data, tmp_path):
    """A checkpoint that Megatron-LM saved, with object shards and plans in its metadata."""
    return shutil.copytree(real_data / "megatron_0_19" / "tied_gqa", tmp_path / "megatron")


def import_megatron(folder, tmp_path, capsys, *more):
    from megatron_prune.commands import convert_from_megatron

    status = convert_from_megatron.main(["--load", str(folder), "--save", str(tmp_path / "imported"), *more])
    return status, capsys.readouterr().err


FACTS = (
    *("--num-attention-heads", "6", "--num-query-groups", "3", "--kv-channels", "4", "--vocab-size", "61"),
    *("--max-position-embeddings", "64", "--norm-epsilon", "1e-5", "--rotary-base", "5000"),
)


def test_genuine_metadata_of_megatron_is_read(megatron):
    (folder,) = megatron.glob("iter_*")
    assert read_metadata(folder).state_dict_metadata == metadata_of(folder).state_dict_metadata
    assert read_metadata(folder).storage_data == metadata_of(folder).storage_data


@pytest.mark.parametrize("more", [(), FACTS], ids=["asking", "told"])
def test_importing_megatron_runs_nothing(megatron, tmp_path, capsys, more):
    (folder,) = megatron.glob("iter_*")
    mark = tmp_path / "ran"
    trap_in_metadata(folder, mark)
    status, error = import_megatron(megatron, tmp_path, capsys, *more)
    assert (status, error.count("\n")) == (2, 1) and ".metadata: asks for posix.mkdir" in error
    assert not mark.exists() and not (tmp_path / "imported").exists()


def test_arguments_of_megatron_that_are_code_are_refused_unless_flags_say_all(megatron, tmp_path, capsys):
    (folder,) = megatron.glob("iter_*")
    mark = tmp_path / "ran"
    torch.save({"args": Trap(mark)}, folder / "common.pt")
    status, error = import_megatron(megatron, tmp_path, capsys, *FACTS[:-2])
    assert status == 2 and "common.pt: asks for posix.mkdir" in error and "not needed when --rotary-base" in error
    assert not mark.exists()


def test_values_of_megatron_that_are_not_finite_do_not_come_in(megatron, tmp_path, capsys):
    (folder,) = megatron.glob("iter_*")
    key = "decoder.final_layernorm.weight"
    places = metadata_of(folder).storage_data
    (place,) = [place for index, place in places.items() if index.fqn == key]
    file, buffer = folder / place.relative_path, io.BytesIO()
    content = file.read_bytes()
    tensor = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]), weights_only=True)
    tensor[3] = float("nan")
    torch.save(tensor, buffer)
    assert len(buffer.getvalue()) == place.length
    file.write_bytes(content[: place.offset] + buffer.getvalue() + content[place.offset + place.length :])
    status, error = import_megatron(megatron, tmp_path, capsys, *FACTS)
    assert (status, error.count("\n")) == (2, 1) and f"{key}: 1 of " in error and "NaN or infinite" in error
    assert not list((tmp_path / "imported").glob("iter_*"))


@pytest.mark.parametrize("text", ["../../evil", "/tmp/evil", "9" * 5000, "1 2", "", "-1", "１"])
def test_latest_is_a_number_never_a_path(folder, megatron, text):
    from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions

    for parent in (folder, megatron):
        (parent / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(ValueError, match="not an iteration number"):
            latest_number(parent)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt: not an iteration number"):
        resolve(folder)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt: not an iteration number"):
        MegatronCheckpoint(megatron, ShapeOptions())


# What a pickle can ask for in other ways -----------------------------------------------------------------------------


def raw(*lines):
    return b"".join(lines)


PICKLES = {
    "protocol 0": raw(b"cos\nsystem\n(S'touch MARK'\ntR."),
    "INST": raw(b"(S'touch MARK'\nios\nsystem\n."),
    "OBJ": raw(b"(cos\nsystem\nS'touch MARK'\no."),
    "dotted": raw(b"\x80\x04\x8c\x05torch\x8c\x13serialization.load\x93."),
    "through an allowed module": raw(b"\x80\x04\x8c\x05torch\x8c\x04load\x93."),
    "builtins": raw(b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93."),
    "extension": raw(b"\x80\x02\x82\x01."),
    "persistent": raw(b"\x80\x02K\x01Q."),
    "nothing": b"",
    "another thing": pickle.dumps({"a": 1}),
    "huge length": raw(b"\x80\x04\x96", (1 << 60).to_bytes(8, "little")),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_no_spelling_gets_through(kind, folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / ITERATION / ".metadata").write_bytes(PICKLES[kind].replace(b"MARK", os.fsencode(mark)))
    with pytest.raises(UserError) as raised:
        read_metadata(folder / ITERATION)
    assert str(folder / ITERATION / ".metadata") in str(raised.value) and str(raised.value).isprintable()
    assert not mark.exists()


def test_attributes_of_classes_stay(folder):
    """BUILD on a class sets its attributes, for the whole process."""
    where, name = b"torch.distributed.checkpoint.metadata", b"Metadata"
    text = b"\x80\x02c" + where + b"\n" + name + b"\nN}X\x07\x00\x00\x00versionK\x05s\x86b."
    (folder / ITERATION / ".metadata").write_bytes(text)
    with pytest.raises(UserError, match="a change of"):
        read_metadata(folder / ITERATION)
    from torch.distributed.checkpoint.metadata import Metadata

    assert Metadata({}).version is None


def mutate(path=None, size=None, dtype=None, chunk=None):
    def change(metadata):
        entry = metadata.state_dict_metadata[EMBEDDING]
        if path is not None:
            place_of(metadata).relative_path = path
        if size is not None:
            entry.size = size
        if dtype is not None:
            entry.properties.dtype = dtype
        if chunk is not None:
            entry.chunks = chunk

    return change


@pytest.mark.parametrize(
    "change",
    [
        mutate(path="/etc/passwd"),
        mutate(path="../../common.pt"),
        mutate(path=5),
        mutate(size=torch.Size((1 << 40, 1 << 20))),
        mutate(size=("a",)),
        mutate(size=(True, -1)),
        mutate(dtype="float32"),
        mutate(chunk=5),
        mutate(chunk=[(0, 1)]),
        mutate(chunk=[]),
    ],
)
def test_numbers_and_names_are_looked_at(change, folder):
    metadata = metadata_of(folder / ITERATION)
    change(metadata)
    write_metadata(folder / ITERATION, metadata)
    with pytest.raises(UserError) as raised:
        GuardedReader(folder / ITERATION).tensor(EMBEDDING)
    assert str(folder / ITERATION) in str(raised.value) and str(raised.value).isprintable()


# JSON beside the pickles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run_state.json", "architecture.json", "layout.json", "metadata.json", MANIFEST])
@given(data=st.data())
def test_mutated_json_is_read_or_refused_in_one_line(good, tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / f"mutated-{name}" / "run"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    file = folder / ITERATION / name
    content = json.loads(file.read_text())
    where = data.draw(st.sampled_from(list(places(content))))
    file.write_text(json.dumps(mutated(content, where, data.draw(ANYTHING))))
    if name != MANIFEST:
        sign(folder / ITERATION)
    is_read_or_refused(lambda: inspect_checkpoint.describe(CheckpointReader(folder)))
    is_read_or_refused(lambda: CheckpointReader(folder).record.layout(1, {}))
