"""Wrong configurations, hundreds in one go, each as a process of its own:

    python -m tests.launch.sweep FOLDER [COUNT [FIRST [MINUTES]]]

Each is drawn from a seed, tried by the dry run and then run for one step at most. What both may come to: `problems`.
This process imports what a run imports and forks for every one of them, so that each has a status, an output and an end
of its own, and takes a second. Exit status 1 when one of them is not refused in one line, or leaves something behind.
"""

import collections
import importlib
import os
import random
import sys
import time
import warnings
from pathlib import Path

import yaml

from megatron_prune.pretrain import main
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.wrong_use import Shop, files, folder_of, forked, is_affordable, unlikely_flags, wrong_flags, wrong_yaml

_ONLY_BEFORE_A_JOB = ("(--eval-tasks)", "(--eval-data-path)")  # read by the launcher's stages, and so by the dry run
_ONLY_HERE = ("not here", "the launch will refuse", "no CUDA device")  # a dry run may be on another machine
_IMPORTED = ("launch.assembly.assemble", "launch.estimate.dry_run", "launch.assembly.watch", "data.tokenizer_library")


def drawn(seed, shop):
    """A configuration file in an empty room, and the words that run it."""
    generator, room = random.Random(seed), folder_of(shop.folder / "room")
    configuration, how = shop.configuration(room / "run"), seed % 3
    text = wrong_yaml(generator, configuration) if how == 0 else yaml.safe_dump(configuration)
    (room / "run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    more = wrong_flags(generator) if how == 1 else unlikely_flags(generator, shop) if how == 2 else []
    return ["--config", room / "run.yaml", *more]


def problems(words, shop, run):
    """What must not be, in words.

    Args:
        run: words -> Outcome.
    """
    before = files(shop.folder)
    dry = run([*words, "--dry-run"])
    yield from dry.problems()
    if files(shop.folder) != before:
        yield "the dry run wrote something"
    if dry.status == 0 and not is_affordable(words):
        return
    real = run(words)
    yield from real.problems()
    if real.status == 2 and files(shop.folder) != before:
        yield "a run that was refused wrote something"
    if dry.status == 2 and real.status == 0 and not any(field in dry.output for field in _ONLY_BEFORE_A_JOB):
        yield f"only the dry run refused: {dry.errors}"
    if dry.status == 0 and real.status == 2 and not any(text in dry.output + real.output for text in _ONLY_HERE):
        yield f"the dry run accepted it: {real.errors}"


def sweep(folder, count=900, first=0, minutes=60.0):
    """Try `count` of them, as far as the time goes; the number of those that came to something else."""
    warnings.filterwarnings("ignore")
    shop, ends, wrong = Shop(folder / "shop"), collections.Counter(), 0
    os.chdir(folder_of(folder / "shop"))  # folders that they name may be taken from here
    prepare(shop.tiny.folder)
    if forked(main, shop.tiny.arguments(shop.run, "--save-interval", 10), folder / "output").status != 0:
        sys.exit((folder / "output").read_text())
    for name in _IMPORTED:
        importlib.import_module(f"megatron_prune.{name}")

    def run(words):
        ended = forked(main, [*words, "--exit-interval", "1"], folder / "output")
        ends["dry run" if "--dry-run" in words else "run", ended.status] += 1
        return ended

    begin, tried = time.monotonic(), 0
    for seed in range(first, first + count):
        if time.monotonic() - begin > 60 * minutes:
            break
        words = drawn(seed, shop)
        told, tried = list(problems(words, shop, run)), tried + 1
        if told:
            wrong += 1
            print(f"{seed}: {told} {' '.join(str(word)[:100] for word in words)}", flush=True)
    told = ", ".join(f"{number} {how} with status {status}" for (how, status), number in sorted(ends.items()))
    print(f"{tried} wrong configurations, {wrong} came to what they must not: {told}; {time.monotonic() - begin:.0f} s")
    return wrong


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    kinds = (int, int, float)
    sys.exit(1 if sweep(place, *(kind(word) for kind, word in zip(kinds, sys.argv[2:], strict=False))) else 0)
