"""A run under the real torchrun: start it, follow its output, find its processes, leave none behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARK = "MEGATRON_PRUNE_LAUNCHED"


class Launched:
    """torchrun with two ranks of `pretrain`; whatever it started is killed at the end of the `with` block."""

    def __init__(self, arguments, *launcher):
        command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher)
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [*command, "-m", "megatron_prune.pretrain", *arguments],
            env=os.environ | environment | {_MARK: self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdout.close()
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def read_until(self, text):
        """Follow the output to the first line that holds `text`, else to its end; whether there was one."""
        for line in self._process.stdout:
            self.output += line
            if text in line:
                return True
        return False

    def signal(self, number):
        """Send `number` to torchrun itself."""
        self._process.send_signal(number)

    def wait(self, seconds=60):
        """Read the rest of the output; torchrun's exit code."""
        self.output += self._process.stdout.read()
        return self._process.wait(seconds)

    def rank(self, number):
        """Process of a rank."""
        (pid,) = (pid for pid in self.alive() if _environment(pid).get("RANK") == str(number))
        return pid

    def alive(self):
        """All processes that torchrun and its ranks have started, itself included."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if _environment(pid).get(_MARK) == self._mark]

    def wait_for_orphans(self, seconds):
        """Processes that are still there when torchrun has ended, after at most so long."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.05)
        return self.alive()


def _environment(pid):
    """Variables that a process was started with; none when it is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
