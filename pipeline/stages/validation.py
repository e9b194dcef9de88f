"""Validation in a training: held-out items in the lists of the validation users, found by a night's search."""

import numpy as np
import torch

from pipeline.data.batches import ValidationUsers
from pipeline.evaluation.metrics import Bools, find_hits, hit_rate_at_k, ndcg_at_k
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.model.validation import RankingSums
from pipeline.retrieval.all_items import quick_and_exact, search_all_items
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import NotFiniteError
from pipeline.settings import SearchBackend
from pipeline.stages.encode import encode_sequences

USERS_AT_ONCE = 16_384  # with queries in memory, a kilobyte each; the items are embedded again for each tile of users


@torch.inference_mode()
def rank_by_search(backend: SearchBackend, model: RetrievalModel, users: ValidationUsers, cutoff: int) -> RankingSums:
    """Rank the items that may be shown to each user by exact search. No figure depends on the backend.

    A user whose query is not finite has no hit. Nobody has one when a vector of an item, or a score, is not a number:
    weights that no search can use are the worst.
    """
    model.eval()
    try:
        tiles = users.tiles(USERS_AT_ONCE)
        return sum((_rank_tile(backend, model, tile, cutoff) for tile in tiles), start=RankingSums())
    except NotFiniteError:
        return RankingSums()


def _rank_tile(backend: SearchBackend, model: RetrievalModel, users: ValidationUsers, cutoff: int) -> RankingSums:
    queries = encode_sequences(model, users.histories, users.user_keys)
    sound = queries.is_finite_B.nonzero()[:, 0]
    asking = users.take(sound.numpy())
    is_hit_BK = _hits(backend, model, queries.take(sound).to(model.device), asking, cutoff)
    ndcg_B = ndcg_at_k(is_hit_BK, asking.held_out.lengths, cutoff)
    return RankingSums(float(hit_rate_at_k(is_hit_BK, cutoff).sum()), float(ndcg_B.sum()))


def _hits(
    backend: SearchBackend, model: RetrievalModel, queries: QuerySide, users: ValidationUsers, cutoff: int
) -> Bools:
    """(B, K): whether this place of a user's exact list holds a held-out item."""
    quick, exact = quick_and_exact(cutoff, backend)
    no_bonus = np.zeros(len(users.held_out.values), np.float32)  # makes each held-out item a candidate
    rules = Rules(users.seen, bonuses=Bonuses(users.held_out, no_bonus, model.num_items))
    guess = search_all_items(model, queries, rules, quick)
    likely = np.flatnonzero(find_hits(guess.rows_BK.cpu().numpy(), users.held_out).any(axis=1))
    asking, at = users.take(likely), torch.from_numpy(likely).to(model.device)
    best = search_all_items(model, queries.take(at), Rules(asking.seen), exact)
    is_hit_BK = np.zeros((len(users), cutoff), dtype=np.bool_)
    is_hit_BK[likely] = find_hits(best.rows_BK.cpu().numpy(), asking.held_out)
    return is_hit_BK
