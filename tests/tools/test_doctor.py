"""`megatron-prune doctor` says what is there, and works where nothing is."""

import re
from importlib.util import find_spec

import pytest

from megatron_prune.commands import examine, main


def test_it_names_versions_devices_and_what_features_lack(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for word in ("megatron_prune", "megatron-core 0.", "torch 2", "cores", "GPU", "engine", "memory", "disk", "Slurm"):
        assert word in told
    rows = dict(reversed(line.split(maxsplit=1)) for line in told.split("\n\n")[1].splitlines())
    assert rows["training, pruning, export"] == "ok"
    plot = next(state for feature, state in rows.items() if feature.startswith("figures"))
    assert plot == ("missing" if find_spec("matplotlib") is None else "ok")


@pytest.mark.parametrize("absent", [("torch", "megatron", "megatron.core"), ("plotly",), ("megatron.core",)])
def test_what_is_missing_is_named_with_what_brings_it(absent, capsys, monkeypatch):
    monkeypatch.setattr(examine, "find_spec", lambda name: None if name in absent else find_spec(name))
    is_core = "plotly" not in absent
    assert main(["doctor"]) == (1 if is_core else 0)
    told = capsys.readouterr().out
    brings = "make install" if is_core else re.escape("pip install 'megatron-prune[report]'")
    assert re.search(rf"^missing .*{absent[-1]}.*{brings}", told, re.MULTILINE), told
