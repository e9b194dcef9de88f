"""The studies of settings, on a tiny log."""

from pathlib import Path

import pytest
import torch

from jobs import study
from jobs.studies.settings import adds, balance, pairs, variants
from pipeline.settings import Settings

SMALL = {
    "simulate.num_users": 80,
    "simulate.num_items": 60,
    "simulate.num_events": 2_000,
    "model.dim": 16,
    "model.mol.component_dim": 8,
    "train.num_negatives": 16,
    "train.max_epochs": 1,
    "search.k": 10,
    "corpus.low_rank.ranks": "[4]",
}


@pytest.mark.parametrize("module", [adds, balance, pairs], ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_variant_is_a_valid_night_and_differs_from_the_others(module, tmp_path):
    made = [variants.settings_of(tmp_path, keys, None, []) for keys in module.STUDY.variants.values()]
    assert all(isinstance(each, Settings) for each in made)
    assert len({each.model_dump_json() for each in made}) == len(made) > 4
    assert module.STUDY.picture.keys() <= variants.Result.model_fields.keys()


@pytest.mark.slow
def test_each_variant_has_a_line_and_nothing_is_done_twice(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'nightrails[bench]'")
    first_and_last = dict(list(balance.STUDY.variants.items())[::4])
    monkeypatch.setattr(balance, "STUDY", variants.Study("balance", first_and_last, balance.STUDY.picture))
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    words = ["balance", "--root", str(tmp_path), "--folder", str(tmp_path / "out"), *sets]
    threads = torch.get_num_threads()
    study.main(words)
    table = capsys.readouterr().out
    page = (tmp_path / "out" / "balance.md").read_text()
    assert page.endswith(f"\n\n{table}")
    assert "a simulated log of 80 users, 60 items and 2,000 events; one thread of" in page
    assert (tmp_path / "out" / "balance.svg").read_text().startswith("<?xml")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert [row[0] for row in rows[2:]] == ["α = 0", "α = 0.1"]
    for row in rows[2:]:
        values = dict(zip(rows[0], row, strict=True))
        assert values["of"] == "32"
        assert 1 <= float(values["pairs in use"]) <= 32
        assert float(values["exact, ms"]) > 0
    monkeypatch.setattr(variants.train, "run", None)
    study.main(words)
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == table
