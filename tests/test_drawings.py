"""The drawings of docs/design.md show the code as it is."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def drawings():
    spec = importlib.util.spec_from_file_location("draw_design", DOCS / "draw_design.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DRAWINGS


@pytest.mark.parametrize("name", drawings())
def test_a_drawing_is_what_the_code_gives_now(name):
    made = drawings()[name]()
    assert (DOCS / name).read_text() == made, f"run: python docs/draw_design.py (docs/{name} is of another day)"
    assert name in (DOCS / "design.md").read_text(), "nobody would see it"
