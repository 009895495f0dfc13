"""examples/peers.py without its peer."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "peers.py"


def test_it_says_what_to_install():
    # -S: without what is installed here, whatever that is
    words = [sys.executable, "-S", "-E", str(SCRIPT), "--hf-model", "model", "--data-path", "data"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: torch-pruning is not installed: pip install --no-deps torch-pruning\n"
