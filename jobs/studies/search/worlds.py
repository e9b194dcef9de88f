"""Bench worlds: a MoL, a corpus and users, made from a recipe by chance and training, and kept in a cache.

B queries, N items, E width of item rows and encodings.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.studies.search.market import Market, MarketRecipe, draw_histories, make_market
from jobs.studies.search.synthetic import synthetic_encodings, synthetic_mol
from jobs.studies.search.training import ModelRecipe, train_model
from pipeline.data.lists import Lists
from pipeline.model.inputs import Events
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.shard import ITEM_TILE
from pipeline.settings import MolSettings

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the code gives another world for the same recipe
NUM_QUERIES = 4_096  # for evaluation
NUM_SAMPLE = 8_192  # other users, for fitting
QUERY_STREAM, SAMPLE_STREAM = 1, 2
WorldName = Literal["books", "books-hard", "m100k", "synthetic"]


@dataclass(frozen=True)
class BenchWorld:
    """The world that a search is measured on; queries and sample are users with the same mix of history lengths."""

    mol: MixtureOfLogits
    item_rows_NE: Tensor  # raw rows, for searches that cache nothing
    items: ItemSide
    encodings_BE: Tensor  # the evaluation users: `queries` before the MoL, for searches that project them anew
    queries: QuerySide
    sample: QuerySide
    exclusions: Lists  # the histories of the evaluation users


RECIPES: Mapping[str, ModelRecipe] = {
    "books": ModelRecipe(
        market=MarketRecipe(
            num_items=695_762,
            num_values=(30, 300, 3_000, 30_000),
            aspect_shares=(0.1, 0.2, 0.3, 0.4),
            max_tastes=4,
            zipf_exponent=0.9,
            own_share=0.15,
        ),
        num_query_components=8,
        num_item_components=8,
        component_dim=32,
        num_steps=120,
        start="aligned",
        gate_preference=0.65,
    ),
    "books-hard": ModelRecipe(
        market=MarketRecipe(
            num_items=695_762,
            num_values=(5_000, 5_000),
            aspect_shares=(0.5, 0.5),
            max_tastes=3,
            zipf_exponent=1.1,
            own_share=0.1,
        ),
        num_query_components=8,
        num_item_components=8,
        component_dim=32,
        num_steps=300,
        start="aligned",
        gate_preference=0.35,
    ),
    "m100k": ModelRecipe(
        market=MarketRecipe(
            num_items=100_000,
            num_values=(60, 600, 6_000),
            aspect_shares=(0.2, 0.4, 0.4),
            max_tastes=3,
            zipf_exponent=0.9,
            family_share=0.5,
        ),
        num_query_components=8,
        num_item_components=4,
        component_dim=64,
        num_steps=400,
        start="random",
    ),
}
SHARPNESS = 0.3  # of the synthetic gates


def load_bench_world(name: WorldName, num_items: int | None = None) -> BenchWorld:
    """Read the world of this name from the cache, or make it; `num_items` makes it larger or smaller.

    "books" is 695,762 items with 8 × 8 components of width 32, "m100k" 100,000 with 8 × 4 of width 64; either takes
    minutes of one core to make. "books-hard" has the size of "books", but so many tastes of equal weight that its
    scores are far from low rank: no real model that we know is like that. "synthetic" has the sizes of "books", is made
    in seconds and not kept.
    """
    if name == "synthetic":
        market = RECIPES["books-hard"].market
        return synthetic_world(replace(market, num_items=num_items or market.num_items))
    recipe = RECIPES[name]
    if num_items is not None:
        recipe = replace(recipe, market=replace(recipe.market, num_items=num_items))
    return trained_world(name, recipe, default_cache())


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/nightrails`, else `~/.cache/nightrails`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nightrails"


def trained_world(
    name: str,
    recipe: ModelRecipe,
    cache: Path,
    num_queries: int = NUM_QUERIES,
    num_sample: int = NUM_SAMPLE,
) -> BenchWorld:
    """Read or make the world of any recipe; its file's name carries the hash of the recipe and the numbers."""
    content = {"version": VERSION, "recipe": asdict(recipe), "queries": num_queries, "sample": num_sample}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"bench-{name}-{digest}.safetensors"
    if not path.exists():
        log.info("making %s", path)
        _save(path, _train(recipe, num_queries, num_sample))
    return _assemble(recipe, load_file(path))


def synthetic_world(
    recipe: MarketRecipe,
    mol: MolSettings | None = None,
    sharpness: float = SHARPNESS,
    num_queries: int = NUM_QUERIES,
    num_sample: int = NUM_SAMPLE,
) -> BenchWorld:
    """Make an untrained world of any size."""
    market = make_market(recipe)
    similarity = synthetic_mol(mol or RECIPES["books"].model.mol, recipe.dim, sharpness, recipe.seed)
    users = _users(market, num_queries, num_sample)
    encodings_BE, sample_LE = (synthetic_encodings(market, histories, recipe.seed) for histories in users)
    return _world(similarity, torch.from_numpy(market.rows_NE), encodings_BE, sample_LE, users[0])


def _train(recipe: ModelRecipe, num_queries: int, num_sample: int) -> dict[str, Tensor]:
    market = make_market(recipe.market)
    model = train_model(recipe, market)
    users = _users(market, num_queries, num_sample)
    tensors = {f"mol.{name}": value for name, value in model.mol.state_dict().items()}
    return tensors | {
        "item_rows": torch.from_numpy(market.rows_NE),
        "encodings": _encode(model, users[0]),
        "sample_encodings": _encode(model, users[1]),
        "history_offsets": torch.from_numpy(users[0].offsets),
        "history_rows": torch.from_numpy(users[0].values),
    }


def _users(market: Market, num_queries: int, num_sample: int) -> tuple[Lists, Lists]:
    """Draw evaluation users and users for fitting; the model has been trained on neither."""
    return draw_histories(market, num_queries, QUERY_STREAM), draw_histories(market, num_sample, SAMPLE_STREAM)


@torch.inference_mode()
def _encode(model: RetrievalModel, histories: Lists) -> Tensor:
    rows_BL, _ = histories.last(model.settings.max_length)
    return model.encode(Events(torch.from_numpy(rows_BL).long())).clone()


def _assemble(recipe: ModelRecipe, tensors: Mapping[str, Tensor]) -> BenchWorld:
    mol = MixtureOfLogits(recipe.market.dim, recipe.model.mol).eval().requires_grad_(False)
    weights = {name.removeprefix("mol."): value for name, value in tensors.items() if name.startswith("mol.")}
    mol.load_state_dict(weights)
    histories = Lists(tensors["history_offsets"].numpy(), tensors["history_rows"].numpy())
    return _world(mol, tensors["item_rows"], tensors["encodings"], tensors["sample_encodings"], histories)


@torch.inference_mode()
def _world(
    mol: MixtureOfLogits, rows_NE: Tensor, encodings_BE: Tensor, sample_LE: Tensor, histories: Lists
) -> BenchWorld:
    tiles = [mol.item_side(rows) for rows in torch.split(rows_NE, ITEM_TILE)]
    items = ItemSide(torch.cat([t.components_NXD for t in tiles]), torch.cat([t.gate_NP for t in tiles]))
    queries, sample = mol.query_side(encodings_BE), mol.query_side(sample_LE)
    return BenchWorld(mol, rows_NE, items, encodings_BE, queries, sample, histories)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write under another name and rename, so that a file under the final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
    unfinished.replace(path)
