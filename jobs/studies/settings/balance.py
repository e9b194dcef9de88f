"""Load balancing: what the mutual-information term does to the gate and to the lists, by its weight.

The term (`train.mutual_information_weight`, the paper's α) rewards a gate that is sure of its pairs for each item, but
uses all pairs equally often over all items.
"""

from collections.abc import Sequence
from pathlib import Path

from jobs.studies.settings.variants import Study, run_study

WEIGHTS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
STUDY = Study(
    "balance",
    {f"α = {weight:g}": {"train.mutual_information_weight": weight} for weight in WEIGHTS},
    {"hit_rate": "HR@10", "gates_in_use": "pairs in use", "milliseconds": "chosen search, ms"},
)


def main(root: Path, folder: Path, config: Path | None, overrides: Sequence[str]) -> None:
    run_study(STUDY, root, folder, config, overrides)
