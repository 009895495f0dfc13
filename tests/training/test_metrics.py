"""The reporter: log lines, MFU, memory, time split, figures during the run, TensorBoard and wandb, the last line."""

import contextlib
import dataclasses
import logging
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.budget import training_flops
from megatron_prune.pruning.history import Removal
from megatron_prune.saliency.scores import UnitScores
from megatron_prune.training import metrics
from megatron_prune.training.metrics import IterationReport, Reporter, known_peak_tflops

SHAPE = LlamaShape(2, 16, 24, 4, 2, 4, 32, 64)
ARCHITECTURE = Architecture.full(SHAPE).without(Group.of("ffn", ((3,), (5,))))


def config(**logging_fields):
    plain = Config()
    fields = {"log_interval": 2, "progress": "lines", **logging_fields}
    return dataclasses.replace(plain, logging=dataclasses.replace(plain.logging, **fields))


def removal(iteration, channel):
    scores = {"head": 3e-7, "ffn": 1e-7 * (channel + 1), "stem": 2e-7}
    group, widths = Group.of("ffn", ((channel,), (channel,))), {"head": 4, "ffn": 23, "stem": 16}
    return Removal(iteration, iteration * 100, group, scores, 0.1, 4000 - channel, widths)


def after(channels):
    """The model whose first FFN channels are removed."""
    architecture = Architecture.full(SHAPE)
    for channel in range(channels):
        architecture = architecture.without(Group.of("ffn", ((channel,), (channel,))))
    return architecture


def report(iteration, removed=(), **fields):
    return IterationReport(iteration, 10, iteration * 8, iteration * 100, 2.5, 1.0, 1e-3, 0, tuple(removed), **fields)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(value=50.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.value)
    return now


def test_a_line_has_throughput_mfu_memory_and_the_time_split(clock, caplog):
    reporter = Reporter(config(peak_tflops=1e-3), 2, None, is_active=True)
    reporter.begin(ARCHITECTURE)
    seconds = {"scoring": 0.5, "forward-backward": 2.0}
    with caplog.at_level(logging.INFO):
        for iteration in (1, 2):
            clock.value += 4.0
            reporter.iteration(report(iteration, seconds=lambda: seconds, memory=lambda: 3 << 20), ARCHITECTURE)
    tokens = Config().tokens_per_iteration
    tflops = tokens * training_flops(ARCHITECTURE, Config().data.seq_length) / 4.0 / 2 / 1e12
    line, split = caplog.messages
    assert "elapsed time per iteration (ms): 4000.0 |" in line
    assert f"tokens per second: {tokens / 4:.0f} |" in line and "memory (MiB): 3 |" in line
    assert f"throughput per GPU (TFLOP/s/GPU): {tflops:.3f} |" in line and f"MFU: {tflops / 1e-3:.2%} |" in line
    assert split == " time per iteration (ms) | forward-backward: 1000.0 | scoring: 250.0 | other: 2750.0 |"


def test_the_last_line_sums_the_session_up(clock, caplog):
    reporter = Reporter(config(log_interval=100), 1, None, is_active=True)
    reporter.begin(Architecture.full(SHAPE))
    with caplog.at_level(logging.INFO):
        reporter.summary("finished", 5, ARCHITECTURE, 7 << 20)
        clock.value += 60
        reporter.iteration(report(1, [removal(1, 3)]), ARCHITECTURE)
        reporter.summary("preempted", 1, ARCHITECTURE, 7 << 20)
    last = caplog.messages[-1]
    assert last.startswith("preempted: iteration 1 (1 in this session, 1.0 min), ")
    full = Architecture.full(SHAPE).parameters
    assert f"{full:,} to {ARCHITECTURE.parameters:,} parameters" in last and "head/ffn/stem: 0/1/0" in last
    assert "peak memory 7 MiB" in last and "MFU" not in last


def test_figures_are_drawn_during_the_run_when_the_history_has_grown(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    reporter = Reporter(config(), 1, tmp_path, is_active=True)
    reporter.figures([], ARCHITECTURE)
    assert not list(tmp_path.glob("*.png"))
    reporter.figures([removal(1, 0), removal(2, 1)], after(2))
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"pruning_saliencies.png", "pruning_widths.png"}
    drawn = (tmp_path / "pruning_widths.png").stat().st_mtime_ns
    reporter.figures([removal(1, 0), removal(2, 1)], after(2))
    assert (tmp_path / "pruning_widths.png").stat().st_mtime_ns == drawn
    reporter.figures([removal(1, 0), removal(2, 1), removal(3, 2)], after(3))
    assert (tmp_path / "pruning_widths.png").stat().st_mtime_ns > drawn
    reporter.close()


def test_a_figure_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(metrics, "plot_history", full_disk)
    reporter = Reporter(config(), 1, tmp_path, is_active=True)
    with caplog.at_level(logging.INFO):
        reporter.figures([removal(1, 0)], after(1))
    assert "No space left" in caplog.text
    reporter.close()


def test_tensorboard_holds_the_scalars(tmp_path, clock):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(config(log_interval=1, peak_tflops=1.0), 1, tmp_path, is_active=True)
    reporter.begin(ARCHITECTURE)
    clock.value += 1
    reporter.iteration(report(1, [removal(1, 0)], seconds=lambda: {"compact": 0.25}), ARCHITECTURE)
    reporter.evaluation(1, 2.0)
    reporter.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = set(board.Tags()["scalars"])
    assert {"lm loss", "MFU", "peak memory (MiB)", "seconds/compact", "seconds/other", "width/ffn"} <= names
    assert {"saliency/head", "saliency/ffn", "saliency/stem", "validation loss", "tokens per second"} <= names
    assert board.Scalars("seconds/compact")[0].value == 0.25


def test_tensorboard_holds_the_configuration_and_histograms_of_the_scores(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(config(log_interval=1), 1, tmp_path, is_active=True)
    kinds = ARCHITECTURE.table.scored
    scores = UnitScores(
        ARCHITECTURE, {kind: tuple(np.arange(1.0, len(ids) + 1) for ids in ARCHITECTURE.sites(kind)) for kind in kinds}
    )
    reporter.begin(ARCHITECTURE)
    reporter.iteration(report(1, [removal(1, 0)], scores=scores), ARCHITECTURE)
    reporter.iteration(report(2, scores=scores), ARCHITECTURE)  # nothing left since: the scores are old
    reporter.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    board.Reload()
    assert set(board.Tags()["histograms"]) == {f"scores/{kind}" for kind in kinds}
    for kind in kinds:
        (found,) = board.Histograms(f"scores/{kind}")
        assert found.histogram_value.num == sum(map(len, scores.values[kind]))
        assert found.histogram_value.sum == sum(values.sum() for values in scores.values[kind])
    (text,) = board.Tensors("configuration/text_summary")
    assert "log_interval: 1" in text.tensor_proto.string_val[0].decode()


def test_prometheus_reads_the_last_numbers(tmp_path, clock):
    reporter = Reporter(config(log_interval=1), 1, tmp_path / 'a "b', is_active=True)
    reporter.begin(ARCHITECTURE)
    clock.value += 1
    reporter.iteration(report(1, [removal(1, 0)], seconds=lambda: {"compact": 0.25}), ARCHITECTURE)
    first = (tmp_path / 'a "b' / "metrics.prom").read_text()
    reporter.evaluation(1, float("nan"))
    reporter.iteration(report(2), ARCHITECTURE)
    second = (tmp_path / 'a "b' / "metrics.prom").read_text()
    reporter.close()
    run = r'run="a \"b"'
    assert f"# TYPE megatron_prune_lm_loss gauge\nmegatron_prune_lm_loss{{{run}}} 2.5\n" in first
    assert f'megatron_prune_seconds{{{run},part="compact"}} 0.25\n' in first
    assert f"megatron_prune_iteration{{{run}}} 1.0\n" in first and f"megatron_prune_iteration{{{run}}} 2.0\n" in second
    assert f"megatron_prune_validation_loss{{{run}}} NaN\n" in second
    line = re.compile(r'[a-z_]+\{run="a \\"b"(,part="[^"]+")?\} (-?[0-9.]+(e[-+]?[0-9]+)?|NaN)')
    for text in (first, second):
        kinds = [row.split()[2] for row in text.splitlines() if row.startswith("# TYPE")]
        assert len(kinds) == len(set(kinds)), "a metric's lines stand together"
        assert all(row.startswith("# TYPE") or line.fullmatch(row) for row in text.splitlines()), text
    assert {path.name for path in (tmp_path / 'a "b').glob("metrics*")} == {"metrics.prom"}


def test_a_named_prometheus_file_is_written_and_a_failure_is_a_warning(tmp_path, caplog):
    reporter = Reporter(config(log_interval=1, prometheus_file=str(tmp_path / "x" / "m.prom")), 1, None, is_active=True)
    reporter.begin(ARCHITECTURE)
    with caplog.at_level(logging.WARNING):
        reporter.iteration(report(1), ARCHITECTURE)
        (tmp_path / "x").mkdir()
        reporter.iteration(report(2), ARCHITECTURE)
    assert "no more" in caplog.text and not (tmp_path / "x" / "m.prom").exists(), "said once, then left alone"
    reporter.close()


def test_wandb_gets_the_same_run_again_after_a_requeue(tmp_path, monkeypatch, clock):
    """Against a stand-in with wandb's interface: a project, a stable id, one record per iteration."""
    begun, records = [], []
    run = SimpleNamespace(id="abc", log=records.append, finish=lambda: records.append("finished"))
    run.log_artifact = lambda path, name, type: records.append((path, name, type))
    standin = SimpleNamespace(init=lambda **given: begun.append(given) or run, Error=RuntimeError, __spec__="there")
    monkeypatch.setitem(sys.modules, "wandb", standin)
    wanted = config(log_interval=1, wandb_project="pruning")
    saves = dataclasses.replace(wanted.checkpoint, save=str(tmp_path / "run"))
    for page in (None, tmp_path / "report.html"):
        reporter = Reporter(dataclasses.replace(wanted, checkpoint=saves), 1, None, is_active=True)
        reporter.iteration(report(1), ARCHITECTURE)
        reporter.flush()
        reporter.close(page)
    assert [given["project"] for given in begun] == ["pruning"] * 2
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow" and begun[0]["name"] == "run"
    assert begun[0]["dir"] == str(tmp_path / "run") and (tmp_path / "run").is_dir()
    assert begun[0]["config"]["logging"]["wandb_project"] == "pruning"
    assert records[0]["lm loss"] == 2.5 and records[0]["iteration"] == 1 and records[1] == "finished"
    assert records[3:] == [(str(tmp_path / "report.html"), "report-abc", "report"), "finished"]


def test_wandb_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        Reporter(config(wandb_project="pruning"), 1, None, is_active=True)


def test_wandb_that_does_not_start_is_said_in_one_line(monkeypatch):
    def init(**_given):
        raise RuntimeError("no key\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError, __spec__="there"))
    with pytest.raises(UserError, match=r"^logging.wandb_project \(--wandb-project\): no key.*WANDB_MODE=offline.*$"):
        Reporter(config(wandb_project="pruning"), 1, None, is_active=True)


def test_a_terminal_gets_a_dashboard_of_its_width_and_a_pipe_plain_lines(monkeypatch, tmp_path, caplog):
    master, slave = os.openpty()
    for name, value in {"TERM": "xterm", "COLUMNS": "47", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    with os.fdopen(slave, "w") as terminal, (tmp_path / "log").open("w") as pipe, caplog.at_level(logging.INFO):
        for stream in (terminal, pipe):
            monkeypatch.setattr(sys, "stderr", stream)
            reporter = Reporter(config(progress="auto"), 1, None, is_active=True)
            reporter.begin(ARCHITECTURE)
            reporter.iteration(report(1), ARCHITECTURE)
            reporter.iteration(report(2), ARCHITECTURE)
            reporter.close()
    shown = ""
    with contextlib.suppress(OSError):  # the end: nobody holds the terminal any more
        while True:
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    assert "heads" in shown
    drawn = shown[shown.index("iteration") : shown.index("\r\n")]
    assert len(drawn) == 47
    assert (tmp_path / "log").read_text() == "" and len(caplog.messages) == 2, "lines go to the log"


def test_other_ranks_show_nothing(tmp_path, caplog):
    reporter = Reporter(config(wandb_project="not even looked at"), 1, tmp_path, is_active=False)
    with caplog.at_level(logging.INFO):
        reporter.begin(ARCHITECTURE)
        reporter.iteration(report(2), ARCHITECTURE)
        reporter.figures([removal(1, 0)], after(1))
        reporter.summary("finished", 2, ARCHITECTURE, 0)
        reporter.close()
    assert caplog.text == "" and list(tmp_path.iterdir()) == []


def test_known_devices():
    assert known_peak_tflops("NVIDIA A800-SXM4-80GB") == 312 and known_peak_tflops("NVIDIA H100 PCIe") == 756
    assert known_peak_tflops("NVIDIA H200") == 989 and known_peak_tflops("NVIDIA GeForce RTX 3090") is None
