"""README.md's way to a cluster, from a fresh shell to a table."""

import pytest

from pipeline.io.publication.reader import read_latest
from tests.jobs.cluster import readme_cluster, readme_lines

pytestmark = pytest.mark.ray

# What is tested is the way, not the night.
SMALLER_STILL = {"train.max_epochs": 1, "corpus.num_shards": 1, "output.num_buckets": 1, "evaluate.cutoffs": "[10]"}


def test_the_lines_of_the_readme_lead_from_a_fresh_shell_to_a_published_table():
    with readme_cluster(**SMALLER_STILL) as cluster:
        ended = cluster.run(readme_lines())
        assert ended.code == 0, ended.stdout[-4_000:] + ended.stderr[-4_000:]
        assert (cluster.folder / ".ray" / "auth_token").is_file(), "the cluster asked for a token"
        assert ended.last_line["status"] == "published"
        assert read_latest(cluster.root, "candidates").num_rows == ended.last_line["rows"]
