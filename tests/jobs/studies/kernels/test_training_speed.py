"""The study of a training step's speed, with few items and one round."""

import pytest

from jobs.studies.kernels import training_speed
from pipeline.native.loader import native_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_kernels().functions is None, reason="no kernels for this CPU"),
]


def test_every_backend_and_every_part_of_a_step_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(training_speed, "NUM_ITEMS", 300)
    training_speed.main([300], rounds=1)
    printed = capsys.readouterr().out
    for name in training_speed.BACKENDS:
        assert printed.count(f"  {name:15} ") == 2  # for 32 and for 64 pairs
    assert "300 items: a step takes" in printed
