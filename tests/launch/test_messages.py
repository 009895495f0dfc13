"""What a machine refuses is one line; leftovers go; what a checkpoint's small files say is checked under -O too."""

import errno
import itertools
import json
import os
import subprocess
import sys

import pytest

from megatron_prune.config import load_config
from megatron_prune.data.leftovers import claim_folder, staging
from megatron_prune.errors import UserError
from megatron_prune.launch.assembly.alike import insist_shared
from megatron_prune.launch.assembly.outputs import check_places
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.failures import exit_status, lost_contact, mishap
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.helpers.ranks import RankError, run_ranks


def share(_rank, _world_size, save):
    mesh = init_mesh(choose_device("cpu"), 1, 1)
    try:
        insist_shared(mesh, save)
    finally:
        close_mesh()


def test_a_checkpoint_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = r"checkpoint\.save \(--save\): .* cannot be written: .*; give another folder"
    with pytest.raises(RankError, match=told):
        run_ranks(share, 1, str(tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("flag", ["--tensorboard-dir", "--data-cache-path"])
def test_a_folder_that_cannot_be_made_names_its_field(flag, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere", "/dev/full/x"):
        config = load_config(["--hf-model", "m", "--data-path", "d", flag, str(place)])
        with pytest.raises(UserError, match=rf"\({flag}\): .* cannot be written: .*; give another folder"):
            check_places(config)
    assert (tmp_path / "file").read_text() == "in the way"
    check_places(load_config(["--hf-model", "m", "--data-path", "d", flag, str(tmp_path / "new")]))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE])
def test_what_the_machine_refuses_is_one_line(code, capfd):
    def job():
        raise OSError(code, os.strerror(code), "/some/file\n")

    assert exit_status(job) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: rank 0: ") and err.count("\n") == 1 and "Traceback" not in err
    assert ("ulimit -n" if code == errno.EMFILE else os.strerror(code)) in err


def test_few_file_descriptors_are_no_lost_rank():
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:1] socket: Too many open files")
    assert lost_contact(error) is None and "ulimit -n" in str(mishap(error))


def test_what_killed_exports_left_is_removed(tmp_path):
    killed = "import os, pathlib, sys\nfrom megatron_prune.data.leftovers import claim_folder, staging\n"
    killed += "place = staging(pathlib.Path(sys.argv[1]))\n"
    killed += "with claim_folder(place):\n    (place / 'weights').write_text('half')\n    os._exit(9)"
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "model")], check=False)
    assert len(list(tmp_path.glob(".model.*.partial/weights"))) == 1
    (tmp_path / ".model.12.partial").write_text("half a file")
    (tmp_path / ".model.mine.partial").write_text("of the user")
    (tmp_path / ".other.12.partial").write_text("of another target")
    with claim_folder(tmp_path / ".model.34.partial"):  # somebody else's, who still writes it
        assert not staging(tmp_path / "model").exists()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {".model.mine.partial", ".other.12.partial", ".model.34.partial"}
    assert not (tmp_path / ".model.34.partial").exists()


def test_small_files_of_a_checkpoint_are_checked_without_assertions():
    program = """
import json
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout
from megatron_prune.testing.helpers.tiny_models import tiny_config
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.testing.helpers.sharded import rounded
assert False, "-O leaves this out"
full = Architecture.full(shape_from_config(tiny_config()))
broken = json.loads(json.dumps(full.to_json()))
broken["live"]["ffn"][0] = "0-3"
state = ShardLayout.pack(full, 1, rounded(head=1, ffn=1, stem=1, vocab=128)).to_state()
wrong = json.loads(json.dumps(state))
stem = wrong["slots"]["stem"][0][0]
stem[0], stem[1] = stem[1], stem[0]
for read in (lambda: Architecture.from_json(broken), lambda: ShardLayout.from_state(full, wrong),
             lambda: ShardLayout.from_state(full, {**state, "slots": {**state["slots"], "head": 3}})):
    try:
        read()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "contradicts the live units" in lines[0] and "slots of stem" in lines[1]


def test_half_a_copy_and_another_name_are_told(tmp_path):
    from megatron_prune.checkpoint.files import Digest, digest, resolve, write_manifest

    good = tmp_path / "iter_0000002"
    good.mkdir()
    (good / "architecture.json").write_text("{}")
    write_manifest(good, {"architecture.json": Digest(2, digest(good / "architecture.json").crc32)})
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "iter_0000004" / ".metadata").write_bytes(b"half")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4\n")
    with pytest.raises(UserError, match=r"half a checkpoint.*newest good checkpoint is of iteration 2"):
        resolve(tmp_path)


def test_a_resumed_run_has_one_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_prune.training.sinks import Sinks

    config = load_config(["--hf-model", "m", "--data-path", "d"])
    for start, end in ((0, 6), (4, 8)):
        sinks = Sinks(config, tmp_path, start)
        for iteration in range(start + 1, end + 1):
            sinks.record({"loss": 1.0 / iteration}, iteration)
        sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


@pytest.mark.parametrize("first", [1, 3])
def test_gradients_that_overflow_in_the_last_steps_end_no_run_well(first, tmp_path, monkeypatch, capfd):
    """The last two of three steps, which is below `max_nonfinite_steps`; and all good but the last."""
    from megatron_prune.pretrain import main
    from megatron_prune.testing.helpers.tiny_runs import prepare
    from megatron_prune.training import trainer

    forward, steps = trainer.forward_backward, itertools.count()

    def overflowing(*args):
        result, parameter = forward(*args), next(p for p in args[0].module.parameters() if p.requires_grad)
        if next(steps) >= first:
            (parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad).fill_(float("inf"))
        return result

    monkeypatch.setattr(trainer, "forward_backward", overflowing)
    more = ("--train-iters", 4 if first == 3 else 3, "--lr-warmup-iters", 0, "--continue-tokens", 0)
    words = prepare(tmp_path).arguments(tmp_path / "run", *more, "--prune-target-params", "null")
    assert main(words) == 2
    err = capfd.readouterr().err
    skipped = 1 if first == 3 else 2
    assert f"with its last {skipped} steps skipped, since they were not finite" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["status"] == "stopped"
