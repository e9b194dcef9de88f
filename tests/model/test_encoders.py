"""Laws that hold for every encoder, with all that it can know of positions, times and weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.config import load_config
from pipeline.data.batches import cut_windows, epoch_batches, validation_users
from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists, offsets_of
from pipeline.data.seen import IN_ALL_PARTS
from pipeline.model import validation
from pipeline.model.dropout import keep_mask
from pipeline.model.encoders import ENCODERS, columns_read, make_encoder
from pipeline.model.encoders.hstu import time_buckets
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import MixtureOfLogits
from pipeline.settings import POSITIONS, ModelSettings, Settings
from pipeline.stages.encode import encode_sequences
from tests.model.planted import NUM_ITEMS, SMALL_MOL
from tests.model.slow_encoders import SLOW, moments_apart

MAX_LENGTH = 8
CASES = [
    pytest.param({"encoder": encoder, "positions": positions, "reads_times": times}, id=f"{encoder}-{positions}{times}")
    for encoder in ENCODERS
    for positions in POSITIONS[encoder]
    for times in ((False, True) if encoder == "hstu" else (False,))
]
each_encoder = pytest.mark.parametrize("keys", CASES)


def make_model(keys: dict, **others: object) -> RetrievalModel:
    """A model in float64 whose encoder has large random weights, so that every part of it matters."""
    shape = {"dim": 16, "num_blocks": 2, "num_heads": 2, "ffn_dim": 24, "dropout": 0.0, "max_length": MAX_LENGTH}
    settings = ModelSettings(**{**shape, "mol": SMALL_MOL, **keys, **others})
    torch.manual_seed(0)
    model = RetrievalModel(settings, NUM_ITEMS).double().eval()
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(model.item_embedding.weight, std=0.5)
    return model.requires_grad_(False)


def make_events(lengths: list[int], size: int, seed: int = 0) -> Events:
    """Random events; the padding has times and weights too, which must not matter."""
    rng = np.random.default_rng(seed)
    rows_BL = torch.from_numpy(rng.integers(NUM_ITEMS, size=(len(lengths), size)))
    rows_BL[torch.arange(size) >= torch.tensor(lengths).unsqueeze(1)] = -1
    times_BL = torch.tensor([moments_apart(rng, size) for _ in lengths])
    weights_BL = torch.from_numpy(rng.integers(0, 4, size=(len(lengths), size)).astype(np.float32))
    weights_BL[:, 0] = 1.0
    return Events(rows_BL, {"times": times_BL, "weights": weights_BL})


def part_of(events: Events, rows: slice, places: slice) -> Events:
    columns = {name: column[rows, places] for name, column in events.columns.items()}
    return Events(events.item_rows_BL[rows, places], columns)


def joined(before: Events, after: Events) -> Events:
    columns = {name: torch.cat([before.columns[name], after.columns[name]], dim=1) for name in before.columns}
    return Events(torch.cat([before.item_rows_BL, after.item_rows_BL], dim=1), columns)


@each_encoder
def test_later_events_change_nothing_before(keys):
    model = make_model(keys)
    first, second, other = (make_events([4, 4, 4], 4, seed) for seed in (1, 2, 3))
    late = {name: column + 10**16 if name == "times" else column for name, column in other.columns.items()}
    there = model.encode_positions(joined(first, second))
    back = model.encode_positions(joined(first, Events(other.item_rows_BL, late)))
    torch.testing.assert_close(there[:, :4], back[:, :4])
    assert not torch.allclose(there[:, 4:], back[:, 4:])
    torch.testing.assert_close(there[:, :4], model.encode_positions(first))


@each_encoder
def test_padding_and_neighbours_change_nothing(keys):
    model = make_model(keys)
    lengths = [5, 1, 7, 3]
    events = make_events(lengths, 7)
    queries_BE = model.encode(events)
    for row, length in enumerate(lengths):
        alone = part_of(events, slice(row, row + 1), slice(length))
        torch.testing.assert_close(model.encode(alone)[0], queries_BE[row])
        longer = joined(alone, make_events([0], MAX_LENGTH - length, seed=9))
        torch.testing.assert_close(model.encode(longer)[0], queries_BE[row])


@each_encoder
def test_users_without_events_get_one_finite_query(keys):
    queries_BE = make_model(keys).encode(make_events([0, 3, 0], 5))
    assert torch.isfinite(queries_BE).all()
    torch.testing.assert_close(queries_BE[0], queries_BE[2])


@each_encoder
def test_a_query_has_a_fixed_norm(keys):
    queries_BE = make_model(keys).encode(make_events([5, 1, 7], 7))
    torch.testing.assert_close(queries_BE.square().mean(dim=1), torch.ones(3).double(), atol=1e-3, rtol=0)


@each_encoder
def test_one_user_with_one_event_of_the_only_item(keys):
    settings = ModelSettings(dim=4, max_length=1, mol=SMALL_MOL, **keys)
    model = RetrievalModel(settings, 1)
    columns = {"times": torch.tensor([[7]]), "weights": torch.ones(1, 1)}
    side = model.query_side(QueryInput(Events(torch.tensor([[0]]), columns), torch.tensor([3])))
    scores_BN = model.mol(side, model.item_side(torch.tensor([0])))
    assert scores_BN.shape == (1, 1)
    assert torch.isfinite(scores_BN).all()


@each_encoder
def test_every_weight_learns_from_its_first_values_on(keys):
    """The first values are those of the seed: a weight without a gradient there would never begin to learn."""
    settings = ModelSettings(dim=16, dropout=0.0, max_length=MAX_LENGTH, mol=SMALL_MOL, **keys)
    torch.manual_seed(0)
    model = RetrievalModel(settings, NUM_ITEMS)
    queries_BLE = model.encode_positions(make_events([8, 5, 8], 8))
    (queries_BLE * torch.randn(settings.dim)).sum().backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 1e-6, name
        if name.endswith(("places.weight", "distances.table")):
            assert (parameter.grad.abs().amax(dim=1) > 0).all(), f"each row of {name}"
    assert (model.item_embedding.weight.grad.to_dense().abs().sum(dim=1) > 0).sum() > 10


@pytest.mark.parametrize("keys", [case for case in CASES if case.values[0]["encoder"] in SLOW])
def test_an_encoder_is_that_of_the_equations(keys):
    model, lengths = make_model(keys), [5, 1, 8]
    events = make_events(lengths, 8)
    queries_BLE = model.encode_positions(events)
    for row, length in enumerate(lengths):
        history = (values[row, :length].tolist() for values in (events.item_rows_BL, *events.columns.values()))
        expected_LE = torch.from_numpy(np.stack(SLOW[keys["encoder"]](model, *history)))
        torch.testing.assert_close(queries_BLE[row, :length], expected_LE)


def bucket_of(lengths: list[int]) -> Bucket:
    rng = np.random.default_rng(4)
    total = sum(lengths)
    return Bucket(
        pa.array(range(len(lengths))),
        offsets_of(np.array(lengths)),
        rng.integers(NUM_ITEMS, size=total).astype(np.int32),
        np.concatenate([moments_apart(rng, length) for length in lengths]).astype(np.int64),
        rng.integers(1, 4, size=total).astype(np.float32),
        np.full(total, IN_ALL_PARTS, np.uint8),
        np.array(lengths, dtype=np.int32),
        np.zeros(len(lengths), dtype=np.int32),
        pa.repeat("", len(lengths)),
        Lists.empty(len(lengths)),
    )


@each_encoder
def test_training_validation_and_serving_compute_the_same_query(keys, monkeypatch):
    """Training asks after each event of a window, with the next event at hand; the two others cut the history there."""
    model = make_model(keys)
    bucket = bucket_of([4, 9, 2, 7])
    whole = bucket.cut("train", columns_read(model.settings))
    (batch,) = epoch_batches(cut_windows(whole, bucket.user_keys, MAX_LENGTH), 1, seed=0, epoch=1, rank=0)
    trained_BLE = model.encode_positions(Events.of(batch.item_rows_BL, batch.columns, model.device))
    for user, key in enumerate(bucket.user_keys):
        (row,) = np.flatnonzero(batch.user_keys_B == key)
        for length in range(1, whole.lengths[user]):
            history = whole.runs(whole.offsets[[user]], np.array([length]))
            trained = model.mol.query_side(trained_BLE[row, length - 1].unsqueeze(0))
            served = encode_sequences(model, history, bucket.user_keys[[user]])
            torch.testing.assert_close(served.components_BQD, trained.components_BQD)
            users = validation_users(history, Lists.of([[NUM_ITEMS - 1]]), bucket.user_keys[[user]])
            asked = []
            monkeypatch.setattr(validation, "_model_score", lambda model, query, asked=asked: asked.append(query))
            monkeypatch.setattr(validation, "_num_ahead", lambda *_: torch.zeros(1, 1, dtype=torch.int64))
            validation.rank_by_model(model, users, 10)
            for query in asked:
                torch.testing.assert_close(query.components_BQD, trained.components_BQD)
            assert len(asked) == len(users)


@each_encoder
def test_the_columns_that_an_encoder_reads_matter_and_no_other_is_needed(keys):
    model, events = make_model(keys), make_events([6, 6], 6)
    reads = columns_read(model.settings)
    assert reads == model.encoder.reads
    expected_BE = model.encode(dataclasses.replace(events, columns={name: events.columns[name] for name in reads}))
    other = make_events([6, 6], 6, seed=5)
    for name in events.columns:
        changed = Events(events.item_rows_BL, {**events.columns, name: other.columns[name]})
        assert torch.allclose(model.encode(changed), expected_BE) == (name not in reads), name


@each_encoder
def test_what_an_encoder_reads_is_known_without_a_random_number(keys):
    before = torch.get_rng_state()
    columns_read(ModelSettings(**keys))
    assert torch.equal(torch.get_rng_state(), before)


@each_encoder
def test_an_encoder_makes_every_tensor_on_the_device_of_its_weights(keys):
    """The meta device stands for a GPU: it refuses to work with tensors of the CPU."""
    settings = ModelSettings(dim=16, max_length=MAX_LENGTH, mol=SMALL_MOL, **keys)
    model, events = RetrievalModel(settings, NUM_ITEMS).to("meta"), make_events([6, 3], 6)
    columns = {name: column.to("meta") for name, column in events.columns.items()}
    assert model.encode_positions(Events(events.item_rows_BL.to("meta"), columns)).device.type == "meta"


@each_encoder
def test_dropout_changes_queries_in_training_only(keys):
    model, events = make_model(keys, dropout=0.5), make_events([6, 6], 6)
    assert torch.equal(model.encode(events), model.encode(events))
    model.train()
    assert not torch.allclose(model.encode(events), model.encode(events))


def test_the_order_matters_to_every_encoder_but_the_bag():
    for encoder in ENCODERS:
        model = make_model({"encoder": encoder})
        columns = {"weights": torch.tensor([[2.0, 1.0, 2.0]])}
        there, back = (model.encode(Events(torch.tensor([rows]), columns)) for rows in ([3, 7, 1], [1, 7, 3]))
        assert torch.allclose(there, back) == (encoder == "bag"), encoder


def test_events_without_weight_do_not_count_in_a_bag_and_a_history_of_them_is_an_empty_one():
    model = make_model({"encoder": "bag"})
    weights_BL = torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    queries_LE = model.encode_positions(Events(torch.tensor([[3, 7, 1, 9]]), {"weights": weights_BL}))[0]
    nothing = Events(torch.tensor([[-1]]), {"weights": torch.zeros(1, 1)})
    torch.testing.assert_close(queries_LE[:2], model.encode(nothing).expand(2, -1))
    only = Events(torch.tensor([[1]]), {"weights": torch.ones(1, 1)})
    torch.testing.assert_close(queries_LE[2:], model.encode(only).expand(2, -1))


def test_in_training_a_bag_holds_all_events_but_those_of_the_item_to_predict():
    model = make_model({"encoder": "bag"})
    rows, weights = [3, 7, 3, 1], [1.0, 2.0, 3.0, 1.0]
    padded = Events(torch.tensor([[*rows, -1], [9, 2, -1, -1, -1]]), {"weights": torch.tensor([[*weights, 9.0]] * 2)})
    queries_LE = model.train().encode_positions(padded)[0]
    model.eval()
    for place, predicted in enumerate([7, 3, 1, None]):
        others = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row != predicted]
        columns = {"weights": torch.tensor([[weight for _, weight in others]])}
        expected = model.encode(Events(torch.tensor([[row for row, _ in others]]), columns))[0]
        torch.testing.assert_close(queries_LE[place], expected)


@pytest.mark.parametrize("training", [False, True])
def test_a_history_without_weight_spoils_no_gradient(training):
    model = make_model({"encoder": "bag"}).float().requires_grad_(True).train(training)
    events = Events(torch.tensor([[3, 7, 7, 1]]), {"weights": torch.tensor([[0.0, 0.0, 1.0, 0.0]])})
    (model.encode_positions(events) * 1e6 * torch.arange(16)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.encoder.parameters())
    assert torch.isfinite(model.item_embedding.weight.grad.to_dense()).all()


def test_times_fall_into_buckets_of_the_logarithm_of_seconds():
    """The figures of the HSTU code: 0 and 1 s are 0, a minute is 13, an hour 27, a day 37."""
    seconds = [0, 0.4, 1, 60, 3_600, 86_400, 2e9, 9e9]
    times_BL = torch.tensor([[0, *(int(each * 1e6) for each in seconds)]])
    assert time_buckets(times_BL)[0, 1:, 0].tolist() == [0, 0, 0, 13, 27, 37, 71, 71]
    assert time_buckets(times_BL)[0, 0].tolist() == [0] * 9  # a later event, which attention leaves out


@pytest.mark.parametrize("keys", [{"encoder": "ligr", "positions": "relative"}, {"encoder": "hstu"}])
def test_bfloat16_gives_nearly_the_same_query(keys):
    model, events = make_model(keys).float(), make_events([6, 8], 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_BE = model.encode(events)
    assert torch.nn.functional.cosine_similarity(rounded_BE.float(), model.encode(events)).min() > 0.99


def test_ligr_is_four_times_as_wide_within_unless_told_otherwise():
    widths = [ModelSettings(encoder=encoder, dim=32).ffn_dim for encoder in ("sasrec", "ligr")]
    assert widths == [128, 128]
    assert ModelSettings(encoder="ligr", dim=64).ffn_dim == 256
    assert ModelSettings(encoder="ligr", ffn_dim=64).ffn_dim == 64
    assert ModelSettings.model_validate(ModelSettings(encoder="ligr", dim=64).model_dump()).ffn_dim == 256


def test_the_papers_configuration_has_as_many_weights_as_the_papers_model():
    """104,800 in the blocks of HSTU-large for MovieLens-1M: without its table of 2·211 - 1 distances and 129 buckets,
    8 · (4 · 50 · 50 + 50 · 50 + 50) = 100,400. And 711,328 in its MoL."""
    settings = load_config(Settings, Path(__file__).parents[2] / "conf" / "movielens_1m_paper.yaml").model
    without = settings.model_copy(update={"positions": "none", "reads_times": False})
    assert sum(parameter.numel() for parameter in make_encoder(without).parameters()) == 100_400
    assert 100_400 + 8 * (2 * 211 - 1 + 129) == 104_800
    mol = MixtureOfLogits(settings.dim, settings.mol)
    assert sum(parameter.numel() for parameter in mol.parameters()) == 711_328


def test_ligr_in_training_drops_its_input_both_sublayers_and_the_inner_layer():
    settings = ModelSettings(encoder="ligr", dim=16, num_blocks=1, ffn_dim=24, max_length=8, mol=SMALL_MOL)
    model, events = RetrievalModel(settings, NUM_ITEMS).train(), make_events([6, 8], 8)
    torch.manual_seed(5)
    model.encode_positions(events)
    left_over = torch.get_rng_state()
    torch.manual_seed(5)
    for width in (16, 16, 24, 16):
        keep_mask(torch.empty(2, 8, width), settings.dropout)
    assert torch.equal(torch.get_rng_state(), left_over)
