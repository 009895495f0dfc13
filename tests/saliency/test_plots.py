"""What the picture of unit scores shows."""

import matplotlib.figure
import numpy as np
import pytest

from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.model.architecture import Architecture
from megatron_prune.saliency.plots import plot_scores
from megatron_prune.saliency.scores import UnitScores, score_length
from megatron_prune.testing.helpers.tiny_models import tiny_config


@pytest.mark.parametrize("sign", ["positive", "signed"])
def test_scores_are_drawn_with_their_signs(sign, tmp_path, monkeypatch):
    architecture = Architecture.full(shape_from_config(tiny_config()))
    vector = np.random.default_rng(0).normal(size=score_length(architecture))
    scores = UnitScores.from_vector(architecture, vector if sign == "signed" else np.abs(vector))
    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))
    )
    plot_scores({"some": scores}, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000
    heads, _, stem = drawn[0].axes[:3]
    (image,), (line,) = heads.get_images(), stem.get_lines()
    values = np.stack(next(scores.values[kind] for kind in scores.values if kind.name == "head"))
    shown = np.asarray(image.get_array())
    np.testing.assert_allclose(shown, values if sign == "signed" else np.log10(values))
    assert stem.get_yscale() == ("symlog" if sign == "signed" else "log")
    assert (np.asarray(line.get_ydata()).min() < 0) == (sign == "signed")
