"""Jobs and job arrays on a real Slurm: preempted in mid-pruning, requeued, finished, exported, evaluated, collected.

`make test-slurm` runs these; they need a cluster with two idle nodes of at least two CPUs whose file system is shared
with this machine, and the real inputs that MEGATRON_PRUNE_DATA names. Elsewhere they are skipped, with the reason.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prune.data.preprocess import Options, preprocess

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "examples" / "slurm" / "pretrain_efficientllm.sbatch"
SCALING = ROOT / "examples" / "token_scaling.sh"
CONFIG = """
model: {{hf_model: {stories}, make_vocab_size_divisible_by: 8}}
parallel: {{device: cpu}}
data: {{data_path: {data}/stories, data_cache_path: {data}/cache, split: "90,10,0", seq_length: 128}}
training: {{micro_batch_size: 2, global_batch_size: 8, train_iters: 600}}
optimizer: {{lr: 1.0e-3, lr_decay_style: constant}}
pruning: {{target_params: 150K, ratio: "1:1", normalize: none}}
continued: {{continue_tokens: 10240, continue_lr: 1.0e-3}}
checkpoint: {{save: {folder}/run, save_interval: 20, keep_last: 2}}
logging: {{log_interval: 5}}
evaluation: {{eval_tasks: arc_easy, eval_task_data: {bench}}}
"""


def command(*words, ok=True):
    """Output of a command."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 or not ok, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Skips, with the reason, where there is no Slurm with two nodes to be had."""
    missing = [name for name in ("sbatch", "srun", "scontrol", "squeue", "sinfo") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not here: {missing[0]} is not on the path")
    nodes = subprocess.run(["sinfo", "-h", "-t", "idle,mix", "-o", "%D"], capture_output=True, text=True, check=False)
    if nodes.returncode != 0:
        pytest.skip(f"Slurm does not answer: {nodes.stderr.strip()}")
    if sum(map(int, nodes.stdout.split())) < 2:
        pytest.skip("needs a Slurm cluster with two nodes that are not busy")


@pytest.fixture(scope="module")
def data(stories260k, tinystories, tmp_path_factory):
    """The folder of the data set."""
    folder = tmp_path_factory.mktemp("data")
    options = Options(tokenizer_model=str(stories260k / "tokenizer.model"), prepend_bos=True)
    preprocess([str(tinystories)], str(folder / "stories"), options)
    return folder


@pytest.fixture
def place(real_data, stories260k, data, tmp_path, monkeypatch):
    """A working folder with run.yaml, in a user's plain environment."""
    names = {"stories": stories260k, "data": data, "folder": tmp_path, "bench": real_data / "bench"}
    (tmp_path / "run.yaml").write_text(CONFIG.format(**names))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MEGATRON_PRUNE_ROOT": ROOT, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


@pytest.fixture
def job(place):
    """`job(*options)` submits run.yaml and returns the job's number; cancelled at the end."""
    submitted = []

    def submit(*options):
        submitted.append(int(command("sbatch", "--parsable", *options, SBATCH, "run.yaml")))
        return submitted[-1]

    yield submit
    for number in submitted:
        command("scancel", number, ok=False)


def gone(*numbers, minutes=10):
    """Wait until Slurm has no such jobs any more; False: it still has."""
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        if not any(command("squeue", "-h", "-j", number, ok=False) for number in numbers):
            return True
        time.sleep(1)
    return False


def log(number):
    """The job's log so far."""
    path = Path(f"efficientllm-{number}.log")
    return path.read_text() if path.exists() else ""


def iteration():
    """Of the newest checkpoint."""
    path = Path("run/latest_checkpointed_iteration.txt")
    return int(path.read_text()) if path.exists() else 0


def wait(number, what, until, minutes=8):
    """Wait for `until`, while the job is there."""
    end = time.monotonic() + 60 * minutes
    while not until():
        assert time.monotonic() < end, f"{what}: not within {minutes} minutes\n{log(number)[-3000:]}"
        assert command("squeue", "-h", "-j", number, ok=False), f"{what}: the job is gone\n{log(number)[-3000:]}"
        time.sleep(0.5)


def preempt(number, *how):
    """Signal the job in mid-pruning, and see it saved and requeued; then let it start without Slurm's pause."""
    wait(number, "first checkpoint", lambda: iteration() >= 20)
    time.sleep(1.5)  # some iterations more, which only a save at the signal can keep
    restarts = log(number).count("requeued")
    command("scancel", *how, number)
    wait(number, "requeue", lambda: log(number).count("requeued") > restarts)
    wait(number, "pending", lambda: "PENDING" in command("squeue", "-h", "-j", number, "-o", "%T"))
    status = json.loads(Path("run/run_status.json").read_text())
    assert status["status"] == "preempted" and status["iteration"] == iteration()
    assert not Path("run/hf").exists()
    start_soon(number)
    return iteration()


def start_soon(number):
    """Spare a requeued job Slurm's pause of two minutes, but for some seconds of it: a node takes a job that comes back
    within the second in which it was told to forget it for the forgotten one ("credential revoked"), and it has failed.
    """
    command("scontrol", "update", f"JobId={number}", "StartTime=now+3")


def finished(number, stopped_at):
    """Wait for the end and check what is there."""
    assert gone(number), log(number)[-3000:]
    text = log(number)
    assert "JobState=COMPLETED" in command("scontrol", "show", "job", number), text[-3000:]
    assert text.count("job finished at iteration") == 1
    ledger = json.loads(Path("run/launch_status.json").read_text())
    assert ledger["status"] == "finished" and ledger["done"]["export"] == iteration() > stopped_at
    removals = [json.loads(line) for line in Path("run/pruning_history.jsonl").read_text().splitlines()]
    parameters = [removal["parameters"] for removal in removals]
    assert parameters == sorted(parameters, reverse=True) and len(set(parameters)) == len(parameters)
    assert 150_000 * 0.995 <= parameters[-1] <= 150_000
    before, after = ([r for r in removals if (r["iteration"] <= stopped_at) == early] for early in (True, False))
    assert before and after, "it was preempted in mid-pruning"
    assert json.loads(Path("run/hf/config.json").read_text())["vocab_size"] == 512
    evaluated(text, ledger)


def evaluated(text, ledger):
    """Source and exported model were judged: on data always, on tasks where lm-eval is installed."""
    models = json.loads(Path("run/evaluation/evaluation.json").read_text())["models"]
    assert [model["name"] for model in models] == ["stories260K", "hf"]
    losses = [model["perplexity"][0]["loss"] for model in models]
    assert 1.0 < losses[0] < losses[1] < 5.0, "the pruned one has lost something, and is no wreck"
    if importlib.util.find_spec("lm_eval") is None:
        assert "is not installed" in ledger["skipped"]["evaluate"] and "evaluate" not in ledger["done"]
        assert re.search("stage evaluate: incomplete, .* is not installed", text)
    else:
        assert ledger["done"]["evaluate"] == iteration() and not ledger["skipped"]
        assert all(model["tasks"] for model in models)


def test_a_task_per_node_preempted_by_a_signal_to_its_steps(job, monkeypatch):
    """torchrun on each of two nodes; `scancel --signal=TERM` reaches every process of the step."""
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    number = job("--nodes=2")
    finished(number, preempt(number, "--signal=TERM"))
    logs = sorted(Path(f"efficientllm-{number}").rglob("std*.log"))
    assert {path.relative_to(f"efficientllm-{number}").parts[:2] for path in logs} == {
        (f"run-{start}", f"node-{node}") for start in (0, 1) for node in (0, 1)
    }


def test_a_task_per_rank_preempted_by_its_time_limits_signal(job):
    """Two ranks on one node, two on the other, no torchrun; the script alone gets USR1, as before a time limit."""
    number = job("--nodes=2", "--ntasks-per-node=2")
    finished(number, preempt(number, "--batch", "--signal=USR1"))
    names = {path.name for path in Path(f"efficientllm-{number}/run-1").iterdir()}
    assert names == {f"rank-{rank}.log" for rank in range(4)}


def test_a_cancelled_job_stays_cancelled(job, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    number = job("--nodes=1")
    wait(number, "first checkpoint", lambda: iteration() >= 20)
    command("scancel", number)
    assert gone(number, minutes=2)
    assert "JobState=CANCELLED" in command("scontrol", "show", "job", number)
    assert f"{number}: requeued" not in log(number)


def test_wrong_use_fails_with_one_line(job):
    """Two ranks on each node, a batch that four do not divide."""
    text = Path("run.yaml").read_text()
    Path("run.yaml").write_text(text.replace("global_batch_size: 8", "global_batch_size: 6"))
    number = job("--nodes=2", "--ntasks-per-node=2")
    assert gone(number, minutes=5)
    logs = [path.read_text() for path in Path(f"efficientllm-{number}").rglob("rank-*.log")]
    told = [line for text in logs for line in text.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "training.global_batch_size 6" in told[0], logs
    assert "JobState=FAILED" in command("scontrol", "show", "job", number)
    assert "requeued" not in log(number) and not Path("run/hf").exists()


def test_a_job_array_of_ratios_collects_itself(place):
    """Real runs of three ratios; one is preempted and requeued, the collecting job waits for it."""
    ratios = ("8:1", "2:1", "1:1")
    flags = ("--prune-target-params", "200K", "--save-interval", 5, "--eval-interval", 1000)
    words = (SCALING, "run.yaml", "out", "--ratios", " ".join(ratios), "--slurm", "--nodes=1 --cpus-per-task=1")
    told = command("bash", *words, "--", *flags)
    array, last = map(int, re.search(r"job array (\d+) with 3 runs; job (\d+) collects", told).groups())
    try:
        watch_the_array(array, last, ratios)
    finally:
        command("scancel", array, last, ok=False)


def watch_the_array(array, last, ratios):
    """Preempt the slowest run, wait for the end, and look at what is there."""
    slowest = Path("out/ratio_1-1")
    end = time.monotonic() + 300
    while not (slowest / "latest_checkpointed_iteration.txt").exists() and time.monotonic() < end:
        time.sleep(0.5)
    command("scancel", "--signal=TERM", f"{array}_2")
    while "PENDING" not in command("squeue", "-h", "-j", f"{array}_2", "-o", "%T") and time.monotonic() < end:
        time.sleep(0.5)
    assert json.loads((slowest / "launch_status.json").read_text())["status"] == "preempted"
    start_soon(f"{array}_2")
    assert gone(array, last), command("squeue")
    runs = json.loads(Path("out/token_scaling.json").read_text())
    assert [run["ratio"] for run in runs] == list(ratios), Path("out/collect.log").read_text()
    tokens = [run["pruning_tokens"] for run in runs]
    assert tokens == sorted(set(tokens)), "the slower the pruning, the more tokens"
    ledgers = [json.loads(path.read_text()) for path in Path("out").glob("ratio_*/launch_status.json")]
    assert [ledger["status"] for ledger in ledgers] == ["finished"] * 3
    assert all(Path("out", name).stat().st_size > 5000 for name in ("loss_vs_tokens.png", "loss_vs_parameters.png"))
    assert Path("out/token_scaling.md").read_text().count("\n") == 6
