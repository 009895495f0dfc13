"""What a folder tells of its run: how far, how long, whether it goes on; older and strange fields; without torch."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.checkpoint import files
from megatron_prune.checkpoint.fields import check_fields
from megatron_prune.checkpoint.plain import pack
from megatron_prune.checkpoint.record import LAYOUT_FIELDS, Facts, Progress, RunRecord, record_files
from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.huggingface.provenance import config_of
from megatron_prune.launch.jobs.stages import LEDGER_FILE, Ledger
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import inverse_frequencies
from megatron_prune.saliency.scores import UnitScores
from megatron_prune.training.state import RunState
from tests.checkpoint.small_run import SHAPE
from tests.strange import ANYTHING, is_read_or_refused, mutated, places

ARCHITECTURE = Architecture.full(SHAPE)
FACTS = Facts("float32", (), 0, 1, 1, 1)


def saved(directory, iteration, state, common=None):
    """A published checkpoint without tensors; `common` in the place of common.pt's content."""
    folder = files.begin(directory, iteration)
    content = record_files(iteration, ShardLayout.pack(ARCHITECTURE, 1, {}), FACTS, state, [])
    if common is not None:
        content["common.pt"] = pack(common)
    files.write_manifest(folder, files.write_files(folder, content))
    return files.publish(folder, directory, iteration)


@pytest.fixture
def config():
    """100 iterations of pruning at most, then 10 more."""
    plain = Config()
    return dataclasses.replace(
        plain,
        training=dataclasses.replace(plain.training, train_iters=100, global_batch_size=4),
        data=dataclasses.replace(plain.data, seq_length=8),
        pruning=dataclasses.replace(plain.pruning, target_params=1000),
        continued=dataclasses.replace(plain.continued, continue_tokens=320),
    )


def test_launchers_read_progress_without_torch_and_numpy(tmp_path):
    saved(tmp_path, 65, RunState(65, phase="continued", phase_start=60).to_state())
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "numpy", "megatron"), None))
from pathlib import Path
import megatron_prune.launch.jobs.job
from megatron_prune.checkpoint.record import Progress
assert Progress.read(Path({str(tmp_path)!r})) == Progress(65, "continued", 60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_is_as_long_as_its_phases(config):
    start, late = Progress(), Progress(100)
    reached, done = Progress(60, "continued", 60), Progress(70, "continued", 60)
    assert [p.end(config) for p in (start, late, reached, done)] == [100, 100, 70, 70]
    assert [p.longest(config) for p in (start, late, reached, done)] == [110, 110, 70, 70]
    assert [p.is_pruned(config) for p in (start, late, reached, done)] == [False, True, True, True]
    assert [p.is_finished(config) for p in (start, late, reached, done)] == [False, True, False, True]
    stops = dataclasses.replace(config, training=dataclasses.replace(config.training, exit_at_target=True))
    assert [p.is_finished(stops) for p in (start, late, reached, done)] == [False, True, True, True]
    assert reached.end(stops) == 60 and reached.longest(stops) == 70, "its data are those of the run that goes on"
    plain = dataclasses.replace(config, pruning=Config().pruning)
    assert start.longest(plain) == start.end(plain) == 100


def test_weights_to_start_from_are_no_run(tmp_path):
    saved(tmp_path / "converted", 0, {"source": {"name": "m"}, "tokenizer_model": "t.model", "history": []})
    record = RunRecord.read(tmp_path / "converted")
    assert not record.is_run and record.history == []
    assert Progress.read(tmp_path / "converted") == Progress(0)
    saved(tmp_path / "run", 3, RunState(3).to_state())
    assert RunRecord.read(tmp_path / "run").is_run


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"phase": "finetuning"}, "phase: expected one of pruning, continued, found 'finetuning'"),
        ({"phase_start": -1}, "phase_start: expected a whole number, found -1"),
        ({"consumed_samples": "many"}, "consumed_samples: expected a whole number, found 'many'"),
        ({"config": {"training": {}}}, "config: expected text"),
        ({"source": [1]}, "source: expected a table"),
        ({"data_shuffle": {"samples": 9}}, "data_shuffle: expected a table with samples, epochs, digest"),
        ({"data_tokenizers": [["sp", "0"]]}, "data_tokenizers: expected lists of three"),
        ({"history": [3]}, "history: expected a list of tables of plain values"),
        ({"stages": {"source": 1.5}}, "stages: expected tables in which"),
    ],
)
def test_a_strange_field_is_one_line_that_names_file_and_field(tmp_path, fields, words):
    path = saved(tmp_path, 5, {}, common={"state": {**RunState(5).to_state(), **fields}, "rng": []})
    with pytest.raises(UserError) as raised:
        RunRecord.read(tmp_path)
    assert str(raised.value).startswith(f"{path / 'common.pt'}: {words}")


def test_what_is_no_record_of_a_run_is_one_line(tmp_path):
    for number, common in enumerate(
        ({"state": {}}, {"state": [], "rng": []}, {"state": {"__ndarray__": 3}, "rng": []})
    ):
        path = saved(tmp_path / str(number), 5, {}, common=common)
        with pytest.raises(UserError, match=f"^{path / 'common.pt'}: "):
            RunRecord.read(tmp_path / str(number))


@pytest.mark.parametrize("text", ["training: [", "\0", "[" * 5000])
def test_a_configuration_that_is_no_yaml_is_one_line(text):
    with pytest.raises(UserError, match="^config of the checkpoint's run: no YAML"):
        config_of({"config": text})


# The run's own state --------------------------------------------------------------------------------------------------


def test_state_comes_back(tmp_path):
    layers, heads = SHAPE.num_layers, SHAPE.num_attention_heads
    vector = np.arange(layers * heads + layers * SHAPE.ffn_hidden_size + SHAPE.hidden_size, dtype=np.float64)
    state = RunState(
        7,
        14,
        448,
        credits=0.5,
        smoothed=UnitScores.from_vector(ARCHITECTURE, vector),
        stages={"source": {"widths": {}}},
    )
    saved(tmp_path, 7, {**state.to_state(), "config": "seed: 1\n"})
    record = RunRecord.read(tmp_path)
    again = RunState.from_state(record.state, record.architecture)
    assert dataclasses.replace(again, smoothed=None) == dataclasses.replace(state, smoothed=None)
    assert all(
        np.array_equal(mine, theirs)
        for kind, sites in state.smoothed.values.items()
        for mine, theirs in zip(again.smoothed.values[kind], sites, strict=True)
    )


def test_other_versions_state_is_read():
    """Fields that were not there yet are those of a new run; fields that are not known are left alone."""
    values = RunState(7, 14, 448, "continued", 5).to_state()
    old = {name: value for name, value in values.items() if name not in ("diagonals", "guard", "nonfinite_in_a_row")}
    assert RunState.from_state(old, ARCHITECTURE) == RunState(7, 14, 448, "continued", 5)
    assert RunState.from_state({"iteration": 7}, ARCHITECTURE) == RunState(7)
    newer = {**values, "temperature": 3, "guard": {**values["guard"], "mood": "calm"}}
    assert RunState.from_state(newer, ARCHITECTURE) == RunState(7, 14, 448, "continued", 5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"iteration": 7.5}, "iteration: expected a whole number, found 7.5"),
        ({"credits": float("nan")}, "credits: expected a number, found nan"),
        ({"skipped_iterations": True}, "skipped_iterations: expected a whole number, found True"),
        ({"guard": [1]}, "guard: expected a table"),
        ({"guard": {"recent": 3}}, "guard: not what a run stores (TypeError"),
        ({"diagonals": {"values": 1}}, "diagonals: not what a run stores (KeyError"),
        ({"smoothed": {"head": [[1.0]]}}, "smoothed: not what a run stores (ValueError"),
        ({"history": [{"iteration": 3}]}, "history:1: not a line of a pruning history (KeyError"),
    ],
)
def test_strange_state_is_one_line_that_names_file_and_field(tmp_path, fields, words):
    with pytest.raises(UserError) as raised:
        RunState.from_state({**RunState(7).to_state(), **fields}, ARCHITECTURE, tmp_path / "common.pt")
    assert str(raised.value).startswith(f"{tmp_path / 'common.pt'}: {words}")


# Files that were changed ----------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_that_was_renamed_to_another_iteration_is_refused(tmp_path):
    saved(tmp_path, 5, RunState(5).to_state())
    (tmp_path / "iter_0000005").rename(tmp_path / "iter_0000007")
    (tmp_path / files.LATEST).write_text("7\n")
    for read in (RunRecord.read, Progress.read):
        with pytest.raises(UserError, match="iter_0000007: holds the checkpoint of iteration 5; .* rename it back"):
            read(tmp_path)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


@given(st.data())
def test_a_stored_architecture_and_layout_with_strange_values_are_refused_or_usable(data):
    """Whatever is read must be fit to compute with: frequencies, and the stored slots."""
    shape = dataclasses.replace(
        SHAPE, rope_scaling=data.draw(st.sampled_from([LLAMA3, {"type": "linear", "factor": 2}]))
    )
    layout = ShardLayout.pack(Architecture.full(shape), 1, {})
    stored = {"architecture": layout.architecture.to_json(), "layout": layout.to_state()}
    stored = json.loads(json.dumps(stored))
    inner = data.draw(st.sampled_from([("architecture", "shape", "rope_scaling"), ("architecture",), ("layout",)]))
    found = stored
    for name in inner:
        found = found[name]
    where = data.draw(st.sampled_from([place for place in places(found) if len(place) < 5]))
    stored = mutated(stored, (*inner, *where), data.draw(ANYTHING))

    def read():
        read = Architecture.from_json(stored["architecture"])
        assert torch.isfinite(inverse_frequencies(read.shape)).all()
        state = stored["layout"]
        check_fields(state if isinstance(state, dict) else {}, LAYOUT_FIELDS, Path("layout.json"), required=True)
        ShardLayout.from_state(read, state)

    is_read_or_refused(read)


@pytest.mark.parametrize(
    ("scaling", "is_read"),
    [
        (None, True),
        (LLAMA3, True),
        ({"rope_type": "linear", "factor": 4}, True),
        ({"rope_type": "linear", "factor": "4"}, False),
        ({"rope_type": "linear", "factor": True}, False),
        ({"rope_type": "linear"}, False),
        ({"rope_type": "yarn", "factor": 4}, False),
        ({"rope_type": ["linear"], "factor": 4}, False),
        (LLAMA3 | {"high_freq_factor": 1.0}, False),
        (LLAMA3 | {"low_freq_factor": None}, False),
        ([], False),
    ],
)
def test_a_stored_rope_scaling_is_checked(scaling, is_read):
    stored = ARCHITECTURE.to_json()
    stored["shape"]["rope_scaling"] = scaling
    if is_read:
        assert Architecture.from_json(stored).shape.rope_scaling == scaling
    else:
        with pytest.raises(UserError, match="architecture.json: .*rope_scaling is"):
            Architecture.from_json(stored)


@pytest.mark.parametrize(
    "ledger",
    [
        {"status": ["x"], "done": {}, "skipped": {}},
        {"status": "failed", "done": {"export": "8"}, "skipped": {}},
        {"status": "failed", "done": [], "skipped": {}},
        {"status": "failed", "done": {}, "skipped": 3},
        ["failed"],
    ],
)
def test_a_ledger_with_strange_values_is_an_empty_one(tmp_path, ledger):
    (tmp_path / "hf").mkdir()
    (tmp_path / LEDGER_FILE).write_text(json.dumps(ledger))
    assert Ledger.read(tmp_path) == Ledger()
