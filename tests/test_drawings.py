"""The drawings of docs/design.md show the code as it is."""

from pathlib import Path

import pytest

from tests.scripts import load_script

DOCS = Path(__file__).resolve().parents[1] / "docs"


def drawings():
    return load_script(DOCS / "draw_design.py").DRAWINGS


@pytest.mark.parametrize("name", drawings())
def test_a_drawing_is_what_the_code_gives_now(name):
    made = drawings()[name]()
    assert (DOCS / name).read_text() == made, f"run: python docs/draw_design.py (docs/{name} is of another day)"
    assert name in (DOCS / "design.md").read_text(), "nobody would see it"
