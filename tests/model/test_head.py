import pytest
import torch

from pipeline.model.head import head_gradients
from pipeline.model.losses import sampled_softmax_loss

T, M, B, D, TEMPERATURE = 12, 7, 3, 4, 0.1


@pytest.mark.parametrize("num_groups", [1, 3, T])
def test_the_gradients_are_those_of_autograd(num_groups):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [draw(T, D).requires_grad_(), draw(T, D).requires_grad_(), draw(M, D).requires_grad_()]
    queries_TD, positives_TD, items_MD = inputs
    corrections_M, weights_T = draw(M), draw(T).abs()
    is_own_BM = torch.rand((B, M), generator=generator) < 0.3
    is_own_BM[2] = True  # a user who has all the negatives
    sequences_T, rows_M = torch.arange(T) % B, torch.arange(M) * 2
    targets_T = torch.randint(2 * M, (T,), generator=generator)  # half of them are not among the negatives
    is_left_out_TM = is_own_BM[sequences_T] | (rows_M == targets_T[:, None])
    positive_T = (queries_TD * positives_TD).sum(dim=1) / TEMPERATURE
    scores_TM = queries_TD @ items_MD.T / TEMPERATURE + corrections_M
    loss = (sampled_softmax_loss(positive_T, scores_TM, is_left_out_TM) * weights_T).sum()
    loss.backward()
    found = head_gradients(
        *(part.detach() for part in inputs), corrections_M, rows_M, is_own_BM, targets_T, sequences_T, weights_T,
        TEMPERATURE, num_groups,
    )  # fmt: skip
    assert found.loss_sum == pytest.approx(loss.item())
    for gradient, part in zip((found.queries_TD, found.positives_TD, found.items_MD), inputs, strict=True):
        torch.testing.assert_close(gradient, part.grad)
    shares_TM = torch.cat([positive_T[:, None], scores_TM.masked_fill(is_left_out_TM, -torch.inf)], dim=1)
    demand_TM = shares_TM.softmax(dim=1)[:, 1:] * weights_T[:, None]
    demand_GM = demand_TM.view(num_groups, -1, M).sum(dim=1).detach() / TEMPERATURE
    torch.testing.assert_close(found.demand_GM, demand_GM)
    assert not found.queries_TD[2].any(), "nobody to be told apart from"
