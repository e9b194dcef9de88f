"""The study of the cadence of training on three tiny nights."""

from pathlib import Path

import pytest

from jobs import study
from jobs.studies.models import cadence

SMALL = {
    "simulate.num_users": 60,
    "simulate.num_items": 60,
    "simulate.num_events": 2_000,
    "simulate.num_days": 10,
    "simulate.cold_share": 0.2,
    "model.dim": 16,
    "train.num_negatives": 16,
    "train.max_epochs": 1,
}


@pytest.mark.slow
def test_each_way_has_its_nights_in_the_table_and_nothing_is_done_twice(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'nightrails[bench]'")
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    words = ["cadence", "--root", str(tmp_path), "--folder", str(tmp_path / "out"), "--nights", "3", *sets]
    study.main(words)
    table = capsys.readouterr().out
    assert (tmp_path / "out" / "cadence.md").read_text().endswith(f"\n\n{table}")
    assert (tmp_path / "out" / "cadence.svg").read_text().startswith("<?xml")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    first, *others = (dict(zip(rows[0], row, strict=True)) for row in rows[2:5])
    for figure in ("HR@10", "MoL alone", "s"):
        assert first[f"scratch: {figure}"] == first[f"previous: {figure}"] == first[f"weekly: {figure}"]
    for night in others:
        assert int(night["new items"]) > 0
        assert float(night["scratch: epochs"]) == 1
        assert float(night["weekly: epochs"]) == 0
        assert float(night["weekly: s"]) < float(night["scratch: s"])
    monkeypatch.setattr(cadence.nightly_candidates, "run", None)
    study.main(words)
    assert capsys.readouterr().out == table
