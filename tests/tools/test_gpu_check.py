"""tools/gpu_check.py without a GPU: a rehearsal, steps that fail and stop nothing, ranks of a cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_prune.commands import check_gpu as gpu_check
from megatron_prune.testing.benchmarks.gpu_check.rows import Context, read_rows
from megatron_prune.testing.benchmarks.gpu_check.runner import STEPS, run_steps
from tests.commands import ROOT, run


def rehearse(out, *names):
    status = gpu_check.main(["--device", "cpu", "--tiny", "--only", ",".join(names), "--out", str(out)])
    return status, read_rows(out)


def test_a_rehearsal_measures_speed_and_memory(tmp_path, capsys):
    status, rows = rehearse(tmp_path, "speed", "memory")
    assert status == 0, [row for row in rows if row.passed is False]
    assert {row.step for row in rows} == {"speed", "memory"}
    names = " ".join(row.name for row in rows)
    for part in (
        "plain",
        "pruning at 1:9",
        "retirement of one group, stem",
        "compaction",
        "shrinking",
        "a save in the",
    ):
        assert part in names
    out = capsys.readouterr().out
    assert all(row.name in out for row in rows), "the table lacks a row"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_whole_rehearsal_passes(tmp_path, real_data):
    status, rows = rehearse(tmp_path, *(step.name for step in STEPS))
    assert status == 0, [row for row in rows if row.passed is False]
    assert {row.step for row in rows} == {step.name for step in STEPS}


def test_a_step_that_takes_too_long_is_a_row_and_the_next_one_starts(tmp_path):
    assert run_steps(Context("cpu", True, tmp_path), ["memory", "science"], slowness=0.002) == 1
    rows = {row.step: row for row in read_rows(tmp_path)}
    assert "not finished" in rows["memory"].measured and rows["memory"].passed is False
    assert rows["science"].passed, rows["science"]


def test_a_step_that_raises_leaves_its_rows_and_the_error(tmp_path):
    """cuda without a GPU: the first rows of the step are there, then what went wrong, in one line."""
    assert run_steps(Context("cuda", True, tmp_path), ["memory"]) == 2
    error, step = read_rows(tmp_path)
    assert error.name == "error" and "--device cpu" in error.measured and "status 1" in step.measured
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_an_unknown_step_is_named(capsys):
    assert gpu_check.main(["--only", "speed,nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.timeout(240)
def test_ranks_of_a_cluster_agree_with_the_oracle():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    script = ROOT / "tools" / "gpu_check.py"
    out = run(sys.executable, *torchrun, script, "--cluster", "--device", "cpu", "--tensor-model-parallel-size", 2)
    lines = [line for line in out.splitlines() if line.startswith(("ok ", "FAILS"))]
    assert len(lines) == 5 and not any(line.startswith("FAILS") for line in lines), out
    assert any("removals, losses within" in line for line in lines)


def test_the_job_script_is_bash_and_says_where_it_looked(tmp_path):
    script = ROOT / "examples" / "slurm" / "gpu_check.sbatch"
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, env={"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "MEGATRON_PRUNE_ROOT" in done.stderr
