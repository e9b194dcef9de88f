"""AdamW (Kingma & Ba 2015, Loshchilov & Hutter 2019) for a model whose table of items is far larger than what a step
reads of it.

A step touches the rows of the table that it has a gradient for, and no others. Adam would move the others too, by their
fading momentum: what a row has missed is made up for when it is next touched, and by `settle`. With gradients of zero
the momentum fades by β₁ a step and the root of the second moment by √β₂, so K missed steps are a geometric series with
r = β₁ / √β₂. Weight decay keeps the share d of a weight each step, so together they make of a weight w

    w · d^K - rate · momentum / √second moment · (r d^(K-1) + r² d^(K-2) + … + r^K)

Two things differ from Adam to the letter: the rate and the bias corrections of missed steps are those of now, and the ε
of the missed steps fades as the second moment does. The momentum of a row fades to nothing: after `FADED_STEPS` steps
without a gradient, `settle` leaves a row alone that has no decay to make up for.

Shapes: V rows of the table, R rows of a step, E embedding.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.model.model import RetrievalModel
from pipeline.settings import TrainSettings

BETA1, BETA2 = 0.9, 0.98
EPSILON = 1e-8
RATIO = BETA1 / BETA2**0.5  # r
FADED_STEPS = 200  # β₁ to the power of that is 7e-10: what is left of a momentum
ROWS_AT_ONCE = 16_384  # of the table, when it is settled: what they need fits the processor's cache


class Optimiser:
    """Adam for all weights of a model."""

    def __init__(self, model: RetrievalModel, settings: TrainSettings) -> None:
        self.table = RowAdam(model.item_embedding.weight, settings.weight_decay)
        others = [weight for weight in model.parameters() if weight is not model.item_embedding.weight]
        self.others = torch.optim.AdamW(
            others, settings.learning_rate, (BETA1, BETA2), EPSILON, settings.weight_decay, fused=True
        )

    def zero_grad(self) -> None:
        self.table.weight_VE.grad = None
        self.others.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Move the weights by their gradients, at this learning rate. The table's gradient is sparse and coalesced."""
        for group in self.others.param_groups:
            group["lr"] = rate
        self.others.step()
        self.table.step(rate)

    def settle(self) -> None:
        """Make up for the steps that rows of the table have missed."""
        self.table.settle()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The name and value of each tensor of the state, for `load`."""
        for index, moments in self.others.state_dict()["state"].items():
            yield from ((f"{index}.{name}", value) for name, value in moments.items())
        yield from ((f"table.{name}", value) for name, value in self.table.state.items())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the state of an optimiser of the same model."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            owner, _, moment = name.partition(".")
            if owner == "table":
                self.table.state[moment].copy_(value)
            else:
                moments.setdefault(int(owner), {})[moment] = value
        self.others.load_state_dict(self.others.state_dict() | {"state": moments})


class RowAdam:
    """Adam for one table."""

    def __init__(self, weight_VE: Tensor, weight_decay: float) -> None:
        self.weight_VE, self._decay = weight_VE, weight_decay
        self.state = {
            "momentum": torch.zeros_like(weight_VE, requires_grad=False),
            "second_moment": torch.zeros_like(weight_VE, requires_grad=False),
            "settled_at": torch.zeros(len(weight_VE), dtype=torch.int64, device=weight_VE.device),
            "touched_at": torch.full((len(weight_VE),), -FADED_STEPS, device=weight_VE.device),
            "rate": torch.zeros((), dtype=torch.float64),  # of the last step
            "step": torch.zeros((), dtype=torch.int64),
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the rows that have a gradient."""
        gradient = self.weight_VE.grad
        assert gradient is not None, "a step comes after a backward pass"
        rows_R, gradient_RE = gradient.indices()[0], gradient.values()
        self.state["rate"].fill_(rate)
        weight_RE, momentum_RE, second_RE = self._caught_up(rows_R)
        self.state["step"] += 1
        weight_RE *= 1.0 - rate * self._decay
        momentum_RE.lerp_(gradient_RE, 1.0 - BETA1)
        second_RE.mul_(BETA2).addcmul_(gradient_RE, gradient_RE, value=1.0 - BETA2)
        weight_RE -= self._rate() * momentum_RE / (second_RE.sqrt() + self._epsilon())
        self._put(rows_R, weight_RE, momentum_RE, second_RE)
        self.state["touched_at"].index_fill_(0, rows_R, int(self.state["step"]))

    @torch.no_grad()
    def settle(self) -> None:
        """Make up for the missed steps of all rows."""
        is_late_V = self.state["settled_at"] < self.state["step"]
        if not self._decay:
            is_late_V &= self.state["settled_at"] - self.state["touched_at"] < FADED_STEPS
        for rows_R in is_late_V.nonzero()[:, 0].split(ROWS_AT_ONCE):
            self._put(rows_R, *self._caught_up(rows_R))

    def _caught_up(self, rows_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R, E) weights, momentum and second moment, as after the last step."""
        weight_RE, momentum_RE, second_RE = (
            self.weight_VE[rows_R],
            *(self.state[name][rows_R] for name in ("momentum", "second_moment")),
        )
        missed_R1 = (self.state["step"] - self.state["settled_at"][rows_R]).unsqueeze(1).to(weight_RE.dtype)
        if not self.state["step"]:
            return weight_RE, momentum_RE, second_RE
        kept = 1.0 - float(self.state["rate"]) * self._decay
        series_R1 = RATIO * (kept**missed_R1 - RATIO**missed_R1) / (kept - RATIO)
        weight_RE *= kept**missed_R1
        weight_RE -= self._rate() * series_R1 * momentum_RE / (second_RE.sqrt() + self._epsilon())
        return weight_RE, momentum_RE * BETA1**missed_R1, second_RE * BETA2**missed_R1

    def _put(self, rows_R: Tensor, weight_RE: Tensor, momentum_RE: Tensor, second_RE: Tensor) -> None:
        self.weight_VE.index_copy_(0, rows_R, weight_RE)
        self.state["momentum"].index_copy_(0, rows_R, momentum_RE)
        self.state["second_moment"].index_copy_(0, rows_R, second_RE)
        self.state["settled_at"].index_fill_(0, rows_R, int(self.state["step"]))

    def _rate(self) -> float:
        """The learning rate with both bias corrections, after `step` steps."""
        step = int(self.state["step"])
        return float(self.state["rate"]) * math.sqrt(1.0 - BETA2**step) / (1.0 - BETA1**step)

    def _epsilon(self) -> float:
        """ε, with the bias correction of the second moment's root, which `_rate` has."""
        return EPSILON * math.sqrt(1.0 - BETA2 ** int(self.state["step"]))
