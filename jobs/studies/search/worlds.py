"""Bench worlds: a MoL, a corpus and users, made from a recipe by chance and training, and kept in a cache.

    python -m jobs.studies.search.worlds m100k books    # make them with one thread, say how hard they are

B queries, N items, E width of item rows and encodings.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.studies.search.difficulty import as_text, average_needed, difficulty, exact_scores
from jobs.studies.search.market import Market, MarketRecipe, draw_histories, make_market
from jobs.studies.search.synthetic import synthetic_encodings, synthetic_mol
from jobs.studies.search.training import ModelRecipe, train_model
from pipeline.data.lists import Sequences
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.filters import Exclusions
from pipeline.retrieval.shard import ITEM_TILE
from pipeline.settings import MolSettings

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the code gives another world for the same recipe
NUM_QUERIES = 4_096  # for evaluation
NUM_SAMPLE = 8_192  # other users, for fitting
NUM_JUDGED = 100  # queries on which `main` says how hard a world is
QUERY_STREAM, SAMPLE_STREAM = 1, 2
WorldName = Literal["books", "books-hard", "m100k", "synthetic"]


@dataclass(frozen=True)
class BenchWorld:
    """What a search is measured on. Queries and sample are different users with the same mix of history lengths."""

    mol: MixtureOfLogits
    item_rows_NE: Tensor  # raw rows, for searches that cache nothing
    items: ItemSide
    encodings_BE: Tensor  # of the evaluation users: what `queries` was made of, for the same searches
    queries: QuerySide
    sample: QuerySide
    exclusions: Exclusions  # of the evaluation users: what is in their histories


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


def load_bench_world(name: WorldName, num_items: int | None = None, cache: Path | None = None) -> BenchWorld:
    """The world of this name, from the cache when it is there; `num_items` makes it larger or smaller.

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
    return trained_world(name, recipe, cache)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/nightrails`, else `~/.cache/nightrails`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nightrails"


def trained_world(
    name: str,
    recipe: ModelRecipe,
    cache: Path | None = None,
    num_queries: int = NUM_QUERIES,
    num_sample: int = NUM_SAMPLE,
) -> BenchWorld:
    """The world of any recipe; the file's name carries the hash of all that went into it."""
    made_of = {"version": VERSION, "recipe": asdict(recipe), "queries": num_queries, "sample": num_sample}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    path = (cache or default_cache()) / f"bench-{name}-{digest}.safetensors"
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
    """An untrained world of any size."""
    market = make_market(recipe)
    similarity = synthetic_mol(mol or RECIPES["books"].model.mol, recipe.dim, sharpness, recipe.seed)
    users = _users(market, num_queries, num_sample)
    encodings_BE, of_sample = (synthetic_encodings(market, histories, recipe.seed) for histories in users)
    return _world(similarity, torch.from_numpy(market.rows_NE), encodings_BE, of_sample, users[0])


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
        "history_rows": torch.from_numpy(users[0].item_rows),
    }


def _users(market: Market, num_queries: int, num_sample: int) -> tuple[Sequences, Sequences]:
    """Evaluation users, and those for fitting; neither has been trained on."""
    return draw_histories(market, num_queries, QUERY_STREAM), draw_histories(market, num_sample, SAMPLE_STREAM)


@torch.inference_mode()
def _encode(model: RetrievalModel, histories: Sequences) -> Tensor:
    rows_BL, lengths_B = histories.last(model.settings.max_length)
    return model.encode(torch.from_numpy(rows_BL).long(), torch.from_numpy(lengths_B)).clone()


def _assemble(recipe: ModelRecipe, tensors: Mapping[str, Tensor]) -> BenchWorld:
    mol = MixtureOfLogits(recipe.market.dim, recipe.model.mol).eval().requires_grad_(False)
    weights = {name.removeprefix("mol."): value for name, value in tensors.items() if name.startswith("mol.")}
    mol.load_state_dict(weights)
    histories = Sequences(tensors["history_offsets"].numpy(), tensors["history_rows"].numpy())
    return _world(mol, tensors["item_rows"], tensors["encodings"], tensors["sample_encodings"], histories)


@torch.inference_mode()
def _world(
    mol: MixtureOfLogits, rows_NE: Tensor, encodings_BE: Tensor, sample_encodings: Tensor, histories: Sequences
) -> BenchWorld:
    tiles = [mol.item_side(rows) for rows in rows_NE.split(ITEM_TILE)]
    items = ItemSide(torch.cat([t.components_NXD for t in tiles]), torch.cat([t.gate_NP for t in tiles]))
    exclusions = Exclusions(histories.offsets.astype(np.int64), histories.item_rows.astype(np.int32))
    sample = mol.query_side(sample_encodings)
    return BenchWorld(mol, rows_NE, items, encodings_BE, mol.query_side(encodings_BE), sample, exclusions)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Under another name first, so that a file that has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
    unfinished.replace(path)


def main(names: Sequence[str]) -> None:
    """Make each world and print how hard it is."""
    torch.set_num_threads(1)
    for name in names:
        if name not in RECIPES:
            sys.exit(f"no trained bench world is called {name!r}; there are {', '.join(RECIPES)}")
        world = trained_world(name, RECIPES[name])
        queries = world.queries.take(slice(0, NUM_JUDGED))
        scores_BN = exact_scores(world.mol, queries, world.items)
        print(f"{name}, {NUM_JUDGED} queries", as_text(difficulty(queries, world.items, scores_BN)), sep="\n")
        print(f"TopKAvg finds .99 of the best 100 at {average_needed(queries, world.items, scores_BN)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1:])
