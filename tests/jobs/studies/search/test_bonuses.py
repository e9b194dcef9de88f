"""The study of what bonuses cost."""

import pytest
import torch

from jobs.studies.search import bonuses as study


@pytest.mark.slow
def test_there_is_a_line_for_each_search_and_number_of_bonuses(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(study, "NUM_TIMED", 4)
    monkeypatch.setattr(study, "NUM_JUDGES", 8)
    monkeypatch.setattr(study, "TUNING_SECONDS", 1)
    threads = torch.get_num_threads()
    study.main("synthetic", num_items=6_000, ranks=[16], num_sample=64, threads=1, k=10, target=0.9)
    torch.set_num_threads(threads)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("6,000 items in 4 shards, k 10; {'method':")
    assert [line.split(",", 1)[1].split(" bonuses")[0].strip() for line in lines] == ["0", "200", "1,000"] * 2
    assert all(float(line.split("bonuses")[1].split()[0]) > 0 for line in lines)
