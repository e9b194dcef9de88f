"""Trains the models that `real_recall` measures: python -m jobs.studies.models.train DATA OUT [SET/WAY/SEED ...]

DATA holds `diginetica` and `ml1m` with their `interactions.parquet` (one row per event: user_id, item_id, pos); OUT
receives one safetensors file per model. A model is diginetica/warm/0 and the like; without names all are trained.
`scratch` is MoL from random weights. `warm` starts from the encoder and the item table of a SASRec that was trained
with a plain inner product (`dot`). A run that was killed goes on after its last finished epoch. One thread, no Ray.

diginetica: sessions of its last week are tonight's users; they are not trained on. Validation asks for the last event
of some of them. ml1m: leave one out by user, as in the papers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.batches import ValidationUsers, cut_windows, num_steps, validation_users
from pipeline.data.lists import Int64, Sequences, offsets_of, ranges
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MolPairs, QuerySide
from pipeline.model.training import Ranks, TrainingData, TrainingState, fit, new_state, seed_everything
from pipeline.settings import ModelSettings, MolSettings, TrainSettings

SETS, WAYS, SEEDS = ("diginetica", "ml1m"), ("scratch", "warm"), (0, 1, 2)
NUM_VALIDATION = 500
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
EPOCHS = {"diginetica": {"scratch": 6, "warm": 2, "dot": 3}, "ml1m": {"scratch": 3, "warm": 2, "dot": 3}}
BATCH_SIZES = {"diginetica": {"scratch": 64, "warm": 256, "dot": 256}, "ml1m": {"scratch": 16, "warm": 16, "dot": 16}}


class InnerProduct(nn.Module):
    """Takes the place of MoL: the cosine of query and item over the temperature, one component each.

    The training step differentiates by gates, so there are some; they weigh nothing.
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
    """What is trained on, and all that is known of tonight's users, with their last event held out of `visible`."""

    num_items: int
    train: Sequences
    visible: Sequences  # what validation may see
    held_out: Sequences
    tonight: Sequences  # what the night's queries see


def read_histories(folder: Path, name: str) -> Histories:
    table = pq.read_table(folder / name / "interactions.parquet").sort_by(
        [("user_id", "ascending"), ("pos", "ascending")]
    )
    item_rows = np.unique(table["item_id"].to_numpy(), return_inverse=True)[1].astype(np.int32)
    users, starts, lengths = np.unique(table["user_id"].to_numpy(), return_index=True, return_counts=True)

    def part(chosen: NDArray[np.bool_], from_end: int, upto: int) -> Sequences:
        """All but the last `upto` events of the chosen users, or, with `from_end`, only so many of them."""
        stops = (starts + lengths)[chosen] - upto
        firsts = stops - from_end if from_end else starts[chosen]
        return Sequences(offsets_of(stops - firsts), item_rows[ranges(firsts, stops - firsts)])

    num_items = int(item_rows.max()) + 1
    everyone = np.ones(len(users), dtype=bool)
    if name == "ml1m":
        train = part(everyone, 0, 2)
        return Histories(num_items, train, train, part(everyone, 1, 1), part(everyone, 0, 1))
    is_new = table["split"].to_numpy()[starts] == 1
    return Histories(num_items, part(~is_new, 0, 0), part(is_new, 0, 1), part(is_new, 1, 0), part(is_new, 0, 0))


def permuted_users(histories: Histories) -> Int64:
    """Tonight's users in a fixed random order: the first validate the training, the others ask queries."""
    return np.random.default_rng(20_260_101).permutation(len(histories.tonight.lengths))


def train_settings(name: str, way: str, seed: int) -> TrainSettings:
    return TrainSettings(
        max_epochs=EPOCHS[name][way],
        patience=2 if way == "dot" else EPOCHS[name][way],
        batch_size=BATCH_SIZES[name][way],
        num_negatives=256 if way == "dot" else 64,
        positions_per_negatives=256,
        learning_rate=3e-3 if way == "dot" else 2e-3,
        precision="bfloat16" if name == "diginetica" and way != "dot" else "float32",  # whichever is faster
        mutual_information_weight=0.0 if way == "dot" else 0.001,
        seed=seed,
    )


def training_data(histories: Histories, name: str, settings: TrainSettings) -> TrainingData:
    keys = np.arange(len(histories.train.lengths))
    windows = cut_windows(histories.train, keys, MODELS[name].max_length)
    users: ValidationUsers = validation_users(
        histories.visible, histories.held_out, np.arange(len(histories.visible.lengths))
    )
    chosen = np.flatnonzero(np.isin(users.user_keys, permuted_users(histories)[:NUM_VALIDATION]))
    counts_N = np.bincount(histories.train.item_rows, minlength=histories.num_items)
    steps = num_steps([len(windows)], settings.batch_size)
    return TrainingData(windows, steps, users.take(chosen), torch.from_numpy(counts_N))


def new_model(name: str, way: str, seed: int, num_items: int, out: Path) -> RetrievalModel:
    seed_everything(seed)
    model = RetrievalModel(MODELS[name], num_items)
    if way == "dot":
        model.mol = InnerProduct(MODELS[name].mol.temperature)  # type: ignore[assignment]
    if way == "warm":
        dot = load_file(path_of(out, name, "dot", seed))
        missing, unexpected = model.load_state_dict(dot, strict=False)
        assert not unexpected, unexpected
        assert all(key.startswith("mol.") for key in missing), missing
    return model


def path_of(out: Path, name: str, way: str, seed: int) -> Path:
    return out / f"{name}-{way}-{seed}.safetensors"


def load_model(out: Path, name: str, way: str, seed: int, num_items: int) -> RetrievalModel:
    model = RetrievalModel(MODELS[name], num_items)
    model.load_state_dict(load_file(path_of(out, name, way, seed)))
    return model.eval()


def train(folder: Path, out: Path, name: str, way: str, seed: int) -> None:
    path = path_of(out, name, way, seed)
    if path.exists():
        return
    if way == "warm":
        train(folder, out, name, "dot", seed)
    histories = read_histories(folder, name)
    settings = train_settings(name, way, seed)
    data = training_data(histories, name, settings)
    state = new_state(new_model(name, way, seed, histories.num_items, out), settings)
    unfinished = path.with_suffix(".pt")
    if unfinished.exists():
        saved = torch.load(unfinished, weights_only=False)  # our own file
        state.model.load_state_dict(saved["model"])
        state.optimiser.load_state_dict(saved["optimiser"])
        state.history, state.best_weights = saved["history"], saved["best_weights"]

    def save(state: TrainingState) -> None:
        report = state.history[-1]
        print(
            f"{name}/{way}/{seed} epoch {report.epoch}: loss {report.loss:.4f}, HR@10 {report.hit_rate:.4f} of "
            f"{report.num_validation_users}, {report.seconds:.0f} + {report.validation_seconds:.0f} s",
            flush=True,
        )
        parts = {"model": state.model.state_dict(), "optimiser": state.optimiser.state_dict()}
        torch.save(parts | {"history": state.history, "best_weights": state.best_weights}, unfinished)

    fit(state, data, settings, Ranks(), save)
    save_file(state.best_weights, path, {"hit_rate": f"{state.best.hit_rate:.4f}", "epochs": str(len(state.history))})
    unfinished.unlink()


def main() -> None:
    torch.set_num_threads(1)
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    names = sys.argv[3:] or [f"{name}/{way}/{seed}" for seed in SEEDS for name in SETS for way in WAYS]
    for model in names:
        name, way, seed = model.split("/")
        train(folder, out, name, way, int(seed))


if __name__ == "__main__":
    main()
