"""README.md's way to a cluster, from a fresh shell to a table."""

import pytest

from pipeline.io.publication.reader import read_latest
from pipeline.native.loader import native_kernels
from tests.jobs.cluster import readme_cluster, readme_lines

pytestmark = pytest.mark.ray

# What is tested is the way, not the night.
SMALLER_STILL = {
    "train.max_epochs": 1,
    "train.refit": 0,
    "memory.enabled": False,
    "corpus.num_shards": 1,
    "output.num_buckets": 1,
    "evaluate.cutoffs": "[10]",
}


def test_the_lines_of_the_readme_lead_from_a_fresh_shell_to_a_published_table_searched_with_native_kernels():
    """On two nodes, from a checkout whose package has no compiled library: Ray leaves out what .gitignore names."""
    with readme_cluster(**SMALLER_STILL, root_is_shared=True) as cluster:
        for library in (cluster.checkout / "pipeline").rglob("*.so"):
            library.unlink()
        lines = readme_lines()
        # A second node on this machine: in the first one's folder each would delete the other's copy of the package.
        second = 'command ray start --address="$(cat $RAY_TMPDIR/ray/ray_current_cluster)" --temp-dir="$RAY_TMPDIR/2"'
        lines.insert(lines.index("ray start --head") + 1, second)
        ended = cluster.run(lines)
        assert ended.code == 0, ended.stdout[-4_000:] + ended.stderr[-4_000:]
        assert (cluster.folder / ".ray" / "auth_token").is_file(), "the cluster asked for a token"
        assert ended.last_line["status"] == "published"
        assert read_latest(cluster.root, "candidates").num_rows == ended.last_line["rows"]
        kernels = native_kernels()
        if kernels.functions is None:
            assert "2 nodes search with torch, many times slower: " in ended.stdout
            return
        assert "2 nodes search with native" in ended.stdout
        assert ended.last_line["backends"] == {f"native {kernels.instruction_set}": 1}
        warnings = [line for line in ended.last_line["warnings"] if "worse than counting" not in line]
        assert warnings == []  # but for the model, after one epoch
