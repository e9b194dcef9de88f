import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.retrieval.backends import planes

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127))


@given(st.lists(FINITE, min_size=1))
def test_two_planes_give_back_every_bit_and_the_high_one_is_the_nearest_bfloat16(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    high, low = planes.split(values)
    assert torch.equal(planes.join(high, low).view(torch.int32), values.view(torch.int32))
    rounded = planes.round_to_high(values)
    assert torch.equal(high.view(torch.bfloat16).float(), rounded)
    error, usual_error = (rounded - values).abs(), (values.bfloat16().float() - values).abs()
    assert torch.equal(error, usual_error)  # only which way halves go differs


def test_halves_are_rounded_away_from_zero():
    between = torch.tensor([1 + 2.0**-8, -1 - 2.0**-8])  # halfway between 1 and the next bfloat16
    assert planes.round_to_high(between).tolist() == [1 + 2.0**-7, -1 - 2.0**-7]
