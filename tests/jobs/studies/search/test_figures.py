"""The studies of the search on an untrained world of the smallest size."""

import json
import sys
from pathlib import Path

import pytest

from jobs import study
from jobs.studies.search import methods, scaling

SMALL = ["--world", "synthetic", "--num-items", "6000", "--num-sample", "128", "--ranks", "16"]


def test_a_missing_faiss_is_named_at_once_and_not_after_minutes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit, match="study search: faiss is not installed; `make bench` installs it"):
        study.main(["search", *SMALL])


@pytest.mark.slow
def test_the_search_is_exact_enough_and_every_figure_is_in_the_last_line(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("faiss", reason="pip install 'nightrails[bench]'")
    study.main(["search", *SMALL, "--k", "20", "--rounds", "1", "--target", "0.9"])
    rows = {row["figure"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["best: recall, k = 20"]["holds"]
    for part in ("CombTopK", "brute force", "stage 1 top-1000", "bf16 peak", "threads", "history excluded", "tables"):
        assert any(part in figure for figure in rows)


@pytest.mark.slow
def test_all_methods_are_compared_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("faiss", reason="pip install 'nightrails[bench]'")
    pytest.importorskip("matplotlib", reason="pip install 'nightrails[bench]'")
    monkeypatch.setattr(methods, "NATIVE_QUERIES", 16)
    study.main(["methods", *SMALL, "--folder", str(tmp_path)])
    results = json.loads((tmp_path / "synthetic-6000.json").read_text())
    recall = {(result["backend"], result["method"]): result["recall"]["200"] for result in results}
    for backend in ("native", "torch"):
        assert recall[backend, "exact"] > 0.999
        assert recall[backend, "exact two-stage"] > 0.999
    assert recall["native", "TopKAvg 200"] < recall["native", "TopKAvg 4000"] <= 1
    assert 0 < recall["faiss", "IndexFlatIP"] == pytest.approx(recall["native", "TopKAvg 200"], abs=0.01)
    assert (tmp_path / "synthetic-6000.svg").stat().st_size > 1_000


@pytest.mark.slow
def test_times_are_measured_for_every_number_that_is_changed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "NUM_QUERIES", 16)
    monkeypatch.setattr(scaling, "CALLS", (1, 4))
    study.main(["scaling", "--num-items", "6000", "12000"])
    changed = [line[:22].strip() for line in capsys.readouterr().out.splitlines()]
    assert [changed.count(name) for name in ("queries of one call", "k", "candidates K'")] == [2, 4, 6]
    assert [changed.count(name) for name in ("pairs P", "pairs P, exact", "items N", "items N, exact")] == [4, 4, 2, 2]
