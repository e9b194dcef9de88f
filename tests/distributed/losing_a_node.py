"""A chain on two nodes, the second of which is lost on the way; run as a program, because it starts a cluster.

    python -m tests.distributed.losing_a_node FOLDER

The searcher's node is removed when unit KILLED_AT has been searched, and another node joins. The program fails unless
every unit has then passed every stage.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from pipeline.distributed.chain import Pool, run_chain
from pipeline.distributed.cluster import connect
from pipeline.settings import Settings
from pipeline.stages.runner import Stage

NUM_UNITS, KILLED_AT = 14, 3
FAST_DETECTION = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 1_000, "failure_threshold": 2}
PAYLOAD_BYTES = 300_000  # such objects lie in the object store of the node that made them, and are lost with it


class Stops:
    """A stage that leaves a mark for each unit; `seconds` is the duration of one unit."""

    def __init__(self, folder: str, name: str, seconds: float) -> None:
        self._folder, self._name, self._seconds = Path(folder), name, seconds

    def __call__(self, unit: int, payload: bytes) -> bytes:
        time.sleep(self._seconds)
        (self._folder / f"{self._name} {unit}").touch()
        return bytes(PAYLOAD_BYTES)


def main(folder: str) -> None:
    os.environ |= {f"RAY_health_check_{name}": str(value) for name, value in FAST_DETECTION.items()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    doomed = cluster.add_node(num_cpus=1, num_gpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connect(Settings(root=folder, root_is_shared=True, cluster={"no_progress_minutes": 1, "wait_minutes": 1}))
    assert signal.signal(signal.SIGTERM, handler) is signal.SIG_IGN, "ray.init sets a handler of its own"
    pools = [
        Pool(Stage(Stops, {"folder": folder, "name": "encoded", "seconds": 0.02}), 1, 0.25),
        Pool(Stage(Stops, {"folder": folder, "name": "searched", "seconds": 0.3}, gpus=1.0), 1, 0.25),
        Pool(Stage(Stops, {"folder": folder, "name": "written", "seconds": 0.6}), 1, 0.25),
    ]
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            run_chain("test", range(NUM_UNITS), pools, threads=1)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    chain = threading.Thread(target=run)
    chain.start()
    while not (Path(folder) / f"searched {KILLED_AT}").exists():
        time.sleep(0.05)
    cluster.remove_node(doomed, allow_graceful=False)
    cluster.add_node(num_cpus=1, num_gpus=1)
    chain.join()
    ray.shutdown()  # before the cluster ends, by which a driver that is still connected would end too
    assert ended == [None], ended
    missing = [unit for unit in range(NUM_UNITS) if not (Path(folder) / f"written {unit}").exists()]
    assert not missing, missing


if __name__ == "__main__":
    main(sys.argv[1])
