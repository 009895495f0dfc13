"""The measure behind docs/criteria_correlation.md."""

from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_script

PATH = Path(__file__).resolve().parents[2] / "examples" / "criteria_correlation.py"


@pytest.fixture(scope="module")
def study():
    return load_script(PATH)


def test_rank_correlation(study):
    rising = np.array([1.0, 2.0, 4.0, 8.0])
    assert study.spearman(rising, rising**3) == pytest.approx(1)
    assert study.spearman(rising, -rising) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over sqrt(4.5 x 5).
    assert study.spearman(np.array([1.0, 3.0, 3.0, 9.0]), rising) == pytest.approx(0.9**0.5)
    assert np.isnan(study.spearman(np.ones(4), rising)), "what does not vary has no rank"
