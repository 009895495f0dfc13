"""bash on two nodes (both are this machine), started by hand: preempted, gone on, finished; and when they disagree."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_prune.testing.helpers.ranks import free_port
from megatron_prune.testing.helpers.tiny_runs import prepare

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_efficientllm.sh"
pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]


class Node:
    """A shell on one of the nodes; reads what it prints, and kills what a failed test leaves."""

    def __init__(self, rank, port, words):
        usual = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        others = ("SLURM", "TORCHELASTIC", "RANK", "LOCAL", "WORLD", "LOG_DIR")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(others)} | usual
        environment |= {"NODE_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, words)],
            env=environment | {"PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines, self.seen = [], threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line)
                if " iteration        5/" in line:
                    self.seen.set()
        self.seen.set()

    def end(self):
        """(exit status, output)."""
        try:
            code = self.process.wait(timeout=120)
            self.reader.join(20)
            return code, "".join(self.lines)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGTERM)


def start(words, other_words=None):
    """Both nodes."""
    port = free_port()
    return [Node(0, port, words), Node(1, port, other_words or words)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def words(tiny, tmp_path):
    """A command line that prunes for some hundred iterations, and trains on for four."""
    (tmp_path / "run.yaml").write_text("{}\n")
    slowly = ("--prune-ratio", "1:3", "--train-iters", "2000")
    return ["run.yaml", "--stage", "prune,continue,export", "--", *tiny.arguments(tmp_path / "run", *slowly)]


def status(save, name):
    return json.loads((save / f"{name}_status.json").read_text())


def test_both_nodes_are_preempted_and_the_same_command_goes_on(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = start(words)
    assert nodes[0].seen.wait(100)
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    ends = [node.end() for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "a signal asked for it" in ends[0][1]
    stopped = status(tmp_path / "run", "run")
    assert stopped["status"] == status(tmp_path / "run", "launch")["status"] == "preempted"

    ends = [node.end() for node in start(words)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert ends[0][1].count("done: stages prune, continue, export") == 1
    assert "iteration" not in ends[1][1], "node 1 is silent"
    ledger = status(tmp_path / "run", "launch")
    assert ledger["status"] == "finished" and ledger["done"]["export"] > stopped["iteration"]
    removals = [json.loads(line) for line in (tmp_path / "run" / "pruning_history.jsonl").read_text().splitlines()]
    parameters = [removal["parameters"] for removal in removals]
    assert parameters == sorted(set(parameters), reverse=True) and parameters[-1] <= 11_400
    assert any(removal["iteration"] > stopped["iteration"] for removal in removals), "preempted in mid-pruning"
    assert (tmp_path / "run" / "hf" / "config.json").is_file()


def test_nodes_that_disagree_stop_with_one_line(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = [node.end() for node in start([*words, "--seed", 1], [*words, "--seed", 2])]
    assert all(code == 2 and "Traceback" not in output for code, output in ends), ends
    told = 'error: configuration: rank 1 read "seed: 2" where rank 0 has "seed: 1"'
    assert [output.count("error: ") for _, output in ends] == [1, 0], ends
    assert told in ends[0][1] and not (tmp_path / "run").exists()
