import pytest
import torch

from pipeline.model import head
from pipeline.model.head import head_gradients
from pipeline.model.losses import sampled_softmax_loss

T, M, B, D, TEMPERATURE = 11, 7, 3, 4, 0.1


@pytest.mark.parametrize("tile_positions", [1, 4, 100])
def test_the_gradients_are_those_of_autograd(monkeypatch, tile_positions):
    monkeypatch.setattr(head, "TILE_POSITIONS", tile_positions)
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [draw(T, D).requires_grad_(), draw(T, D).requires_grad_(), draw(M, D).requires_grad_()]
    queries_TD, positives_TD, items_MD = inputs
    corrections_M, weights_T = draw(M), draw(T).abs()
    is_own_BM = torch.rand((B, M), generator=generator) < 0.3
    is_own_BM[2] = True  # a user who has all the negatives
    sequences_T = torch.arange(T) % B
    positive_T = (queries_TD * positives_TD).sum(dim=1) / TEMPERATURE
    scores_TM = queries_TD @ items_MD.T / TEMPERATURE + corrections_M
    loss = (sampled_softmax_loss(positive_T, scores_TM, is_own_BM[sequences_T]) * weights_T).sum()
    loss.backward()
    found = head_gradients(
        *(part.detach() for part in inputs), corrections_M, is_own_BM, sequences_T, weights_T, TEMPERATURE
    )
    assert found.loss_sum == pytest.approx(loss.item())
    for gradient, part in zip((found.queries_TD, found.positives_TD, found.items_MD), inputs, strict=True):
        torch.testing.assert_close(gradient, part.grad)
    assert not found.queries_TD[2].any(), "nobody to be told apart from"
