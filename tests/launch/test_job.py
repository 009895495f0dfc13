"""examples/pretrain_efficientllm.sh as users start it: by torchrun, by bash on one and on two nodes, and wrongly."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prune.launch.job import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_efficientllm.sh"
CONFIG = """
model: {{hf_model: {stories}, make_vocab_size_divisible_by: 8}}
parallel: {{device: cpu}}
data: {{data_path: {folder}/stories, split: "90,10,0", seq_length: 64}}
training: {{micro_batch_size: 1, global_batch_size: 2, train_iters: 100}}
optimizer: {{lr: 1.0e-3, lr_decay_style: constant}}
pruning: {{target_params: 240K, ratio: "8:1"}}
continued: {{continue_tokens: 256}}
checkpoint: {{save: {folder}/run}}
logging: {{log_interval: 1}}
"""


@pytest.fixture(autouse=True)
def own_signals():
    """`main` takes SIGTERM and SIGUSR1 for itself; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*words, **variables):
    """Start a command of the repository as a fresh shell would, without what launchers set."""
    of_launchers = (
        "SLURM",
        "TORCHELASTIC",
        "NNODES",
        "NODE_RANK",
        "NPROC",
        "MASTER",
        "RANK",
        "LOCAL",
        "WORLD",
        "LOG_DIR",
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(of_launchers)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHON": sys.executable, **variables}
    return subprocess.Popen(
        [str(word) for word in words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*words, **variables):
    """(exit status, output) of a command that was started so."""
    process = start(*words, **variables)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def never(_argv):
    """A training that must not begin."""
    raise AssertionError("training began")


# Right use ------------------------------------------------------------------------------------------------------------


def test_it_is_a_shell_script_and_a_python_program():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    compile(SCRIPT.read_text(), str(SCRIPT), "exec")
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.timeout(400)
def test_stages_go_on_where_the_job_stopped(stories260k, tinystories, tmp_path, monkeypatch, caplog):
    """Prune by torchrun on two ranks, the rest by bash on one; a third call finds everything done."""
    text = tmp_path / "text.txt"
    text.write_text(tinystories.read_text()[:60_000])
    tokenizer = stories260k / "tokenizer.model"
    prepare = ("tools/preprocess_data.py", "--input", text, "--output-prefix", tmp_path / "stories")
    code, output = run(
        sys.executable, ROOT / prepare[0], *prepare[1:], "--tokenizer-model", tokenizer, PYTHONPATH=str(ROOT)
    )
    assert code == 0, output
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(stories=stories260k, folder=tmp_path))

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    code, output = run(*torchrun, SCRIPT, config, "--stage", "prune")
    assert code == 0 and "target reached" in output, output
    reached = json.loads((tmp_path / "run" / "summary.json").read_text())["iteration"]

    code, output = run("bash", SCRIPT, config, "--", "--log-interval", "2")
    assert code == 0 and "stage prune: done" in output, output
    assert output.count("done: stages prune, continue, export, evaluate") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["iteration"] == reached + 2, "256 tokens are two iterations"
    assert json.loads((tmp_path / "run" / "hf" / "config.json").read_text())["vocab_size"] == 512
    assert json.loads((tmp_path / "run" / "launch_status.json").read_text())["done"]["export"] == reached + 2

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        assert main([str(config)], never, SCRIPT) == 0
    assert [f"stage {stage}: done" in caplog.text for stage in ("prune", "continue", "export")] == [True] * 3


@pytest.mark.full
def test_nodes_that_disagree_stop_with_one_line(tmp_path):
    """Two nodes (both are this machine), started by hand with different flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    usual = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    recipe = (SCRIPT, ROOT / "examples/configs/debug_cpu.yaml", "--", "--save", tmp_path / "run")
    nodes = [start("bash", *recipe, "--seed", node + 1, NODE_RANK=str(node), **usual) for node in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes)
    assert [output.count("error: configuration: rank 1 read") for output in outputs] == [1, 0], outputs
    assert '"seed: 2" where rank 0 has "seed: 1"' in outputs[0]
    assert not (tmp_path / "run").exists()


# Wrong use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no configuration is given"),
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        (["a.yaml", "b.yaml"], "one configuration, please, not 2"),
        (["a.yaml", "--stage", "finetune"], 'unknown stage "finetune"'),
        (["a.yaml", "--stage"], "--stage needs a value"),
        (["a.yaml", "--train-iters", "5"], "go after --, as in CONFIG -- --train-iters"),
        (
            ["examples/configs/debug_cpu.yaml", "--", "--save", "null", "--save-interval", "null"],
            "checkpoint.save (--save) is not set",
        ),
        (["examples/configs/debug_cpu.yaml", "--", "--trian-iters", "5"], "did you mean --train-iters"),
    ],
)
def test_mistakes_are_one_line(words, told, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "NODE_RANK", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert main(words, never, SCRIPT) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and told in captured.err


def test_only_the_first_process_tells(monkeypatch, capfd):
    for name, value in (("RANK", "3"), ("SLURM_PROCID", "3"), ("NODE_RANK", "1")):
        with monkeypatch.context() as patch:
            patch.delenv("RANK", raising=False)
            patch.setenv(name, value)
            assert main(["nowhere.yaml", "--stage", "x"], never, SCRIPT) == 2
    assert capfd.readouterr().err == ""


def test_flags_that_only_look_start_nothing(monkeypatch):
    """--dry-run, --help and --print-default-config after -- are the training's own, in this very process."""
    seen = []
    code = main(["run.yaml", "--", "--dry-run", "--world-size", "64"], lambda argv: seen.append(argv) or 0, SCRIPT)
    assert code == 0 and seen == [["--config", "run.yaml", "--dry-run", "--world-size", "64"]]
