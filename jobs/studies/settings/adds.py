"""What MoL adds to a dot product, with each encoder that reads the order of events, on one budget of training time.

The dot product is MoL with one pair of components as wide as the item's vector, trained in the same way.
"""

from collections.abc import Sequence
from pathlib import Path

from jobs.studies.settings.variants import Keys, Study, run_study

WIDTH = 64
DOT: Keys = {
    "model.mol.num_query_components": 1,
    "model.mol.num_item_components": 1,
    "model.mol.component_dim": WIDTH,
}
STUDY = Study(
    "adds",
    {
        f"{encoder}, {similarity}": {"model.encoder": encoder, "model.dim": WIDTH, **keys}
        for encoder in ("sasrec", "ligr", "hstu")
        for similarity, keys in (("dot product", DOT), ("MoL", {}))
    },
    {"hit_rate": "HR@10", "ndcg": "NDCG@10", "seconds": "training, s"},
)


def main(root: Path, folder: Path, config: Path | None, overrides: Sequence[str]) -> None:
    run_study(STUDY, root, folder, config, overrides)
