"""examples/pretrain_efficientllm.sh as users start it: by torchrun, by bash, wrongly (two nodes: test_two_nodes)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune.config import dump, load_config
from megatron_prune.launch.jobs.job import main
from megatron_prune.testing.helpers.ranks import free_port, watch_ranks
from megatron_prune.testing.helpers.tiny_runs import CONTINUED_ITERATIONS, VOCABULARY, prepare

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_efficientllm.sh"


@pytest.fixture(autouse=True)
def own_signals():
    """`main` takes the stop signals for itself; give them back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _heed_signals():
    """A terminal's shell ignores none of these; what runs the tests may (`cmd &` in a script, nohup)."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


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
        [str(word) for word in words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_signals,
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


def one_rank(_rank, _world_size, words):
    """One rank of a job, as torchrun starts it."""
    from megatron_prune.pretrain import main as train

    status = main([str(word) for word in words], train)
    if status:
        os._exit(status)


def test_stages_go_on_where_the_job_stopped(tmp_path, monkeypatch, caplog):
    """Prune on two ranks, continue and export on one; a third call finds everything done."""
    save, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(dump(load_config(prepare(tmp_path).arguments(save))))
    with monkeypatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        fates = watch_ranks(one_rank, 2, [config, "--stage", "prune"])
    assert [fate.exit_code for fate in fates] == [0, 0] and "target reached" in fates[0].output, fates[0].output
    reached = json.loads((save / "summary.json").read_text())["iteration"]

    words = [config, "--stage", "prune,continue,export"]
    (fate,) = watch_ranks(one_rank, 1, [*words, "--", "--log-interval", "2"])
    assert fate.exit_code == 0 and "stage prune: done" in fate.output, fate.output
    assert fate.output.count("done: stages prune, continue, export") == 1
    assert json.loads((save / "summary.json").read_text())["iteration"] == reached + CONTINUED_ITERATIONS
    assert json.loads((save / "hf" / "config.json").read_text())["vocab_size"] == VOCABULARY
    assert json.loads((save / "launch_status.json").read_text())["done"]["export"] == reached + CONTINUED_ITERATIONS

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        assert main([str(word) for word in words], never) == 0
    assert all(f"stage {stage}: done" in caplog.text for stage in ("prune", "continue", "export"))


def test_bash_starts_torchrun_which_starts_ranks_of_which_one_speaks(tmp_path):
    recipe = (ROOT / "examples/configs/debug_cpu.yaml", "--stage", "export", "--", "--save", tmp_path / "run")
    leftover = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}  # of something else: nobody answers there
    code, output = run("bash", SCRIPT, *recipe, NPROC_PER_NODE="2", **leftover)
    assert code == 2 and "Traceback" not in output, output
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert told == [f"error: --stage export: there is no checkpoint yet in {tmp_path / 'run'}"], output


@pytest.mark.full
@pytest.mark.timeout(300)
def test_torchrun_takes_the_script_through_all_stages(tmp_path):
    """The loss that `evaluate` finds in the exported model is the training's own."""
    save, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(dump(load_config(prepare(tmp_path).arguments(save, "--report"))))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    code, output = run(*torchrun, SCRIPT, config)
    assert code == 0 and output.count("done: stages prune, continue, export, evaluate") == 1, output
    final = json.loads((save / "summary.json").read_text())["stages"]["final"]
    models = json.loads((save / "evaluation" / "evaluation.json").read_text())["models"]
    assert [model["name"] for model in models] == ["source", "hf"]
    assert models[1]["perplexity"][0]["loss"] == pytest.approx(final["validation_loss"], rel=1e-4)
    ledger = json.loads((save / "launch_status.json").read_text())
    assert ledger["done"] == dict.fromkeys(("export", "evaluate"), final["iteration"]) and not ledger["skipped"]
    page, measured = save / "report.html", save / "evaluation" / "evaluation.json"
    assert page.stat().st_mtime_ns > measured.stat().st_mtime_ns, "the page shows the evaluation"


@pytest.mark.timeout(300)
def test_a_task_that_cannot_be_run_leaves_the_results_of_the_others(tmp_path):
    """The launcher's last stage, task by task: what is finished is written, what failed says why, the job is failed."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: install megatron-prune[eval]")
    save, config, tasks = tmp_path / "run", tmp_path / "run.yaml", tmp_path / "tasks"
    tasks.mkdir()
    answers = {"choices": {"text": ["a fox", "a dog"], "label": ["A", "B"]}, "answerKey": "A", "id": "x"}
    (tasks / "arc_easy.jsonl").write_text(2 * (json.dumps({"question": "quick", **answers}) + "\n"))
    long = {"goal": "the", "sol1": "a fox", "sol2": "lazy dogs " * 3000, "label": 0}
    (tasks / "piqa.jsonl").write_text(json.dumps(long) + "\n")
    more = ("--train-iters", 2, "--lr-warmup-iters", 0, "--prune-target-params", "null", "--continue-tokens", 0)
    named = ("--eval-tasks", "piqa,arc_easy", "--eval-task-data", tasks)
    config.write_text(dump(load_config(prepare(tmp_path).arguments(save, *more, *named))))
    code, output = run("bash", SCRIPT, config, "--stage", "prune,export,evaluate", NPROC_PER_NODE="1")
    assert code == 1 and "Traceback" not in output, output
    assert "evaluate ended with status 1" in output
    for model in json.loads((save / "evaluation" / "evaluation.json").read_text())["models"]:
        assert {score["task"] for score in model["tasks"]} == {"arc_easy"}
        assert [failure["task"] for failure in model["failed"]] == ["piqa"]
        assert "longer than the" in model["failed"][0]["reason"]
    ledger = json.loads((save / "launch_status.json").read_text())
    assert ledger["status"] == "failed" and set(ledger["done"]) == {"export"}


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
    assert main(words, never) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and told in captured.err


def test_only_the_first_process_tells(monkeypatch, capfd):
    for name, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"), ("NODE_RANK", "NNODES")):
        with monkeypatch.context() as patch:
            patch.delenv("RANK", raising=False)
            patch.setenv(name, "3")
            patch.setenv(count, "4")
            assert main(["nowhere.yaml", "--stage", "x"], never) == 2
    assert capfd.readouterr().err == ""


def test_a_node_tells_what_is_wrong_with_its_own_variables(monkeypatch, capfd):
    """Nobody else can: it never meets the other nodes."""
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("NNODES", "2"), ("NODE_RANK", "2"), ("MASTER_ADDR", "node0")):
        monkeypatch.setenv(name, value)
    assert main(["nowhere.yaml"], never) == 2
    assert capfd.readouterr().err == "error: NODE_RANK=2 is not below NNODES=2; nodes count from 0\n"


def two_nodes(port):
    """What the first of two nodes is told."""
    return {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def test_a_port_that_is_taken_is_one_line(tmp_path):
    recipe = (ROOT / "examples/configs/debug_cpu.yaml", "--", "--save", tmp_path / "run")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        code, output = run("bash", SCRIPT, *recipe, **two_nodes(port))
    assert code == 2 and output.startswith(f"error: MASTER_PORT: port {port} of "), output
    assert output.count("\n") == 1 and not (tmp_path / "run").exists()


def test_told_to_leave_before_anything_was_trained_is_not_done(tmp_path):
    """The other node never comes."""
    recipe = (ROOT / "examples/configs/debug_cpu.yaml", "--", "--save", tmp_path / "run")
    port = free_port()
    process = start("bash", SCRIPT, *recipe, **two_nodes(port), GRACE_SECONDS="0.5")
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not listens(port):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (tmp_path / "run").exists()


def listens(port):
    """Whether somebody does at this port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_nodes_that_cannot_meet_are_one_line_in_time(tmp_path):
    more = ("--save", tmp_path / "run", "--distributed-timeout-minutes", 0.05)
    recipe = (ROOT / "examples/configs/debug_cpu.yaml", "--", *more)
    code, output = run("bash", SCRIPT, *recipe, **two_nodes(free_port()))
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "this node could not meet the others" in lines[0], output
    assert "Traceback" not in output, output


def test_flags_that_only_look_start_nothing(monkeypatch):
    """--dry-run, --help and --print-default-config after -- are the training's own, in this very process."""
    seen = []
    code = main(["run.yaml", "--", "--dry-run", "--world-size", "64"], lambda argv: seen.append(argv) or 0)
    assert code == 0 and seen == [["--config", "run.yaml", "--dry-run", "--world-size", "64"]]
