"""The gates: figures of the evaluation that a run must reach to be published."""

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import GateError
from pipeline.evaluation.results import Metrics
from pipeline.settings import GateSettings


@dataclass(frozen=True)
class Verdict:
    """The result of one gate: the measured figure beside the required one."""

    gate: str
    measured: float
    required: float

    @property
    def passed(self) -> bool:
        return self.measured >= self.required

    def plain(self) -> dict[str, Any]:
        """Make a dict for the manifest."""
        return asdict(self) | {"passed": self.passed}


def check_gates(metrics: Metrics | None, gates: GateSettings) -> list[Verdict]:
    """Compare the metrics of tonight's evaluation with the gates; a gate of 0 is not set. Returns one verdict per gate.

    Raises GateError when a gate is not reached, or when gates are set and there are no metrics.
    """
    required = {"overlap": gates.min_overlap, "lift_over_popularity": gates.min_lift_over_popularity}
    if metrics is None:
        if any(required.values()):
            raise GateError(
                "the gates are set but nothing was measured: run jobs/evaluate.py first, or open them with "
                "--set gates.min_overlap=0 --set gates.min_lift_over_popularity=0"
            )
        return []
    measured = {"overlap": metrics.overlap.mean, "lift_over_popularity": _lift(metrics)}
    verdicts = [Verdict(gate, measured[gate], least) for gate, least in required.items()]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        faults = "; ".join(f"{v.gate} is {v.measured:.4f}, at least {v.required:.4f} is required" for v in failed)
        raise GateError(
            f"not published, the last published table stays: {faults}. See what changed since the last night, or lower "
            f"gates.min_{failed[0].gate} if this is the quality you want"
        )
    return verdicts


def _lift(metrics: Metrics) -> float:
    """Hit rate at the smallest cutoff, divided by popularity's."""
    name = f"hr@{min(metrics.cutoffs)}"
    model, popularity = metrics.model[name].mean, metrics.popularity[name].mean
    if popularity == 0.0:
        return 1.0 if model == 0.0 else 1e9  # any hit is more than none; JSON has no infinity
    return model / popularity
