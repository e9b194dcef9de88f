"""LiGR (arXiv 2502.03417), the block of eSASRec (arXiv 2508.06450): a causal transformer whose sublayers are gated.

    h ← h + sigmoid(W h + b) ⊙ sublayer(norm(h))

for causal attention, then for a SwiGLU feed-forward network of width `ffn_dim`. The gate reads the raw h and not the
normalised one, as in eSASRec's public code. Reads the items and their order.

Shapes: B sequences, L positions, E embedding, H heads.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.lists import EventColumn
from pipeline.model.dropout import dropout
from pipeline.model.encoders.positions import EventEmbedding, distance_bias, later_events
from pipeline.model.inputs import Events
from pipeline.model.mol import GatedLinearUnit
from pipeline.settings import ModelSettings

FINAL_NORM_EPS = 1e-6


class Ligr(nn.Module):
    """An `Encoder` that reads the items and their order alone."""

    reads: frozenset[EventColumn] = frozenset()

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.embedding = EventEmbedding(settings)
        self.blocks = nn.ModuleList(LigrBlock(settings) for _ in range(settings.num_blocks))
        # Without affine parameters: the similarity reads a query of fixed norm.
        self.norm = nn.LayerNorm(settings.dim, eps=FINAL_NORM_EPS, elementwise_affine=False)

    def forward(self, items_BLE: Tensor, events: Events) -> Tensor:
        """(B, L, E) queries. Padding is at the right, so that the causal mask alone hides it from every event."""
        hidden_BLE = self.embedding(items_BLE)
        for block in self.blocks:
            hidden_BLE = block(hidden_BLE)
        queries_BLE: Tensor = self.norm(hidden_BLE)
        return queries_BLE


class LigrBlock(nn.Module):
    """Gated causal attention, then a gated feed-forward network."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        dim = settings.dim
        self.attention_norm = nn.LayerNorm(dim)
        self.attention_in = nn.Linear(dim, 3 * dim, bias=False)  # softmax would cancel a bias of the keys
        self.attention_out = nn.Linear(dim, dim)
        self.attention_gate = nn.Linear(dim, dim)
        self.distances = distance_bias(settings, settings.num_heads)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_hidden = GatedLinearUnit(dim, settings.ffn_dim, "swiglu")
        self.ffn_out = nn.Linear(settings.ffn_dim, dim)
        self.ffn_gate = nn.Linear(dim, dim)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, hidden_BLE: Tensor) -> Tensor:
        rate = self.settings.dropout
        attended_BLE = dropout(self._attend(self.attention_norm(hidden_BLE)), rate, self.training)
        middle_BLE = hidden_BLE + self.attention_gate(hidden_BLE).sigmoid() * attended_BLE
        raised = dropout(self.ffn_hidden(self.ffn_norm(middle_BLE)), rate, self.training)
        lowered_BLE = dropout(self.ffn_out(raised), rate, self.training)
        outputs_BLE: Tensor = middle_BLE + self.ffn_gate(middle_BLE).sigmoid() * lowered_BLE
        return outputs_BLE

    def _attend(self, inputs_BLE: Tensor) -> Tensor:
        queries, keys, values = (
            self.attention_in(inputs_BLE).unflatten(-1, (3, self.settings.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        if self.distances is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            length = inputs_BLE.shape[1]
            bias_HLL = self.distances(length).to(queries.dtype)
            bias_HLL = bias_HLL.masked_fill(later_events(length, bias_HLL.device), float("-inf"))
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias_HLL)
        outputs_BLE: Tensor = self.attention_out(attended.transpose(1, 2).flatten(-2))
        return outputs_BLE
