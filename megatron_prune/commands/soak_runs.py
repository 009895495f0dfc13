"""Kill runs at random moments, for as long as you like: `make soak`, or

    megatron-prune soak --dir DIR [--kills N] [--minutes M] [--seed S]

Goes on where an earlier call with the same DIR stopped, and stops after N kills in all or M minutes of this call. What
is checked, and on which layouts, stands in megatron_prune/testing/benchmarks/soak.py. Exit status 1 when anything was
lost.
"""

import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.pretrain import main as pretrain
from megatron_prune.reading import read_words
from megatron_prune.runtime.folders import replace_file
from megatron_prune.testing.benchmarks.soak import VARIANTS, Attempt, Soak, SoakError

RECORD = "soak.json"


@dataclass(frozen=True)
class SoakOptions:
    """The command's options."""

    dir: str = option(None, "keeps the chains and the count between calls", metavar="DIR", required=True)
    kills: int = option(200, "stop after these many in all", at_least=1)
    minutes: float = option(60.0, "stop after these many in this call", above=0)
    seed: int = option(1, "of the kill points")


def soak(arguments: SoakOptions) -> dict[str, Any]:
    """Attempt after attempt; the record at the end. Raises SoakError."""
    folder, end = Path(arguments.dir), time.monotonic() + 60 * arguments.minutes
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"kills": 0, "attempts": 0, "chains": 0, "seconds": 0.0, "moments": {}, "variant": 0}
    record |= {"refused": 0, "layouts": {}}
    if (folder / RECORD).exists():
        try:
            record |= json.loads(read_words(folder / RECORD))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"--dir {folder}: {RECORD} is damaged; remove it to begin a new count") from error
    soaks = [Soak(folder / variant.name, variant, pretrain) for variant in VARIANTS]
    with tqdm(total=arguments.kills, initial=record["kills"], unit="kill", dynamic_ncols=True) as bar:
        while record["kills"] < arguments.kills and time.monotonic() < end:
            one = soaks[record["variant"] % len(soaks)]
            one.uninterrupted()
            attempt = _attempt(one, random.Random(arguments.seed * 10**6 + record["attempts"]))
            bar.set_postfix_str(f"chain {record['chains'] + 1} ({one.variant.name}): {attempt.kill}"[:70])
            if attempt.is_finished:
                one.close_chain()
            _count(record, attempt)
            bar.update(int(attempt.was_killed))
            replace_file(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return record


def _attempt(one: Soak, generator: random.Random) -> Attempt:
    """One time in eight it is the launcher that dies, under the real torchrun."""
    if generator.random() < 1 / 8:
        return one.kill_launcher(*one.draw_launcher(generator))
    return one.attempt(*one.draw(generator))


def _count(record: dict[str, Any], attempt: Attempt) -> None:
    record["attempts"] += 1
    record["seconds"] += attempt.seconds
    record["kills"] += int(attempt.was_killed)
    record["refused"] += int(attempt.was_refused)
    if attempt.layout:
        record["layouts"] = dict(Counter(record["layouts"]) + Counter({attempt.layout: 1}))
    if attempt.is_finished:
        record["chains"] += 1
        record["variant"] += 1
    if attempt.was_killed and attempt.kill is not None:
        moments = Counter(record["moments"])
        moments[attempt.kill.moment or "at any time"] += 1
        record["moments"] = dict(sorted(moments.items()))


def kill_runs(arguments: SoakOptions) -> int:
    """Soak and print what happened; the exit status."""
    try:
        record = soak(arguments)
    except SoakError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"soak: {record['kills']} kills in {record['attempts']} runs, {record['chains']} chains ended as if alone")
    print(f"  {record['refused']:4d} second starters refused, {len(record['layouts'])} layouts")
    for moment, kills in record["moments"].items():
        print(f"  {kills:4d} {moment}")
    return 0


main = partial(run_command, "soak", SoakOptions, kill_runs)
