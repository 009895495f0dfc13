"""`megatron-prune COMMAND`: one list of commands, one way of reading their flags, one way of telling mistakes."""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from megatron_prune.commands import COMMANDS, main
from megatron_prune.commands.running import run_command
from megatron_prune.commands.token_scaling import ScalingOptions
from tests.commands import ROOT

RUN = "import sys; from megatron_prune.commands import main; status = main()"
NEVER_TOOLS = {"pretrain", "launch", "report", "recipe", "doctor"}
TOOLS = {"preprocess": "preprocess_data", "inspect": "inspect_checkpoint", "score": "score_model"}


def test_help_lists_every_command_in_a_line_and_imports_no_torch():
    check = f"{RUN}; assert status == 0; assert not {{'torch', 'megatron.core', 'numpy'}} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check, "--help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)
    assert all(len(line) < 120 for line in done.stdout.splitlines())


def test_help_of_every_command_imports_neither_torch_nor_transformers():
    check = "import sys; from megatron_prune.commands import COMMANDS, main\n"
    check += "for name in set(COMMANDS) - {'bench', 'bench-save', 'soak', 'gpu-check'}:\n"  # they only measure
    check += (
        " main([name, '--help']); found = {'torch', 'transformers'} & set(sys.modules); assert not found, (name, found)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evalute"], "unknown command evalute; did you mean evaluate?"),
        (["convert_to_hf"], "unknown command convert_to_hf; did you mean convert-to-hf?"),
        (["xyzzy"], "unknown command xyzzy; --help lists them"),
        (["--load", "x"], "unknown command --load"),
        (["inspect"], "--load is not given: "),
        (["inspect", "runs/x"], 'unexpected argument "runs/x": expected a flag, such as --load runs/x'),
        (["preprocess", "--input", "a", "--output-prefix", "p"], "--tokenizer-model is not given"),
        (["preprocess", "--inptu", "a"], "unknown flag --inptu; did you mean --input?"),
        (["preprocess", "--input"], "--input needs a value: one or more words"),
        (["preprocess", "--input", ""], "--input: expected one or more words, got an empty one"),
        (["preprocess", "--document-separator", "lines"], "--document-separator: expected one of "),
        (["evaluate", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["evaluate", "--batch-size", "many"], '--batch-size: expected a whole number, got "many"'),
        (["convert-to-hf", "--verify", "yes"], '--verify is a switch and takes no value, got "yes"'),
        (["convert-to-hf", "--load", "a", "b"], "--load takes one value, got 2: a b"),
        (["convert-to-hf", "--load", "a"], "--save is not given"),
        (["convert-from-megatron", "--vocab-size", "12.5"], "--vocab-size: expected a whole number"),
        (["score", "--tensor-model-paralel-size", "2"], "did you mean --tensor-model-parallel-size (parallel."),
        (["prune-once", "--rescore-evry", "2"], "unknown flag --rescore-evry; did you mean --rescore-every?"),
        (["prune-once", "--dry-run"], "unknown flag --dry-run"),
        (["gpu-check", "--device", "tpu"], '--device: expected one of cuda, cpu, got "tpu"'),
        (["pretrain", "--seed", "x"], '--seed: expected a whole number, got "x"'),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(words, told, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert told in captured.err


def test_what_the_machine_refuses_and_an_interruption_are_one_line(tmp_path, capsys):
    def fails(_options):
        (tmp_path / "absent" / "file").write_text("")

    def is_interrupted(_options):
        raise KeyboardInterrupt

    words = ["--runs", "a", "--output-dir", "b"]
    assert run_command("token-scaling", ScalingOptions, fails, words) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/absent/file: No such file or directory\n"
    assert run_command("token-scaling", ScalingOptions, is_interrupted, words, "interrupted; nothing written") == 130
    assert capsys.readouterr().err == "error: interrupted; nothing written\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_flags(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: megatron-prune {name}") and "\n  --" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert hasattr(importlib.import_module(COMMANDS[name][0]), "main")


def test_tools_are_the_commands_by_their_older_names():
    scripts = {path.stem: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    expected = {TOOLS.get(name, name.replace("-", "_")): name for name in COMMANDS if name not in NEVER_TOOLS}
    assert set(scripts) == set(expected)
    for tool, name in expected.items():
        assert f'start(["{name}", *sys.argv[1:]])' in scripts[tool]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "inspect_checkpoint.py", "--laod", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "error: unknown flag --laod; did you mean --load?\n")


@pytest.mark.parametrize("command", ["evaluate", "inspect", "--version"])
def test_output_that_nobody_takes_is_no_traceback(command):
    """A full disk behind `>`, and `| head` that has seen enough."""
    words = [sys.executable, "-m", "megatron_prune", *([command] if command == "--version" else [command, "--help"])]
    usual = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True, "timeout": 60, "check": False}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, **usual)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(words, stdout=writing, **usual)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
