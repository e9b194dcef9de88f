"""P and d: how many pairs of components, and how wide, against quality and the cost of training and search.

1 × 1 is a dot product: the gate has nothing to choose. All variants have item embeddings of the same size.
"""

from collections.abc import Sequence
from pathlib import Path

from jobs.studies.settings.variants import Study, run_study

SHAPES = ((1, 1, 48), (2, 2, 24), (4, 4, 12), (4, 4, 24), (8, 4, 12), (8, 4, 24), (8, 4, 48), (8, 8, 24))
STUDY = Study(
    "pairs",
    {
        f"{query} × {item} × {width}": {
            "model.mol.num_query_components": query,
            "model.mol.num_item_components": item,
            "model.mol.component_dim": width,
        }
        for query, item, width in SHAPES
    },
    {
        "hit_rate": "HR@10",
        "seconds": "training, s",
        "exact_milliseconds": "exact search, ms",
        "milliseconds": "chosen, ms",
    },
)


def main(root: Path, folder: Path, config: Path | None, overrides: Sequence[str]) -> None:
    run_study(STUDY, root, folder, config, overrides)
