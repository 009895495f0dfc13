"""Runs of every engine and model class, and each one's checkpoint read on by all others.

    python -m tests.engine_pairs DIR             in each engine's environment in turn: runs with their checkpoints
    python -m tests.engine_pairs DIR --read      then again in each: from the middle of all runs to their ends

An engine is a release of megatron-core with one of its model classes. A run removes groups of all kinds, compacts and
trains on; two agree when they remove the same units at the same times and all losses, as logged, are equal to 1e-6.
Exits with 1 where any do not. `make test-engines` does all of it; docs/engines.md has what it printed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from megatron.core import __version__ as version

from megatron_prune.model.classes import AUTO, GPT, engine_of
from megatron_prune.testing.helpers.tiny_runs import TinyRun, prepare

MIDDLE, AGREE = 6, 1e-6
CLASSES = tuple(dict.fromkeys((GPT, engine_of(AUTO))))


def train(run: TinyRun, save: Path, engine: str, *more: object) -> dict[str, float]:
    """Loss by iteration."""
    shutil.rmtree(save, ignore_errors=True)
    arguments = run.arguments(save, "--engine", engine, "--save-interval", MIDDLE, *more)
    command = [sys.executable, "-m", "megatron_prune.pretrain", *arguments]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{save}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {i: float(loss) for i, loss in re.findall(r" iteration +(\d+)/.*? lm loss: (\S+)", done.stderr)}


def removals(save: Path) -> list[dict[str, object]]:
    """When which units left."""
    lines = [json.loads(line) for line in (save / "pruning_history.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("iteration", "group", "gone")} for line in lines]


def compare(name: str, losses: dict[str, float], save: Path, other: Path, after: int = 0) -> bool:
    """Print how far a run is from that in `other`; whether they agree."""
    whole = json.loads((other / "losses.json").read_text())
    expected = {i: loss for i, loss in whole.items() if int(i) > after}
    far = max((abs(losses[i] / loss - 1) for i, loss in expected.items() if i in losses), default=float("inf"))
    is_same = removals(save) == removals(other / "run") and losses.keys() == expected.keys() and far <= AGREE
    print(
        f"{name:40} {len(losses):3} losses, apart by {far:.1e}: {'the same' if is_same else 'NOT the same'}", flush=True
    )
    return is_same


def main() -> int:
    """See above."""
    folder, reads = Path(sys.argv[1]), "--read" in sys.argv
    run = TinyRun(folder / "inputs") if (folder / "inputs").exists() else prepare(folder / "inputs")
    agree = []
    for engine in CLASSES:
        own = folder / f"{version}-{engine}"
        if not reads:
            losses = train(run, own / "run", engine)
            (own / "losses.json").write_text(json.dumps(losses))
        for other in sorted(path.parent for path in folder.glob("*/losses.json")):
            if reads:
                save = own / f"from_{other.name}"
                losses = train(run, save, engine, "--load", other / "run", "--ckpt-step", MIDDLE)
                agree.append(compare(f"{own.name} from {other.name}", losses, save, other, MIDDLE))
            else:
                agree.append(compare(f"{own.name} and {other.name}", losses, own / "run", other))
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
