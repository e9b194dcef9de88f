"""The explanation of a user's list (`explain.py`): its parts, and as text."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """An event of the history."""

    day: str
    item: str
    is_hidden: bool  # whether the event hides its item from the user


@dataclass(frozen=True)
class Shown:
    """An item of the list that exact search finds."""

    rank: int
    item_id: object
    item: str
    score: float
    counts: float  # the part of the score that the counts have
    pairs: tuple[tuple[str, float, float], ...]  # components, their weight in the gate, their logit
    nearest: tuple[str, ...]  # items of the history
    published_rank: int | None


@dataclass(frozen=True)
class Explanation:
    """All that a night's artifacts say of a user, and of one item for this user if one is asked for."""

    user_id: object
    user_status: str  # as the accounting says
    reason: str
    num_events: int
    last_events: tuple[Seen, ...]
    num_items: int
    hidden: Mapping[str, int]  # the number of items that each filter hides by itself
    num_shown: int  # items that may be shown to the user
    best: tuple[Shown, ...]
    num_published: int
    num_common: int  # of them, those that are in the list of exact search too
    item: str | None = None
    why: str | None = None  # what became of the item


def explanation_text(explanation: Explanation) -> str:
    """Write the explanation as lines."""
    reason = f", {explanation.reason}" if explanation.reason else ""
    lines = [
        f"user {explanation.user_id}: {explanation.user_status}{reason}",
        f"the last {len(explanation.last_events)} of {explanation.num_events:,} events:",
        *(
            f"  {event.day}  {event.item}{'' if event.is_hidden else '  (may be shown again)'}"
            for event in explanation.last_events
        ),
        f"of {explanation.num_items:,} items {explanation.num_shown:,} may be shown; each filter by itself hides:",
        *(f"  {number:>9,}  {name}" for name, number in explanation.hidden.items()),
    ]
    if explanation.best:
        lines.append(
            f"the best by exact search; of the published list of {explanation.num_published}, "
            f"{explanation.num_common} are in the list that exact search makes:"
        )
    for shown in explanation.best:
        counts = f", of it {shown.counts:.4f} by counts" if shown.counts else ""
        place = "" if shown.published_rank else "  (not published)"
        pairs = ", ".join(f"{name} {weight:.0%} of {logit:.2f}" for name, weight, logit in shown.pairs)
        lines += [
            f"  {shown.rank:>3}. {shown.item}: {shown.score:.4f}{counts}{place}",
            f"       pairs {pairs}; nearest in the history: {', '.join(shown.nearest)}",
        ]
    if explanation.item is not None:
        lines.append(f"{explanation.item}: {explanation.why}")
    return "\n".join(lines)
