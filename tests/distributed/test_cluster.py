import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.distributed.cluster import ActorNeed, Cluster, Node, check_root, connect, deadline, preflight
from pipeline.errors import InfrastructureError, InputError
from pipeline.settings import Settings

ONE_NODE = Cluster((Node(4.0),), is_local=True)
THREE_NODES = Cluster((Node(0.0), Node(8.0, 1.0), Node(8.0, 1.0)), is_local=False)


def test_a_folder_is_refused_as_root_of_several_nodes():
    with pytest.raises(InputError, match=r"3 nodes.*root_is_shared"):
        check_root(Settings(root="/data"), THREE_NODES)
    with pytest.raises(InputError, match="3 nodes"):
        check_root(Settings(root="file:///data"), THREE_NODES)
    check_root(Settings(root="/data", root_is_shared=True), THREE_NODES)
    check_root(Settings(root="s3://bucket/prefix"), THREE_NODES)
    check_root(Settings(root="/data"), ONE_NODE)


def test_a_root_in_memory_is_refused_because_workers_are_other_processes():
    with pytest.raises(InputError, match="memory://"):
        check_root(Settings(root="memory://x"), ONE_NODE)


def test_preflight_names_what_is_missing():
    needs = [ActorNeed("searcher", 3, cpus=1.0, gpus=1.0), ActorNeed("encoder", 1, cpus=0.25)]
    with pytest.raises(InfrastructureError, match="1 of 3 searchers of 1 CPUs and 1 GPUs each"):
        preflight(THREE_NODES, needs)
    with pytest.raises(InputError, match="3 of 3 searchers"):
        preflight(ONE_NODE, needs)


def test_preflight_lets_pass_what_fits_node_by_node():
    preflight(THREE_NODES, [ActorNeed("searcher", 2, cpus=1.0, gpus=1.0), ActorNeed("encoder", 14, cpus=1.0)])
    preflight(ONE_NODE, [ActorNeed("searcher", 16, cpus=0.25)])
    with pytest.raises(InputError, match="1 of 17"):
        preflight(ONE_NODE, [ActorNeed("searcher", 17, cpus=0.25)])
    # Half a GPU is free on each of two nodes, which is not one GPU.
    with pytest.raises(InfrastructureError, match="1 of 2 searchers"):
        preflight(THREE_NODES, [ActorNeed("trainer", 1, 1.0, gpus=1.0), ActorNeed("searcher", 2, 1.0, gpus=0.6)])


def test_a_block_within_its_deadline_is_left_alone():
    with deadline(minutes=1):
        pass
    with pytest.raises(KeyError), deadline(minutes=1):
        raise KeyError("mine")


def test_a_block_past_its_deadline_is_an_infrastructure_error():
    started = time.monotonic()
    with pytest.raises(InfrastructureError, match="deadline"), deadline(minutes=0.2 / 60):
        threading.Event().wait(30)  # a wait on a lock, as in ray.get
    assert time.monotonic() - started < 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_deadline_also_works_off_the_main_thread():
    caught = []

    def work() -> None:
        try:
            with deadline(minutes=0.2 / 60):
                while True:
                    time.sleep(0.01)
        except InfrastructureError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert len(caught) == 1


@pytest.mark.parametrize("ignores", ["signal.signal(signal.SIGINT, signal.SIG_IGN)", "pass"])
def test_a_process_stuck_beyond_its_deadline_exits_with_30(ignores: str):
    program = f"""
import signal
from pipeline.distributed.cluster import deadline
{ignores}
with deadline(minutes=0.1 / 60, grace=0.5):
    while True:
        try:
            while True:
                pass
        except KeyboardInterrupt:
            pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == InfrastructureError.exit_code
    assert "deadline" in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9", "RAY_AUTH_MODE": "token"}, "no authentication token was found"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, "you set RAY_ADDRESS to an HTTP address"),
    ],
)
def test_an_address_or_token_that_is_wrong_by_itself_is_a_persons_business(environment, words, tmp_path):
    program = "from pipeline.distributed.cluster import *\ntry: connect(Settings())\nexcept InputError as e: print(e)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in done.stdout, done.stderr


@pytest.mark.ray
def test_connecting_again_joins_the_same_cluster(local_ray, tmp_path):
    first = connect(Settings(root=str(tmp_path)))
    assert connect(Settings(root=str(tmp_path))) == first
    assert first.num_cpus == 4.0
    assert "1 node, 4 CPUs, 0 GPUs" in str(first)
