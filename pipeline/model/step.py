"""One training step: sampled softmax over a positive and shared negatives, backward in tiles of pairs.

The pair network dwarfs the rest of the model (32 numbers per pair of a query and an item become 128 and 32 again), so
its intermediate results must not leave the processor's cache. Each tile of pairs therefore goes forward and backward
at once, down to the two sides; the rest of the model goes backward once, at the end. The tiles are PyTorch's, or those
of the native kernels (`train.backend`).

Shapes: T training positions = G groups of S, which share N negatives; B sequences, L positions, E embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batches import SequenceBatch
from pipeline.data.lists import Lists
from pipeline.model.backends import native_library
from pipeline.model.head import head_gradients
from pipeline.model.inputs import Events
from pipeline.model.losses import mutual_information_loss, sampled_softmax_loss, user_norm_loss
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.model.native.pairs import train_pairs
from pipeline.model.negatives import Demand, Negatives, is_left_out, is_own
from pipeline.settings import TrainSettings

TILE_PAIRS = {"cpu": 16_384, "cuda": 1_048_576}


@dataclass(frozen=True)
class Drawn:
    """The negatives of a step."""

    rows_GN: Tensor
    corrections_GN: Tensor  # added to their scores
    is_left_out_TN: Tensor  # whether one has no part in the loss of a position of its group


@dataclass(frozen=True)
class Head:
    """The dot-product head's part in a step: vectors of the two sides, the gradients of its loss with respect to them,
    and the demand that the hard negatives follow."""

    outputs: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()
    demand: Demand | None = None


@dataclass(frozen=True)
class Positions:
    """The batch's targets, cut into groups of one size: user by user for hard negatives, which then suit the users of
    the group; else shuffled.

    The last group may end in copies of the first position, which have weight 0.
    """

    is_target_BL: Tensor
    order_T: Tensor  # index of each position among the batch's targets, counted row by row
    rows_T: Tensor  # the item to predict
    weights_T: Tensor
    user_keys_T: Tensor
    sequences_T: Tensor  # the sequence of the batch that the position is in
    num_targets: int
    num_groups: int


@dataclass(frozen=True)
class StepSums:
    """What a batch adds to the sums of an epoch."""

    loss: Tensor  # sampled softmax loss of each target times its weight, summed
    weight: float  # of all targets
    num_targets: int


def accumulate_gradients(
    model: RetrievalModel, batch: SequenceBatch, sampler: Negatives, settings: TrainSettings
) -> StepSums:
    """Add the gradients of the loss, summed over the batch's targets by their weights, to those in the parameters.

    The regularisers have the weight of all targets; they and the head's loss are not in the sums that are returned.
    """
    device = model.device
    if not (batch.targets_BL >= 0).any():
        return StepSums(torch.zeros((), device=device), 0.0, 0)
    positions = _positions(batch, settings.positions_per_negatives, sampler.num_hard > 0, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        queries_TE = _encode_targets(model, batch, positions.is_target_BL)[positions.order_T]
        users_T = model.user_rows(positions.user_keys_T)
        query = model.mol.query_side(queries_TE, users_T)
        positives = model.item_side(positions.rows_T.unsqueeze(1))
        scores_T, gates_TP = _positive_pairs(model.mol, query, positives)
        regulariser = settings.mutual_information_weight * mutual_information_loss(gates_TP[: positions.num_targets])
        if users_T is not None:
            users_TD = model.mol.user_vectors(users_T[: positions.num_targets])
            regulariser = regulariser + settings.user_norm_weight * user_norm_loss(users_TD)
    head = _head(model, query, positives, positions, batch.own, sampler, settings)
    drawn = _draw(sampler, positions, head.demand, batch.own)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        negatives = model.item_side(drawn.rows_GN)
    per_position = [query.components_BQD, query.gate_BP, scores_T]
    per_group = [negatives.components_NXD, negatives.gate_NP]
    library = native_library(model.mol, settings)
    if library is None:
        loss_sum, gradients = _in_tiles(model.mol, positions, per_position, per_group, drawn, settings)
    else:
        loss_sum, gradients = train_pairs(
            library,
            model.mol,
            per_position,
            per_group,
            drawn.corrections_GN,
            drawn.is_left_out_TN,
            positions.weights_T,
        )
    weight = float(batch.weights_BL.sum(dtype="float64"))
    regulariser_sum = regulariser * weight
    torch.autograd.backward(
        [*per_position, *per_group, regulariser_sum, *head.outputs],
        [*gradients, torch.ones_like(regulariser_sum), *head.gradients],
    )
    return StepSums(loss_sum, weight, positions.num_targets)


def _encode_targets(model: RetrievalModel, batch: SequenceBatch, is_target_BL: Tensor) -> Tensor:
    """(T, E) queries at the targets, row by row.

    The sequences come longest first and are encoded in a few parts, each cut to its longest: so at most half of what
    the encoder computes is padding.
    """
    lengths = (batch.item_rows_BL >= 0).sum(axis=1)
    parts, first = [], 0
    while first < len(lengths):
        length = int(lengths[first])
        last = first + int((lengths[first:] > length // 2).sum())
        columns = {name: values_BL[first:last, :length] for name, values_BL in batch.columns.items()}
        events = Events.of(batch.item_rows_BL[first:last, :length], columns, model.device)
        parts.append(model.encode_positions(events)[is_target_BL[first:last, :length]])
        first = last
    return torch.cat(parts)


def _positions(batch: SequenceBatch, positions_per_negatives: int, by_user: bool, device: torch.device) -> Positions:
    targets_BL = torch.from_numpy(batch.targets_BL).to(device, torch.int64)
    is_target_BL = targets_BL >= 0
    targets_T = targets_BL[is_target_BL]
    num_targets = len(targets_T)
    num_groups = -(-num_targets // positions_per_negatives)
    missing = -num_targets % num_groups
    order_T = torch.arange(num_targets, device=device) if by_user else torch.randperm(num_targets, device=device)
    order_T = torch.cat([order_T, order_T[:1].expand(missing)])
    keys_BL = torch.from_numpy(batch.user_keys_B).to(device).unsqueeze(1).expand_as(targets_BL)
    weights_T = torch.from_numpy(batch.weights_BL).to(device)[is_target_BL][order_T]
    weights_T[num_targets:] = 0.0
    return Positions(
        is_target_BL,
        order_T,
        targets_T[order_T],
        weights_T,
        keys_BL[is_target_BL][order_T],
        is_target_BL.nonzero()[:, 0][order_T],
        num_targets,
        num_groups,
    )


def _draw(sampler: Negatives, positions: Positions, demand: Demand | None, own: Lists) -> Drawn:
    rows_GN = sampler.draw(positions.num_groups, demand)
    is_left_out_TN = is_left_out(rows_GN, own, positions.sequences_T, positions.rows_T)
    return Drawn(rows_GN, sampler.corrections(rows_GN, demand), is_left_out_TN)


def _positive_pairs(mol: MixtureOfLogits, query: QuerySide, positives: ItemSide) -> tuple[Tensor, Tensor]:
    """(T,) scores and (T, P) gates of each position with its own item."""
    pairs = mol.pairs(query.alone(), positives)
    return _at_least_float32(pairs.scores_BN.flatten()), _at_least_float32(pairs.gates_BNP.flatten(0, -2))


def _head(
    model: RetrievalModel,
    query: QuerySide,
    positives: ItemSide,
    positions: Positions,
    own: Lists,
    sampler: Negatives,
    settings: TrainSettings,
) -> Head:
    """The dot-product head's part in the step; nothing without a `head_weight`."""
    if not settings.head_weight:
        return Head()
    rows_M, corrections_M = sampler.for_head(settings.head_negatives)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        items_MD = model.mol.first_item_components(model.item_embedding(rows_M))
    outputs = (query.components_BQD[:, 0], positives.components_NXD[:, 0, 0], items_MD)
    queries_TD, positives_TD, detached_MD = (output.detach() for output in outputs)
    found = head_gradients(
        queries_TD,
        positives_TD,
        detached_MD,
        corrections_M,
        rows_M,
        is_own(rows_M.unsqueeze(0), own)[0],
        positions.rows_T,
        positions.sequences_T,
        positions.weights_T,
        model.mol.temperature,
        positions.num_groups,
    )
    pairs = zip((found.queries_TD, found.positives_TD, found.items_MD), outputs, strict=True)
    gradients = tuple((settings.head_weight * gradient).to(output.dtype) for gradient, output in pairs)
    return Head(outputs, gradients, Demand.of(rows_M, found.demand_GM) if sampler.num_hard else None)


def _in_tiles(
    mol: MixtureOfLogits,
    positions: Positions,
    per_position: list[Tensor],
    per_group: list[Tensor],
    drawn: Drawn,
    settings: TrainSettings,
) -> tuple[Tensor, list[Tensor]]:
    """The loss over all positions and its gradients with respect to `per_position` and `per_group`.

    `per_position` holds query components, query gate and the positive's score; `per_group` holds the negatives' item
    components and item gate. The gradients of the pair network are added to those in its parameters.
    """
    num_groups, num_negatives = drawn.rows_GN.shape
    by_group = [tensor.detach().view(num_groups, -1, *tensor.shape[1:]) for tensor in per_position]
    negatives = [tensor.detach() for tensor in per_group]
    gradients = [torch.zeros_like(tensor) for tensor in (*by_group, *negatives)]
    device = drawn.rows_GN.device
    weights_GS = positions.weights_T.view(num_groups, -1)
    is_left_out_GSN = drawn.is_left_out_TN.view(num_groups, -1, num_negatives)
    loss_sum = torch.zeros((), device=device)
    for groups, members in _tiles(num_groups, weights_GS.shape[1], num_negatives, TILE_PAIRS[device.type]):
        tile = [(groups, members)] * len(by_group) + [(groups, slice(None))] * len(negatives)
        leaves = [tensor[index].requires_grad_() for tensor, index in zip((*by_group, *negatives), tile, strict=True)]
        query_components, query_gate, positive_GS, item_components, item_gate = leaves
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            scores_GSN = mol(QuerySide(query_components, query_gate), ItemSide(item_components, item_gate))
        scores_GSN = _at_least_float32(scores_GSN)
        corrections_GN = drawn.corrections_GN[groups].unsqueeze(-2).to(scores_GSN.dtype)
        losses_GS = sampled_softmax_loss(positive_GS, scores_GSN + corrections_GN, is_left_out_GSN[groups, members])
        loss = (losses_GS * weights_GS[groups, members]).sum()
        loss.backward()
        loss_sum += loss.detach()
        for gradient, leaf, index in zip(gradients, leaves, tile, strict=True):
            assert leaf.grad is not None
            gradient[index] += leaf.grad
    return loss_sum, [*(gradient.flatten(0, 1) for gradient in gradients[:3]), *gradients[3:]]


def _tiles(
    num_groups: int, group_size: int, num_negatives: int, tile_pairs: int
) -> Iterator[tuple[int | slice, slice]]:
    """Indices of tiles: the groups, and a slice of the members of each. A tile has at most `tile_pairs` pairs, but at
    least one position.

    A tile of a single group is given by its number, not by a slice, so that it has no group dimension: a plain matrix
    product is faster than a batch of one.
    """
    groups_per_tile = tile_pairs // (group_size * num_negatives)
    if groups_per_tile > 1:
        for group in range(0, num_groups, groups_per_tile):
            yield slice(group, group + groups_per_tile), slice(None)
        return
    members_per_tile = max(1, tile_pairs // num_negatives)
    for group in range(num_groups):
        for member in range(0, group_size, members_per_tile):
            yield group, slice(member, member + members_per_tile)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
