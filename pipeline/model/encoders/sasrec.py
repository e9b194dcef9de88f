"""SASRec (Kang & McAuley, arXiv 1808.09781): a causal transformer over a user's events, here with pre-norm blocks.

Shapes: B sequences, L positions, E embedding.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.lists import EventColumn
from pipeline.model.dropout import dropout
from pipeline.model.inputs import Events
from pipeline.settings import ModelSettings

FINAL_NORM_EPS = 1e-6


class SasRec(nn.Module):
    """An `Encoder` that reads the items and their order alone."""

    reads: frozenset[EventColumn] = frozenset()

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.positions = nn.Embedding(settings.max_length, settings.dim)
        self.blocks = nn.ModuleList(SasRecBlock(settings) for _ in range(settings.num_blocks))
        # Without affine parameters: the similarity reads a query of fixed norm.
        self.norm = nn.LayerNorm(settings.dim, eps=FINAL_NORM_EPS, elementwise_affine=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.positions.weight, std=0.02, a=-0.04, b=0.04)

    def forward(self, items_BLE: Tensor, events: Events) -> Tensor:
        """(B, L, E) queries. Padding is at the right, so that the causal mask alone hides it from every event."""
        length = items_BLE.shape[1]
        hidden_BLE = items_BLE * self.settings.dim**0.5 + self.positions.weight[:length]
        hidden_BLE = dropout(hidden_BLE, self.settings.dropout, self.training) * events.is_event_BL.unsqueeze(-1)
        for block in self.blocks:
            hidden_BLE = block(hidden_BLE)
        queries_BLE: Tensor = self.norm(hidden_BLE)
        return queries_BLE


class SasRecBlock(nn.Module):
    """Causal self-attention, then a feed-forward network; each reads a normalised input and adds to the raw one."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        dim = settings.dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention_in = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, settings.ffn_dim)
        self.ffn_out = nn.Linear(settings.ffn_dim, dim)
        for linear in (self.attention_in, self.attention_out, self.ffn_in, self.ffn_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_BLE: Tensor) -> Tensor:
        attended_BLE = self._attend(self.attention_norm(hidden_BLE))
        middle_BLE = hidden_BLE + dropout(attended_BLE, self.settings.dropout, self.training)
        raised = dropout(F.relu(self.ffn_in(self.ffn_norm(middle_BLE))), self.settings.dropout, self.training)
        return middle_BLE + dropout(self.ffn_out(raised), self.settings.dropout, self.training)

    def _attend(self, inputs_BLE: Tensor) -> Tensor:
        heads = self.attention_in(inputs_BLE).unflatten(-1, (3, self.settings.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # No dropout on the attention weights: it would make torch write out the (L, L) weights of every head.
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        outputs_BLE: Tensor = self.attention_out(attended.transpose(1, 2).flatten(-2))
        return outputs_BLE
