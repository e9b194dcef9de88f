"""Train the models of real logs that the other studies of models measure.

A MODEL is SET/WAY/SEED, for example diginetica/warm/0; without names 12 models are trained. DATA holds
`diginetica/interactions.parquet` and `ml1m/interactions.parquet`, one row per event: user_id, item_id, pos, and for
diginetica `split`, which is 1 in the last week. OUT receives one safetensors file per model; a model that is there is
not trained again. One thread, no Ray.

WAY `scratch` is MoL from random weights; `warm` starts from the encoder and the item table of a SASRec that was trained
with a plain inner product (WAY `dot`). diginetica: the sessions of the last week are tonight's users and are not
trained on; validation asks for the last event of some of them. ml1m: leave one out by user, as in the papers.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.batches import cut_windows, num_steps, validation_users
from pipeline.data.lists import Int64, Lists, offsets_of, ranges
from pipeline.errors import InputError
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MolPairs, QuerySide
from pipeline.model.ranks import Ranks
from pipeline.model.rounds import best_round
from pipeline.model.training import TrainingData, TrainingState, fit, new_state, seed_everything
from pipeline.settings import ModelSettings, MolSettings, TrainSettings

Way = Literal["scratch", "warm", "dot"]
SEEDS = (0, 1, 2)
NUM_VALIDATION = 500  # tonight's users who validate training; the others ask queries
MODELS = {
    "diginetica": ModelSettings(
        dim=64,
        max_length=20,
        mol=MolSettings(num_query_components=8, num_item_components=8, component_dim=32, query_hidden_dim=128),
    ),
    "ml1m": ModelSettings(  # conf/movielens_1m.yaml with shorter histories
        dim=64,
        ffn_dim=256,
        max_length=100,
        mol=MolSettings(
            num_query_components=4, num_item_components=4, component_dim=32, query_hidden_dim=128, gate_hidden_dim=32
        ),
    ),
}
EPOCHS: dict[str, dict[Way, int]] = {
    "diginetica": {"scratch": 6, "warm": 2, "dot": 3},
    "ml1m": {"scratch": 3, "warm": 2, "dot": 3},
}
BATCH_POSITIONS: dict[str, dict[Way, int]] = {
    "diginetica": {"scratch": 256, "warm": 1_024, "dot": 1_024},
    "ml1m": {"scratch": 1_024, "warm": 1_024, "dot": 1_024},
}


@dataclass(frozen=True)
class ModelName:
    """The name of a model: the log, the way it was trained and the seed."""

    log: str
    way: Way
    seed: int

    def __str__(self) -> str:
        return f"{self.log}/{self.way}/{self.seed}"

    def file(self, out: Path) -> Path:
        """The file of the model's weights."""
        return out / f"{self.log}-{self.way}-{self.seed}.safetensors"


def parse_name(text: str) -> ModelName:
    """Read SET/WAY/SEED. Raises InputError when there is no such model."""
    log, _, rest = text.partition("/")
    ways = {f"{way}/{seed}": ModelName(log, way, seed) for way in get_args(Way) for seed in SEEDS}
    if log not in MODELS or rest not in ways:
        raise InputError(f"no model is called {text!r}: give SET/WAY/SEED, for example {next(iter(MODELS))}/warm/0")
    return ways[rest]


class InnerProduct(nn.Module):
    """A stand-in for MoL: the cosine of query and item over the temperature, one component each.

    The training step differentiates by the gates, so gates are returned, with weight zero.
    """

    user_table = None

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def query_side(self, queries_BE: Tensor, user_rows_B: Tensor | None = None) -> QuerySide:
        return QuerySide(F.normalize(queries_BE, dim=-1).unsqueeze(-2), queries_BE[..., :1])

    def item_side(self, items_NE: Tensor) -> ItemSide:
        return ItemSide(F.normalize(items_NE, dim=-1).unsqueeze(-2), items_NE[..., :1])

    def forward(self, query: QuerySide, items: ItemSide) -> Tensor:
        products = query.components_BQD.squeeze(-2) @ items.components_NXD.squeeze(-2).mT
        return products / self.temperature + 0 * (query.gate_BP @ items.gate_NP.mT)

    def pairs(self, query: QuerySide, items: ItemSide) -> MolPairs:
        scores_BN = self(query, items)
        return MolPairs(scores_BN, (1 + 0 * scores_BN).unsqueeze(-1), scores_BN.unsqueeze(-1))


@dataclass(frozen=True)
class Histories:
    """One log, cut by use. Validation reads `visible` and asks for `held_out`; tonight's queries read `tonight`."""

    num_items: int
    train: Lists
    visible: Lists
    held_out: Lists
    tonight: Lists


def read_histories(data: Path, log: str) -> Histories:
    """Read a log and cut it by the protocol that is usual for it."""
    table = pq.read_table(data / log / "interactions.parquet").sort_by([("user_id", "ascending"), ("pos", "ascending")])
    item_rows = np.unique(table["item_id"].to_numpy(), return_inverse=True)[1].astype(np.int32)
    users, starts, lengths = np.unique(table["user_id"].to_numpy(), return_index=True, return_counts=True)

    def part(chosen: NDArray[np.bool_], num_last: int, num_dropped: int) -> Lists:
        """Events of the chosen users without the last `num_dropped`: the last `num_last` of these, or with 0 all."""
        stops = (starts + lengths)[chosen] - num_dropped
        firsts = stops - num_last if num_last else starts[chosen]
        return Lists(offsets_of(stops - firsts), item_rows[ranges(firsts, stops - firsts)])

    num_items = int(item_rows.max()) + 1
    everyone = np.ones(len(users), dtype=bool)
    if log == "ml1m":
        train = part(everyone, 0, 2)
        return Histories(num_items, train, train, part(everyone, 1, 1), part(everyone, 0, 1))
    is_new = table["split"].to_numpy()[starts] == 1
    return Histories(num_items, part(~is_new, 0, 0), part(is_new, 0, 1), part(is_new, 1, 0), part(is_new, 0, 0))


def permuted_users(histories: Histories) -> Int64:
    """Tonight's users in a fixed random order: the first NUM_VALIDATION validate training, the others ask queries."""
    return np.random.default_rng(20_260_101).permutation(len(histories.tonight.lengths))


def train_settings(name: ModelName) -> TrainSettings:
    """Settings of the training, found by trial on one thread."""
    is_dot = name.way == "dot"
    return TrainSettings(
        max_epochs=EPOCHS[name.log][name.way],
        patience=2 if is_dot else EPOCHS[name.log][name.way],
        max_minutes=None,
        batch_positions=BATCH_POSITIONS[name.log][name.way],
        num_negatives=256 if is_dot else 64,
        popular_negatives=0.0,
        log_q=False,
        head_weight=0.0,
        positions_per_negatives=256,
        learning_rate=3e-3 if is_dot else 2e-3,
        precision="bfloat16" if name.log == "diginetica" and not is_dot else "float32",  # whichever is faster
        mutual_information_weight=0.0 if is_dot else 0.001,
        seed=name.seed,
    )


def training_data(histories: Histories, max_length: int, batch_positions: int) -> TrainingData:
    """Cut the training windows, and take NUM_VALIDATION of tonight's users for validation."""
    windows = cut_windows(histories.train, np.arange(len(histories.train.lengths)), max_length)
    everyone = np.arange(len(histories.visible.lengths))
    users = validation_users(histories.visible, histories.held_out, everyone)
    chosen = np.flatnonzero(np.isin(users.user_keys, permuted_users(histories)[:NUM_VALIDATION]))
    counts_N = np.bincount(histories.train.values, minlength=histories.num_items)
    steps = num_steps([windows.num_targets], batch_positions)
    return TrainingData(windows, steps, users.take(chosen), torch.from_numpy(counts_N))


def new_model(name: ModelName, num_items: int, out: Path) -> RetrievalModel:
    """The model before training; a `warm` one reads the weights of its `dot` model."""
    seed_everything(name.seed)
    model = RetrievalModel(MODELS[name.log], num_items)
    if name.way == "dot":
        model.mol = InnerProduct(model.mol.temperature)  # type: ignore[assignment]  # the training step asks no more
    if name.way == "warm":
        weights = load_file(replace(name, way="dot").file(out))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all(key.startswith("mol.") for key in missing), missing
    return model


def load_model(out: Path, name: ModelName, num_items: int) -> RetrievalModel:
    """Read a trained model, in evaluation mode. Raises InputError when it has not been trained."""
    if not name.file(out).exists():
        raise InputError(f"{name.file(out)} is not there: run python jobs/study.py train {name}")
    model = RetrievalModel(MODELS[name.log], num_items)
    model.load_state_dict(load_file(name.file(out)))
    return model.eval()


def train(data: Path, out: Path, name: ModelName) -> None:
    """Train one model, and first the `dot` model that a `warm` one starts from."""
    if name.file(out).exists():
        return
    if name.way == "warm":
        train(data, out, replace(name, way="dot"))
    histories, settings = read_histories(data, name.log), train_settings(name)
    state = new_state(new_model(name, histories.num_items, out), settings)

    def report(state: TrainingState) -> None:
        if not state.history:
            return
        last = state.history[-1]
        seconds = f"{last.seconds:.0f} + {last.validation_seconds:.0f} s"
        hits = f"HR@10 {last.hit_rate:.4f} of {last.num_validation_users}"
        print(f"{name} epoch {last.epoch:g}: loss {last.loss:.4f}, {hits}, {seconds}", flush=True)

    data_of_all = training_data(histories, MODELS[name.log].max_length, settings.batch_positions)
    fit(state, data_of_all, settings, Ranks(), report)
    save_file(state.best_weights, name.file(out), {"hit_rate": f"{best_round(state.history).hit_rate:.4f}"})


def main(models: list[str], data: Path, out: Path) -> None:
    """Train the named models, or all."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    names = models or [f"{log}/{way}/{seed}" for seed in SEEDS for log in MODELS for way in ("scratch", "warm")]
    for name in map(parse_name, names):
        train(data, out, name)
