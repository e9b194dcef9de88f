"""The gates: figures of the evaluation that a run must reach to be published."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.errors import GateError
from pipeline.evaluation.results import Metrics
from pipeline.settings import GateSettings

Floor = Literal["popularity", "counts"]


@dataclass(frozen=True)
class Verdict:
    """The result of one gate: the measured figure beside the required one; a gate of 0 is not set."""

    gate: str
    measured: float | None  # None: a lift over a floor that hits nothing, which cannot be computed
    required: float
    passed: bool
    hit_rates: dict[str, float] = field(default_factory=dict)  # of a lift: of the model and of the floor

    def plain(self) -> dict[str, Any]:
        """Make a dict for the manifest."""
        return asdict(self)

    def fault(self) -> str:
        """Say by how much the gate was missed."""
        if self.measured is None:
            return f"{self.gate} cannot be computed: neither the model nor {self.gate.removeprefix('lift_over_')} hits"
        return f"{self.gate} is {self.measured:.4f}, at least {self.required:.4f} is required"


def check_gates(metrics: Metrics | None, gates: GateSettings) -> list[Verdict]:
    """Compare the metrics of tonight's evaluation with the gates. Returns one verdict per gate.

    Raises GateError when a gate is not reached, or when gates are set and there are no metrics.
    """
    if metrics is None:
        least = {name: value for name, value in gates if name.startswith("min_") and value}
        if least:
            keys = " ".join(f"--set gates.{name}=0" for name in least)
            raise GateError(
                f"the gates are set but nothing was measured: run jobs/evaluate.py first, or open them with {keys}"
            )
        return []
    overlap = metrics.overlap.mean
    verdicts = [
        Verdict("overlap", overlap, gates.min_overlap, overlap >= gates.min_overlap),
        _lift(metrics, "popularity", gates.min_lift_over_popularity),
        _lift(metrics, "counts", gates.min_lift_over_counts),
    ]
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        faults = "; ".join(verdict.fault() for verdict in failed)
        raise GateError(
            f"not published, the last published table stays: {faults}. See what changed since the last night, or lower "
            f"gates.min_{failed[0].gate} if this is the quality you want"
        )
    return verdicts


def check_fallback(counts: Mapping[str, int], gates: GateSettings) -> Verdict:
    """Compare the share of requested users who got popular items, for want of a history, with the gate.

    `counts` has the number of users, and of users by status. Raises GateError when the share is above.
    """
    why = "have no history and got popular items"
    return _share(counts, "fallback", gates.max_fallback_share, why, "Is queries.uri the table of this log's users?")


def check_errors(counts: Mapping[str, int], gates: GateSettings) -> Verdict:
    """Compare the share of requested users for whom the computation failed with the gate, as `check_fallback` does."""
    why = "have no list, because the computation failed for them"
    hint = "The accounting of the run (status error) says for whom, and why"
    return _share(counts, "error", gates.max_error_share, why, hint)


def _share(counts: Mapping[str, int], status: str, most: float, why: str, hint: str) -> Verdict:
    number, num_users = counts.get(status, 0), counts["users"]
    share = number / max(num_users, 1)
    if share > most:
        raise GateError(
            f"not published, the last published table stays: {number} of {num_users} requested users {why}, a share of "
            f"{share:.4f}; at most {most:.4f} is allowed (gates.max_{status}_share). {hint}"
        )
    return Verdict(f"{status}_share", share, most, passed=True)


def _lift(metrics: Metrics, floor: Floor, required: float) -> Verdict:
    """Hit rate at the smallest cutoff, divided by the floor's. Where the floor hits nothing, any hit is enough."""
    name = f"hr@{min(metrics.cutoffs)}"
    hits = {"model": metrics.model[name].mean, floor: getattr(metrics, floor)[name].mean}
    lift = hits["model"] / hits[floor] if hits[floor] else None
    passed = not required or (hits["model"] > 0 if lift is None else lift >= required)
    return Verdict(f"lift_over_{floor}", lift, required, passed, hits)
