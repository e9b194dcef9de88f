"""The study of what MoL can represent, on small matrices."""

from pathlib import Path

import pytest
import torch

from jobs import study
from jobs.studies.models import approximation


def test_a_dot_product_fits_what_has_its_rank_and_leaves_the_rest():
    few = approximation.make_matrix("8")
    assert approximation.best_dot_product(few) == pytest.approx(0.0, abs=1e-9)
    identity = approximation.make_matrix(approximation.IDENTITY)
    assert identity.abs().max().item() == pytest.approx(approximation.LARGEST)
    # 127 singular values are the same; that of the constant vector is 0.
    assert approximation.best_dot_product(identity) == pytest.approx(1 - 16 / 127, abs=1e-6)


@pytest.mark.slow
def test_every_matrix_has_a_line_and_more_pairs_fit_better(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install 'nightrails[bench]'")
    monkeypatch.setattr(approximation, "NUM_QUERIES", 24)
    monkeypatch.setattr(approximation, "RANKS", (20,))
    monkeypatch.setattr(approximation, "COMPONENTS", (1, 4))
    threads = torch.get_num_threads()
    study.main(["approximation", "--folder", str(tmp_path), "--steps", "300"])
    torch.set_num_threads(threads)
    table = capsys.readouterr().out
    assert (tmp_path / "approximation.md").read_text().endswith(f"\n\n{table}")
    assert (tmp_path / "approximation.svg").read_text().startswith("<?xml")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["20", "identity"]
    for _, _, one, sixteen in rows:
        assert float(sixteen) < float(one) < 1.0
