"""Token scaling: the table and figures from runs' files, and the script that starts the runs."""

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.commands.token_scaling import Run, collect, main, markdown, read_run
from megatron_prune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "token_scaling.sh"


def stage(tokens, parameters, loss):
    return {
        "iteration": tokens // 10,
        "tokens": tokens,
        "parameters": parameters,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "hidden_size": 64,
        "validation_loss": loss,
    }


def write_run(folder, ratio, pruning_tokens, losses, stages=("source", "pruned", "final")):
    """What a run leaves behind."""
    folder.mkdir(parents=True)
    tokens, sizes = (0, pruning_tokens, pruning_tokens + 500), (200, 100, 100)
    facts = {n: stage(t, p, x) for n, t, p, x in zip(("source", "pruned", "final"), tokens, sizes, losses, strict=True)}
    summary = {"consumed_tokens": pruning_tokens + 500, "stages": {name: facts[name] for name in stages}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(f'pruning:\n  ratio: "{ratio}"\n')
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "ratio_1-9", "1:9", 9000, (1.9, 2.1, 2.0)),
        write_run(tmp_path / "ratio_4-1", "4:1", 250, (1.9, 3.1, 2.4)),
        write_run(tmp_path / "ratio_1-1", "1:1", 1000, (1.9, 2.8, 2.2), stages=("source",)),
    ]


def test_what_a_run_measured(runs):
    found = read_run(runs[0])
    assert isinstance(found, Run)
    assert (found.ratio, found.pruning_tokens, found.tokens) == ("1:9", 9000, 9500)
    assert read_run(runs[2]) == "the target is not reached yet"
    assert "has not ended" in read_run(runs[0].parent)


def test_the_table_is_sorted_and_starts_with_the_source(runs):
    lines = markdown(sorted(map(read_run, runs[:2]), key=lambda run: run.pruning_tokens)).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:4] == ["source", "0", "0", "200"] and cells[2][8:] == ["1.9000", ""]
    assert cells[3] == ["4:1", "250", "750", "100", "8", "4", "96", "64", "3.1000", "2.4000"]
    assert cells[4][0] == "1:9"


def test_everything_is_written_and_the_unfinished_named(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = runs[0] / "evaluation" / "evaluation.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"models": [{"average": {"value": 0.6}}, {"average": {"value": 0.5432}}]}))
    assert main(["--runs", *map(str, runs), "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "ratio_1-1: left out, the target is not reached yet" in printed
    assert "accuracy" in printed and "0.5432" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"token_scaling.md", "token_scaling.json", "loss_vs_tokens.png", "loss_vs_parameters.png"}
    assert all((tmp_path / "out" / name).stat().st_size < 100_000 for name in names)


def test_nothing_to_compare_is_a_mistake(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="ratio_1-1: left out"):
        collect(runs[2:], tmp_path / "out")
    (runs[0] / "summary.json").write_text("{}")
    assert main(["--runs", str(runs[0]), "--output-dir", str(tmp_path)]) == 2
    assert "not what a run writes" in capsys.readouterr().err


# The script -----------------------------------------------------------------------------------------------------------


def script(folder, *words, path=None):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    environment["CDPATH"] = str(folder / "elsewhere")  # where cd looks first, in some people's shells
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = ["bash", str(SCRIPT), *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_job_array_has_a_task_per_ratio(tmp_path):
    """Against a stand-in for sbatch, which writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@ ($ARRAY_FLAGS)" >> {tmp_path}/asked\necho 71\n')
    sbatch.chmod(0o755)
    (tmp_path / "run.yaml").write_text("{}\n")
    (tmp_path / "elsewhere" / "out").mkdir(parents=True)
    words = ("run.yaml", "out", "--ratios", "8:1 1:9", "--slurm", "--nodes 8 --time 1:00", "--", "--lr", "1e-4")
    code, output = script(tmp_path, *words, path=tmp_path / "bin")
    assert code == 0 and "job array 71 with 2 runs" in output, output
    array, last = (tmp_path / "asked").read_text().splitlines()
    assert "--array 0-1 --nodes 8 --time 1:00" in array and "run.yaml --stage prune,continue" in array
    assert "--dependency afterany:71" in last and "token_scaling.py" in last
    flags = (tmp_path / "out" / "array_flags.txt").read_text().splitlines()
    schedule = ["--prune-schedule", "ratio", "--prune-ratio"]
    assert [shlex.split(line) for line in flags] == [
        ["--lr", "1e-4", *schedule, ratio, "--save", str(tmp_path / "out" / f"ratio_{ratio.replace(':', '-')}")]
        for ratio in ("8:1", "1:9")
    ]


RECORDER = """#!{python}
import sys
with open({file!r}, "a") as file:
    file.write(repr(sys.argv[1:]) + "\\n")
print(71)
sys.exit({status})
"""


def recorder(path, file, status=0):
    """A program that writes down its words as they reach it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(RECORDER.format(python=sys.executable, file=str(file), status=status))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "name", ["q'; touch X; '", 'with spaces and "quotes" -- b', "$(touch X) `touch X` %j * \\", "ü 100%n", "-x"]
)
def test_names_reach_jobs_as_they_are(name, tmp_path):
    """Through the job array's flags, the batch script, and the words that collect, each run as Slurm would run it."""
    folder = tmp_path / name
    folder.mkdir()
    python = recorder(folder / "python", tmp_path / "collected")
    for command, status in (("sbatch", 0), ("srun", 3)):
        recorder(tmp_path / "bin" / command, tmp_path / f"{command}-asked", status)
    config = f"{name}.yaml"
    (folder / config).write_text("{}\n")
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def bash(*words, **more):
        done = subprocess.run(words, cwd=folder, env=environment | more, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    data = f"3 {name}"
    words = ("--ratios", "1:9", "--slurm", "", "--", "--data-path", data, "--note", "")
    code, output = bash("bash", str(SCRIPT), config, str(folder / "out"), *words)
    assert code == 0, output
    array, last = map(ast.literal_eval, (tmp_path / "sbatch-asked").read_text().splitlines())
    assert os.path.normpath(array[array.index("--stage") - 1]) == config

    slurm = {"JOB_ID": "71", "ARRAY_TASK_ID": "0", "JOB_NAME": "job", "JOB_NUM_NODES": "1", "JOB_NODELIST": "here"}
    variables = {f"SLURM_{key}": value for key, value in slurm.items()} | {"MEGATRON_PRUNE_ROOT": str(ROOT)}
    variables |= {"ARRAY_FLAGS": str(folder / "out" / "array_flags.txt"), "SLURM_NTASKS_PER_NODE": "2"}
    code, output = bash("bash", array[3], *array[4:], **variables)
    assert code == 3, output
    asked = ast.literal_eval((tmp_path / "srun-asked").read_text())
    logs = str(folder / "job-71" / "run-0").replace("%", "%%")
    assert f"--output={logs}/rank-%t.log" in asked  # as Slurm writes a percent sign
    save = str(folder / "out" / "ratio_1-9")
    schedule = ["--prune-schedule", "ratio", "--prune-ratio", "1:9"]
    expected = ["--", "--data-path", data, "--note", "", *schedule, "--save", save]
    assert asked[asked.index("--") :] == expected

    (folder / "out" / "ratio_1-9").mkdir()
    code, output = bash("sh", "-c", last[last.index("--wrap") + 1])
    assert code == 0, output
    collected = ast.literal_eval((tmp_path / "collected").read_text())
    assert collected == [str(ROOT / "tools" / "token_scaling.py"), "--runs", save, "--output-dir", str(folder / "out")]
    assert not list(tmp_path.rglob("X"))


@pytest.mark.parametrize(
    ("lines", "task"), [(None, "0"), ("--lr 1\n", "1"), ("--note 'a b\n", "0"), ("", "0")], ids=repr
)
def test_a_task_without_its_flags_trains_nothing(lines, task, tmp_path):
    """An array that was submitted without its environment, or a line that is not there or cut off."""
    recorder(tmp_path / "bin" / "srun", tmp_path / "asked")
    flags = tmp_path / "flags"
    if lines is not None:
        flags.write_text(lines)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MEGATRON_PRUNE_ROOT": str(ROOT)}
    environment |= {"SLURM_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": task, "SLURM_JOB_NAME": "job"}
    environment |= {} if lines is None else {"ARRAY_FLAGS": str(flags)}
    batch = ROOT / "examples" / "slurm" / "pretrain_efficientllm.sbatch"
    done = subprocess.run(
        ["bash", str(batch), "run.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"needs line {int(task) + 1} of ARRAY_FLAGS" in done.stderr, done.stderr
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((SCRIPT, "o\nut"), "free of line ends and other control characters: $'o\\nut'"),
        ((), "usage: token_scaling.sh CONFIG OUT"),
        (("nowhere.yaml", "out"), "nowhere.yaml: no such file"),
        ((SCRIPT, "out", "--ratios", "1:0"), "got 1:0"),
        ((SCRIPT, "out", "--lr", "1"), "unknown option --lr"),
    ],
)
def test_mistakes_are_one_line(words, told, tmp_path):
    code, output = script(tmp_path, *words)
    assert code == 2 and told in output and output.count("\n") == 1
