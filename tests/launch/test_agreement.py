"""Ranks that must not train together: other configuration, other code, or a rank that cannot even begin."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_prune.errors import UserError
from megatron_prune.runtime.agreement import RankFacts, code_version, consult, insist, libraries, own_facts, verdict
from megatron_prune.testing.helpers.ranks import free_port

GOOD = RankFacts(None, "training:\n  seed: 1\n  lr: 2\n", "0.1.0+aaaa")


def test_all_alike_is_fine():
    assert verdict([GOOD] * 4) is None


def test_the_first_difference_is_named():
    other = RankFacts(None, GOOD.config.replace("seed: 1", "seed: 2"), GOOD.code)
    assert verdict([GOOD, GOOD, other, other]) == (
        'configuration: ranks 2, 3 read "seed: 2" where rank 0 has "seed: 1"; give all nodes the same file and flags'
    )
    assert "another length" in verdict([GOOD, RankFacts(None, GOOD.config + "  more: 1\n", GOOD.code)])


def test_other_code_is_named_before_other_configuration():
    old = RankFacts(None, "", "0.1.0+bbbb")
    assert verdict([GOOD, old]).startswith("code: megatron_prune on rank 1 is not what rank 0 runs (0.1.0+bbbb")


def test_complaints_of_some_say_whose():
    assert verdict([RankFacts("cannot read run.yaml")] * 2) == "cannot read run.yaml"
    assert verdict([GOOD, RankFacts("cannot read run.yaml")]) == "cannot read run.yaml (on rank 1 only)"


def test_own_facts_hold_the_complaint():
    def fails():
        raise UserError("no such file")

    assert own_facts(fails) == RankFacts("no such file")
    found = own_facts(lambda: "x: 1")
    assert (found.config, found.code) == ("x: 1", code_version()) and found.code.startswith("0.")


def test_over_a_mesh_too(monkeypatch):
    """Runs that skip the launcher compare once they have a process group."""
    from megatron_prune.config import Config, dump
    from megatron_prune.runtime import mesh

    others = [RankFacts(None, dump(Config()), code_version(), libraries())]
    monkeypatch.setattr(mesh, "agree", lambda _mesh, own: [own, *others])
    insist(None, Config())
    others.append(RankFacts(None, dump(Config()), "0.0.1+old"))
    with pytest.raises(UserError, match=r"code: megatron_prune on rank 2 is not what rank 0 runs \(0.0.1\+old"):
        insist(None, Config())


def together(*facts, plan=lambda: {"train": None}):
    """What each rank gets; the ranks are threads here."""
    environ, stores = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}, []

    def one(rank):
        def only_rank_0():
            assert rank == 0
            return plan()

        try:
            told, store = consult(rank, len(facts), facts[rank], only_rank_0, environ, minutes=0.5)
            stores.append(store)  # rank 0's serves the others until it goes
            return told
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, range(len(facts))))


def test_everybody_gets_rank_0s_plan():
    assert together(GOOD, GOOD, GOOD) == [{"train": None}] * 3


def test_everybody_stops_with_the_same_words():
    told = together(GOOD, RankFacts("cannot read run.yaml"))
    assert told == ["cannot read run.yaml (on rank 1 only)"] * 2

    def refuses():
        raise UserError("nothing to export")

    assert together(GOOD, GOOD, plan=refuses) == ["nothing to export"] * 2


def test_a_rank_that_never_comes_is_said_so():
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(UserError, match="rank 0 could not meet the other 1 ranks at 127.0.0.1"):
        consult(0, 2, GOOD, dict, environ, minutes=0.02)
