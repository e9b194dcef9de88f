import pytest
import torch

from pipeline.model.dropout import dropout, keep_mask


@pytest.mark.parametrize(("rate", "kept"), [(0.25, 4.0), (0.75, 12.0)])
def test_entries_are_zeroed_at_the_rate_and_the_others_grow_so_that_the_mean_stays(rate, kept):
    torch.manual_seed(0)
    values = dropout(torch.full((2_000, 2_001), 3.0), rate, is_training=True)
    assert values.unique().tolist() == [0.0, kept]
    assert (values == 0).double().mean().item() == pytest.approx(rate, abs=0.001)


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
