"""The studies of models: their judge, and each of them on a small log in the place of MovieLens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import study
from jobs.studies.models import breaks, dtypes, recall, train
from jobs.studies.models.recall import make_lists, union_sizes
from jobs.studies.models.world import World, bench_world
from jobs.studies.search.market import MarketRecipe
from jobs.studies.search.reference import ReferenceSearch
from jobs.studies.search.worlds import BenchWorld, synthetic_world
from pipeline.errors import InputError
from pipeline.settings import MolSettings

NUM_USERS, NUM_ITEMS, EVENTS_PER_USER = 1_500, 400, 6
MODEL = "ml1m/scratch/0"
MOL = MolSettings(
    num_query_components=3, num_item_components=2, component_dim=8, query_hidden_dim=24, gate_hidden_dim=12
)


@dataclass(frozen=True)
class Folders:
    data: Path
    out: Path

    @property
    def arguments(self) -> list[str]:
        return ["--data", str(self.data), "--out", str(self.out)]


@pytest.fixture(scope="module")
def small() -> tuple[BenchWorld, World]:
    """A bench world and the judge's view of it."""
    market = MarketRecipe(num_items=600, num_values=(8, 60), aspect_shares=(0.3, 0.7), max_tastes=2, dim=16)
    world = synthetic_world(market, MOL, num_queries=40, num_sample=8)
    return world, bench_world(world, num_sample=8)


def test_the_lists_hold_the_candidates_of_the_papers_search(small):
    world, judged = small
    lists = make_lists(judged)
    search = ReferenceSearch(world.mol, world.item_rows_NE, torch.float32)
    candidates_BM = search.topk_per_embd(world.encodings_BE, len(world.item_rows_NE), 20).rows_BK
    for ranks_N, candidates_M in zip(lists.rank_BN, candidates_BM, strict=True):
        assert set((ranks_N < 20).nonzero().flatten().tolist()) == set(candidates_M[candidates_M >= 0].tolist())
    assert union_sizes(lists.rank_BN)[19] == pytest.approx((candidates_BM >= 0).sum(dim=1).float().mean().item())


def test_a_score_exceeds_no_largest_logit_so_the_certificates_can_be_trusted(small):
    _, judged = small
    assert (judged.truth_BN <= make_lists(judged).largest_BN + 1e-4).all()


def test_head_middle_and_tail_share_the_events_in_thirds(small):
    _, judged = small
    counts = [judged.counts_N[judged.best_BK[judged.part_BK == part].unique()] for part in range(3)]
    assert counts[0].min() >= counts[1].max() >= counts[1].min() >= counts[2].max()


@pytest.mark.parametrize("text", ["books2", "ml1m", "ml1m/scratch", "ml1m/scratch/9", "netflix/warm/0"])
def test_a_name_that_is_no_model_is_refused_with_an_example(text: str):
    with pytest.raises(InputError, match="give SET/WAY/SEED, for example diginetica/warm/0"):
        train.parse_name(text)


def test_a_model_that_was_not_trained_is_named_with_the_way_to_train_it(tmp_path: Path):
    with pytest.raises(InputError, match=r"run python jobs/study\.py train ml1m/scratch/0"):
        train.load_model(tmp_path, train.parse_name(MODEL), num_items=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """A log in which a user stays near one item, and the model that a short training makes of it."""
    folders = Folders(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out"))
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), EVENTS_PER_USER)
    items = (rng.integers(0, NUM_ITEMS, NUM_USERS)[users] + rng.integers(0, 8, len(users))) % NUM_ITEMS
    columns = {"user_id": users, "item_id": items, "pos": np.tile(np.arange(EVENTS_PER_USER), NUM_USERS)}
    (folders.data / "ml1m").mkdir()
    pq.write_table(pa.table(columns), folders.data / "ml1m" / "interactions.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "EPOCHS", {"ml1m": {"scratch": 1, "warm": 1, "dot": 1}})
        patch.setattr(train, "BATCH_POSITIONS", {"ml1m": {"scratch": 512, "warm": 512, "dot": 512}})
        patch.setattr(recall, "FITS", {128: (16,)})
        patch.setattr(recall, "LANDMARKS", ((128, 16),))
        patch.setattr(dtypes, "NUM_SAMPLE", 128)
        patch.setattr(dtypes, "RANKS", (16,))
        for name, value in {"RANK": 16, "NUM_SAMPLE": 256, "NUM_CHANGED": 128, "FEW": ((64, 16),)}.items():
            patch.setattr(breaks, name, value)
        patch.setattr(breaks, "ANCHOR_RANKS", (16,))
        study.main(["train", MODEL, "ml1m/warm/0", *folders.arguments])
        yield folders


def test_a_warm_model_starts_from_a_dot_model_and_nothing_is_trained_twice(trained, capsys):
    names = {path.name for path in trained.out.iterdir()}
    assert names == {f"ml1m-{way}-0.safetensors" for way in ("scratch", "warm", "dot")}
    study.main(["train", MODEL, *trained.arguments])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "lines"),
    {
        "recall": (
            "TopKAvg",
            "TopKPerEmbd",
            "CombTopK",
            "gates on the true best",
            "k = 100",
            "low rank l 128 r 16",
            "128 landmark items",
        ),
        "dtypes": ("mean", "low rank 16", "float32   error", "float64   lists"),
        "breaks": ("r 16, 224 anchors", "TopKAvg", "128 of the past", "128 invented", "2 × 2 components: low rank"),
    }.items(),
)
def test_a_study_of_models_prints_every_part(trained, capsys, name: str, lines: tuple[str, ...]):
    study.main([name, MODEL, *trained.arguments])
    printed = capsys.readouterr().out.splitlines()
    for line in lines:
        assert any(text.lstrip().startswith(line) for text in printed), line
