"""examples/step_speed.py on a tiny model: both tables, with every peer and every width."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(*flags):
    words = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "step_speed.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_steps_of_all_are_compared():
    done = call("--layers", "1", "--turns", "1", "--vocab", "512", "--seq-length", "64", "--micro-batches", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    peers, widths = [row for row in rows if len(row) == 3], [row for row in rows if len(row) == 4]
    assert [row[0] for row in peers[2:]] == ["here", "megatron-core", "transformers"]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in peers[2:])
    shares = [float(row[1]) for row in widths[2:]]
    assert len(shares) == 5 and shares[0] == 1.0 and all(0.2 < share < 0.7 for share in shares[1:])


def test_an_unknown_word_is_one_line():
    done = call("--compile", "perhaps")
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: --compile perhaps: off or on"]
