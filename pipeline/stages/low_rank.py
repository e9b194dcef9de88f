"""Fitting the low-rank table of a corpus, as one unit of work before the shards are made."""

import logging

import numpy as np
import torch

from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64
from pipeline.errors import InputError
from pipeline.evaluation.targets import sampling_keys
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import write_low_rank
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.low_rank import pair_multiply_adds, score_all
from pipeline.retrieval.low_rank_fit import MAX_RANK_SHARE, fit_low_rank
from pipeline.retrieval.shard import embed_rows, make_shard
from pipeline.settings import Settings
from pipeline.stages.devices import device_for
from pipeline.stages.encode import encode_sequences
from pipeline.stages.runner import Payload

SEED = 0  # of the samples of users and items, and of the random draws in the fit

log = logging.getLogger("nightrails")


class LowRankFitter:
    """Scores sampled items for sampled users of tonight, fits the low-rank table to the scores and writes it."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._device = device_for(settings.cluster.gpus_per_actor)

    def __call__(self, unit: int, payload: Payload) -> Payload:
        """Write the fit; the unit is not used and the payload passes through.

        Too few users are an InputError where the table was asked for by name; a tuned search goes without.
        """
        storage = self._night.storage
        settings = self._settings.corpus.low_rank
        model = load_model(storage, self._night.checkpoint)
        queries = sample_queries(self._night, self._settings, model)
        model = model.to(self._device)
        rng = np.random.default_rng(SEED)
        num_items = min(settings.num_items, model.num_items)
        rows = np.sort(rng.choice(model.num_items, num_items, replace=False))
        items = embed_rows(model, torch.from_numpy(rows).to(self._device))
        index = open_index(model.mol, make_shard(0, items), self._settings.search)
        scores_LS = score_all(index, queries.to(self._device)).cpu()  # the fit runs on the CPU
        max_rank = min(int(MAX_RANK_SHARE * len(scores_LS)), num_items)
        if max_rank < 2:
            if self._settings.search.method == "tuned":
                return payload
            raise InputError(f"{len(scores_LS)} users are too few for search.method topk_low_rank; use exact")
        ranks = sorted({min(rank, max_rank) for rank in settings.ranks})
        if ranks[-1] < max(settings.ranks):
            log.warning("the low-rank table has at most rank %d, because there are few users or items", ranks[-1])
        item_share = num_items / model.num_items
        fit = fit_low_rank(queries, scores_LS, ranks, item_share, pair_multiply_adds(model.mol), SEED)
        trials = ", ".join(f"rank {trial.rank} needs K' {trial.num_needed:.0f}" for trial in fit.trials)
        num_anchors = len(fit.low_rank.at_A)
        log.info("low-rank table: %s; rank %d is cheapest, with %d anchors", trials, fit.chosen.rank, num_anchors)
        write_low_rank(storage, self._night.corpus, fit)
        return payload


# Share of a bucket's users, those with the lowest sampling keys, that the fit may use; the rest judge a search method.
FITTED_SHARE = 0.8


def fitted_users(bucket: Bucket) -> Int64:
    """Bucket rows of the users with a history that the fit may use, in random order."""
    users = _by_key(bucket)
    return users[: int(np.ceil(FITTED_SHARE * len(users)))]


def judging_users(bucket: Bucket) -> Int64:
    """Bucket rows of the users with a history that the fit does not use, in random order."""
    users = _by_key(bucket)
    return users[int(np.ceil(FITTED_SHARE * len(users))) :]


def _by_key(bucket: Bucket) -> Int64:
    users = np.argsort(sampling_keys(bucket.user_keys, SEED), kind="stable")
    return users[bucket.cut("whole").lengths[users] > 0]


def sample_queries(night: Night, settings: Settings, model: RetrievalModel) -> QuerySide:
    """The queries of tonight's users, at most `corpus.low_rank.num_queries`.

    The users of the first buckets are a random sample, because a hash puts users into buckets. So the fit sees
    tonight's mix of history lengths: a sample of long histories only would cost recall on short ones.
    """
    num_queries = settings.corpus.low_rank.num_queries
    parts: list[QuerySide] = []
    for unit in range(settings.output.num_buckets):
        missing = num_queries - sum(len(part.gate_BP) for part in parts)
        if missing <= 0:
            break
        bucket = read_bucket(night.storage, night.histories, unit)
        users = fitted_users(bucket)[:missing]
        queries = encode_sequences(model, bucket.cut("whole", model.encoder.reads).take(users), bucket.user_keys[users])
        parts.append(queries.take(queries.is_finite_B.nonzero()[:, 0]))
    return QuerySide.cat(parts)
