"""Stages: what is done, what is left, and when a job is started again."""

import dataclasses
import json

import pytest

from megatron_prune.checkpoint import files
from megatron_prune.checkpoint.record import Progress, read_status
from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.launch.jobs.stages import (
    STAGES,
    Ledger,
    Plan,
    make_plan,
    parse_stages,
    wants_requeue,
)

NOTHING, PRUNING = Progress(), Progress(40, "pruning", 0)
REACHED, CONTINUED, FINISHED = (Progress(n, "continued", 60) for n in (60, 65, 70))


@pytest.fixture
def config(tmp_path):
    """100 iterations of pruning at most, then 10 more."""
    plain = Config()
    return dataclasses.replace(
        plain,
        training=dataclasses.replace(plain.training, train_iters=100, global_batch_size=4),
        data=dataclasses.replace(plain.data, seq_length=8),
        pruning=dataclasses.replace(plain.pruning, target_params=1000),
        continued=dataclasses.replace(plain.continued, continue_tokens=320),
        checkpoint=dataclasses.replace(plain.checkpoint, save=str(tmp_path / "run")),
    )


def plan(config, text, progress, **ledger):
    return make_plan(parse_stages(text), config, progress, Ledger(**ledger))


def test_what_training_recovers_the_stages_find_too(tmp_path):
    """Killed between a rename and `latest`, of the first checkpoint and of one saved again."""

    def save(iteration):
        folder = files.begin(tmp_path, iteration)
        state = {"format": 1, "iteration": iteration, "state": {"phase": "pruning", "phase_start": 0}}
        files.write_manifest(folder, files.write_files(folder, {"run_state.json": json.dumps(state).encode()}))
        return files.publish(folder, tmp_path, iteration)

    save(5)
    (tmp_path / files.LATEST).unlink()
    assert Progress.read(tmp_path) == Progress(5)
    folder = save(10)
    folder.rename(folder.with_name(folder.name + ".replaced"))
    assert Progress.read(tmp_path) == Progress(10)


def test_names():
    assert parse_stages("all") == STAGES
    assert parse_stages("export,prune") == ("prune", "export"), "in the order in which they run"
    with pytest.raises(
        UserError, match='unknown stage "finetune"; there are prune, continue, export, evaluate and all'
    ):
        parse_stages("prune,finetune")


def test_a_fresh_job_trains_from_the_configured_source(config):
    assert plan(config, "all", NOTHING) == Plan((), ("export", "evaluate"), ())


def test_prune_alone_stops_at_the_target(config):
    assert plan(config, "prune", NOTHING).train == ("--exit-at-target",)
    assert "--exit-at-target" in plan(config, "prune,export", PRUNING).train
    assert "--exit-at-target" not in plan(config, "prune,continue", PRUNING).train
    assert plan(config, "prune", REACHED).train is None


def test_a_run_that_is_told_to_end_at_the_target_is_exported_there(config):
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, exit_at_target=True))
    assert plan(config, "all", PRUNING).train is not None
    assert plan(config, "all", REACHED).train is None
    assert plan(config, "all", REACHED).after == ("export", "evaluate")


def test_what_was_saved_is_where_it_goes_on(config):
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, load="elsewhere", finetune=True, ckpt_step=7)
    )
    flags = plan(config, "all", PRUNING).train
    from megatron_prune.config import load_config

    found = load_config(list(flags)).checkpoint
    assert found.load == config.checkpoint.save and found.ckpt_step is None and not found.finetune


def test_continue_needs_a_pruned_model(config):
    for progress in (NOTHING, PRUNING):
        with pytest.raises(UserError, match="--stage continue: the target is not reached"):
            plan(config, "continue", progress)
    assert plan(config, "continue", REACHED).train is not None
    assert plan(config, "continue", FINISHED).train is None


def test_done_stages_are_skipped_with_a_line_each(config):
    done = plan(config, "all", FINISHED, done={"export": 70, "evaluate": 70})
    assert done.train is None and done.after == ()
    assert [note.split(":")[0] for note in done.notes] == [f"stage {stage}" for stage in STAGES]


def test_a_newer_checkpoint_is_exported_and_evaluated_again(config):
    assert plan(config, "all", FINISHED, done={"export": 60, "evaluate": 60}).after == ("export", "evaluate")
    assert plan(config, "all", FINISHED, done={"export": 70, "evaluate": 60}).after == ("evaluate",)
    assert plan(config, "all", FINISHED, done={"export": 60, "evaluate": 70}).after == ("export", "evaluate")


def test_single_stages_after_training_need_their_input(config):
    with pytest.raises(UserError, match="no checkpoint yet"):
        plan(config, "export", NOTHING)
    with pytest.raises(UserError, match="nothing is exported yet"):
        plan(config, "evaluate", FINISHED)
    assert plan(config, "export", PRUNING).after == ("export",), "a model in mid-pruning can be exported"


def test_plain_training_is_finished_at_its_last_iteration(config):
    config = dataclasses.replace(config, pruning=Config().pruning, continued=Config().continued)
    assert plan(config, "all", Progress(99)).train is not None
    assert plan(config, "all", Progress(100)).train is None


def test_plans_travel_between_ranks(config):
    for made in (plan(config, "all", PRUNING), plan(config, "all", FINISHED)):
        assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("status", "signalled", "progress", "wanted"),
    [
        ("preempted", False, PRUNING, True),
        ("time_limit", False, CONTINUED, True),
        ("preempted", False, FINISHED, False),
        ("running", True, PRUNING, True),  # killed before it could write why
        ("running", False, PRUNING, False),  # crashed
        ("failed", True, PRUNING, False),
        ("exit_interval", False, PRUNING, False),  # the user's own wish
    ],
)
def test_requeue(config, status, signalled, progress, wanted):
    ledger = Ledger(status, {"export": 70}, {"evaluate": "nothing to evaluate on"})
    assert wants_requeue(STAGES, config, progress, ledger, signalled) == wanted


def test_ledger_and_progress_on_disk(tmp_path):
    assert Ledger.read(tmp_path) == Ledger() and Progress.read(tmp_path) == NOTHING
    assert read_status(tmp_path) is None
    written = Ledger("preempted").with_done("export", 40)
    written.write(tmp_path)
    assert Ledger.read(tmp_path) == Ledger("preempted"), "what is gone is not done"
    (tmp_path / "hf").mkdir()
    assert Ledger.read(tmp_path) == written
    (tmp_path / "launch_status.json").write_text("{")
    assert Ledger.read(tmp_path) == Ledger()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("65\n")
    with pytest.raises(UserError, match="no checkpoint of iteration 65"):
        Progress.read(tmp_path)
    folder = tmp_path / "iter_0000065"
    folder.mkdir()
    state = {"format": 1, "iteration": 65, "state": {"phase": "continued", "phase_start": 60}}
    files.write_manifest(folder, files.write_files(folder, {"run_state.json": json.dumps(state).encode()}))
    assert Progress.read(tmp_path) == CONTINUED
