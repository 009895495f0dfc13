"""Before ranks know each other: do all of them read the same configuration with the same code?

    RankFacts       what one rank brings: its complaint if it has one, its configuration, code, libraries and device
    first_complaint of all ranks, in one line that names them
    verdict         all ranks' facts -> what is wrong with them, or None   (pure)
    code_version    a digest of the package's sources
    insist          compare over a mesh
    consult         exchange facts and rank 0's plan over a key-value store, before any process group exists

What ranks read beside the configuration is compared once it is open: see `alike`.

A node with an older copy of the code or another config file does not fail: it trains something else. The exchange goes
over the store that torchrun's agent (or, without one, rank 0) keeps, so that even a rank that cannot read its
configuration takes part, and all of them stop together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.config import Config, dump
from megatron_prune.errors import UserError, first_line
from megatron_prune.runtime.rendezvous import keeps_store, not_met, open_store

if TYPE_CHECKING:  # launchers import this module, and they need no torch
    from megatron_prune.runtime.mesh import Mesh

_PREFIX = "megatron_prune/agreement"
_LIBRARIES = ("torch", "megatron-core", "numpy")  # those that compute or shuffle
# Of a launch: whoever meets at the same port by mistake does not read our facts.
_LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class RankFacts:
    """What one rank knows.

    Args:
        complaint: a UserError's text, or None.
        config: the effective configuration as YAML. code: see `code_version`.
        libraries: names and versions of those whose arithmetic or shuffles must agree.
        device: what this rank computes on, where it is known already.
    """

    complaint: str | None = None
    config: str = ""
    code: str = ""
    libraries: str = ""
    device: str = ""


def verdict(facts: Sequence[RankFacts]) -> str | None:
    """What is wrong, in one line; None when all ranks agree and none complains."""
    told = first_complaint([fact.complaint for fact in facts])
    if told is not None:
        return told
    others = [rank for rank, fact in enumerate(facts) if fact.code != facts[0].code]
    if others:
        return (
            f"code: megatron_prune on {ranks_named(others)} is not what rank 0 runs ({facts[others[0]].code} instead "
            f"of {facts[0].code}); bring all nodes to one version"
        )
    for name, mend in (
        ("libraries", "bring all nodes to one environment"),
        ("device", "set parallel.device (--device), or see why GPUs are not visible there"),
    ):
        values = [str(getattr(fact, name)) for fact in facts]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            return f"{name}: {ranks_named(others)} have {values[others[0]]} where rank 0 has {values[0]}; {mend}"
    others = [rank for rank, fact in enumerate(facts) if fact.config != facts[0].config]
    if others:
        return (
            f"configuration: {ranks_named(others)} read {_difference(facts[0].config, facts[others[0]].config)}; give "
            "all nodes the same file and flags"
        )
    return None


def first_complaint(complaints: Sequence[str | None]) -> str | None:
    """The first of all ranks' complaints, and which ranks have one unless all do; None where none has."""
    failed = [rank for rank, text in enumerate(complaints) if text is not None]
    if not failed:
        return None
    where = "" if len(failed) == len(complaints) else f" (on {ranks_named(failed)} only)"
    return f"{complaints[failed[0]]}{where}"


def ranks_named(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 1, 2, 3, 4, ...`."""
    shown = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _difference(ours: str, theirs: str) -> str:
    """The first line in which two configurations differ."""
    pairs = zip(ours.splitlines(), theirs.splitlines(), strict=False)
    for one, other in pairs:
        if one != other:
            return f'"{other.strip()}" where rank 0 has "{one.strip()}"'
    return "a configuration of another length than rank 0's"


def code_version() -> str:
    """Version and a digest of the sources of megatron_prune, as this rank sees them."""
    import megatron_prune

    root, total = Path(megatron_prune.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{megatron_prune.__version__}+{total.hexdigest()[:12]}"


def libraries() -> str:
    """`torch 2.13.0, ...`, as this rank has them."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} of an unknown version")
    return ", ".join(found)


def consult(
    rank: int,
    world_size: int,
    facts: RankFacts,
    plan: Callable[[], Any],
    environ: Mapping[str, str],
    minutes: float = 10,
    name: str = "job",
) -> tuple[Any, Any]:
    """Compare facts over all ranks; then everybody gets what rank 0 plans.

    Args:
        plan: called on rank 0 only, once all agree; returns something JSON can hold; may raise UserError.
        minutes: how long ranks may be late.
        name: of this consultation; a process may take part in several.

    Returns:
        (rank 0's plan, on every rank; the store, to be kept alive until the process ends: other ranks and
        torch.distributed may still use it).

    Raises:
        UserError: on every rank, with the same text: facts differ, a rank complains, or the plan failed.
        NotMetError: the ranks could not meet.
    """
    if world_size == 1:
        return _planned(_outcome([facts], plan)), None
    from torch.distributed import PrefixStore

    server = open_store(rank, world_size, environ, minutes)
    try:
        server.set_timeout(timedelta(minutes=minutes))
        launch = (environ.get(part, "") for part in _LAUNCH)
        store = PrefixStore("/".join([_PREFIX, name, *launch]), server)
        store.set(f"facts/{rank}", json.dumps(dataclasses.asdict(facts)))
        if rank == 0:
            everyone = [RankFacts(**json.loads(store.get(f"facts/{r}"))) for r in range(world_size)]
            store.set("outcome", json.dumps(_outcome(everyone, plan)))
        outcome = json.loads(store.get("outcome"))
        store.set(f"read/{rank}", "1")
        if keeps_store(rank, environ) and outcome["error"] is not None:
            store.wait([f"read/{r}" for r in range(world_size)], timedelta(seconds=30))
    except (RuntimeError, OSError) as error:
        raise not_met(rank, world_size, environ, minutes, first_line(error)) from error
    return _planned(outcome), store


def _outcome(facts: Sequence[RankFacts], plan: Callable[[], Any]) -> dict[str, Any]:
    error = verdict(facts)
    if error is None:
        try:
            return {"error": None, "plan": plan()}
        except UserError as refused:
            error = str(refused)
    return {"error": error, "plan": None}


def _planned(outcome: dict[str, Any]) -> Any:
    if outcome["error"] is not None:
        raise UserError(outcome["error"])
    return outcome["plan"]


def insist(mesh: Mesh, config: Config) -> None:
    """The same comparison once ranks have a process group. Raises UserError on all of them when they differ."""
    from megatron_prune.runtime.mesh import agree

    complaint = verdict(agree(mesh, own_facts(lambda: dump(config))))
    if complaint is not None:
        raise UserError(complaint)


def own_facts(read: Callable[[], str]) -> RankFacts:
    """This rank's facts; `read` returns its configuration as YAML or raises UserError."""
    try:
        return RankFacts(None, read(), code_version(), libraries())
    except UserError as error:
        return RankFacts(str(error))
