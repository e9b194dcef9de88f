import pytest
import torch

from pipeline.model.dropout import dropout, keep_mask


def test_a_quarter_of_the_entries_is_zeroed_and_the_others_grow_by_a_third():
    """64 of the 256 values of a byte are dropped: the mean stays."""
    torch.manual_seed(0)
    values = dropout(torch.full((400, 501), 3.0), 0.25, is_training=True)
    assert values.unique().tolist() == [0.0, 4.0]
    assert (values == 0).double().mean().item() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(("rate", "is_training"), [(0.25, False), (0.0, True), (0.001, True)])
def test_without_training_or_at_a_rate_that_rounds_to_zero_nothing_is_drawn_or_changed(rate, is_training):
    values = torch.ones(1_000)
    before = torch.get_rng_state()
    assert dropout(values, rate, is_training) is values
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mask_of_zeros_and_ones_has_the_shape_and_type_of_its_values(dtype):
    mask = keep_mask(torch.empty(3, 7, dtype=dtype), 0.5)
    assert (mask.shape, mask.dtype) == ((3, 7), dtype)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
