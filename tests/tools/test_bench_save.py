"""megatron-prune bench-save: a row per layout, and nothing left where it wrote."""

import pytest

from megatron_prune.commands import bench_save


@pytest.mark.full
@pytest.mark.timeout(300)
def test_every_layout_has_its_row(tmp_path, capsys):
    assert bench_save.main(["--tiny", "--pairs", "2", "--dir", str(tmp_path)]) == 0
    header, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [name.strip() for name in header.split("|")[2:-1]]
    assert [line.split("|")[1].strip() for line in lines] == [layout.name for layout in bench_save.LAYOUTS]
    for line in lines:
        found = dict(zip(names, map(float, line.split("|")[2:-1]), strict=True))
        assert all(value > 0 for value in found.values()), line
        assert 1.5 < found["MB"] < 2.5, "about 160,000 parameters, three numbers each"
    assert list(tmp_path.iterdir()) == []
