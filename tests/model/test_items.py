"""The item tower with content, against the formula, and as a state that is saved and loaded."""

import math

import pytest
import torch
from safetensors.torch import load, save

from pipeline.data.lists import Lists
from pipeline.model.items import DESCRIPTION, ItemTower
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.settings import ContentSettings, ModelSettings, TrainSettings
from tests.model.planted import SMALL_MOL

FEATURES = Lists.of([[0, 3], [3], [], [1, 2, 3], [5]])
IS_MET = torch.tensor([True, True, True, False, False])
CONTENT = ContentSettings(values=("any",), num_hashes=6, id_dropout=0.5)


def tower() -> ItemTower:
    torch.manual_seed(0)
    made = ItemTower(5, 4, CONTENT).double()
    made.reset_parameters()
    made.describe(FEATURES, IS_MET)
    return made.double().eval()


def slow_embedding(made: ItemTower, row: int, has_row: bool) -> torch.Tensor:
    """By the formula of the module."""
    vector = made.weight[row] * float(has_row)
    num_items = [sum(feature in own.tolist() for own in map(FEATURES.__getitem__, range(5))) for feature in range(6)]
    idf = [math.log(6 / (1 + number)) + 1 for number in num_items]
    own = FEATURES[row].tolist()
    norm = math.sqrt(sum(idf[feature] ** 2 for feature in own))
    for feature in own:
        vector = vector + made.content_weight[feature] * idf[feature] / norm
    return vector


def test_embeddings_are_those_of_the_formula_and_padding_is_the_last_row():
    made = tower()
    rows = torch.tensor([[0, 3, -1], [4, 4, 2]])
    expected = [[0, 3, None], [4, 4, 2]]
    vectors = made(rows)
    for at, own in enumerate(expected):
        for place, row in enumerate(own):
            right = made.weight[5] if row is None else slow_embedding(made, row, bool(IS_MET[row]))
            torch.testing.assert_close(vectors[at, place], right, rtol=1e-6, atol=1e-8)


def test_in_training_some_uses_of_an_item_are_by_its_features_alone():
    made = tower().train()
    vectors = made(torch.zeros(2_000, dtype=torch.int64))
    with_row, without = slow_embedding(made, 0, True), slow_embedding(made, 0, False)
    is_with = torch.isclose(vectors, with_row, rtol=1e-6).all(dim=1)
    is_without = torch.isclose(vectors, without, rtol=1e-6).all(dim=1)
    assert (is_with ^ is_without).all()
    assert 850 < int(is_with.sum()) < 1_150
    unmet = made(torch.full((50,), 3))
    torch.testing.assert_close(unmet, slow_embedding(made, 3, False).expand(50, -1), rtol=1e-6, atol=1e-8)


def test_gradients_reach_the_features_and_the_rows_that_were_met():
    made = tower()
    (made(torch.tensor([0, 3, -1])) * torch.arange(1.0, 13.0).view(3, 4)).sum().backward()
    touched = made.content_weight.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [True, True, True, True, False, False]
    of_rows = made.weight.grad.to_dense().abs().sum(dim=1) > 0
    assert of_rows.tolist() == [True, False, False, False, False, True]


def model_of(content: ContentSettings, num_items: int = 5) -> RetrievalModel:
    settings = ModelSettings(dim=8, num_blocks=1, num_heads=1, ffn_dim=8, max_length=4, mol=SMALL_MOL, content=content)
    return RetrievalModel(settings, num_items)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_is_loaded_into_a_model_that_knows_nothing_of_the_features(assign):
    model = model_of(CONTENT)
    model.item_embedding.describe(FEATURES, IS_MET)
    with torch.device("meta" if assign else "cpu"):
        other = model_of(CONTENT)
    other.load_state_dict(model.state_dict(), assign=assign)
    rows = torch.arange(5)
    assert torch.equal(other.eval().item_embedding(rows), model.eval().item_embedding(rows))
    assert all(torch.equal(getattr(other.item_embedding, n), getattr(model.item_embedding, n)) for n in DESCRIPTION)


def test_a_model_that_starts_from_another_keeps_what_is_said_of_its_own_items():
    earlier, tonight = model_of(CONTENT), model_of(CONTENT, 3)
    earlier.item_embedding.describe(FEATURES, IS_MET)
    own = Lists.of([[1], [4, 5], [0, 3]])
    tonight.item_embedding.describe(own, torch.tensor([True, False, True]))
    tonight.copy_from(earlier, torch.tensor([2, -1, 0]))
    tower = tonight.item_embedding
    assert torch.equal(tower.content_weight, earlier.item_embedding.content_weight)
    assert tower.features.tolist() == [1, 4, 5, 0, 3]
    assert tower.is_met.tolist() == [True, False, True, True]
    assert torch.equal(tower.weight[0], earlier.item_embedding.weight[2])


def test_without_content_there_is_nothing_but_the_table():
    assert list(model_of(ContentSettings()).item_embedding.state_dict()) == ["weight"]


def test_items_that_were_not_met_are_no_negatives():
    counts = torch.tensor([3, 0, 1, 0, 6])
    sampler = Negatives.of(counts, TrainSettings(num_negatives=64, head_weight=0.0), only_met=True)
    rows = sampler.draw(50)
    assert set(rows.flatten().tolist()) == {0, 2, 4}
    expected = sampler.num_popular * counts[rows] / 10 + (64 - sampler.num_popular) / 3
    torch.testing.assert_close(sampler.corrections(rows), -expected.double().log())
    assert sampler.for_head(3)[0].tolist() == [0, 2, 4]
    assert set(sampler.for_head(2)[0].tolist()) <= {0, 2, 4}


def test_items_without_any_feature_are_their_rows_alone_and_survive_a_state(tmp_path):
    model = model_of(CONTENT)
    model.item_embedding.describe(Lists.empty(5), IS_MET)
    path = tmp_path / "weights"
    path.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    other = model_of(CONTENT)
    other.load_state_dict(load(path.read_bytes()))
    vectors = other.eval().item_embedding(torch.tensor([0, 3, -1]))
    assert torch.equal(vectors[0], model.item_embedding.weight[0])
    assert (vectors[1] == 0).all(), "not met, and nothing is said of it"
    vectors.sum().backward()
    assert (other.item_embedding.content_weight.grad == 0).all()
