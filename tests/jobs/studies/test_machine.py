import os
import subprocess
import sys

from jobs.studies.machine import family, memory_of

MIB = 1 << 20
HOLD = "import sys; data = bytearray(64 << 20); print('ready', flush=True); sys.stdin.read()"


def test_a_childs_memory_is_seen_and_gone_when_it_has_ended():
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in family(os.getpid())
        assert memory_of(child.pid)["VmRSS"] > 64 * MIB
        assert memory_of(child.pid, "smaps_rollup")["Pss_Anon"] > 64 * MIB
        child.communicate()
    assert child.pid not in family(os.getpid())
    assert memory_of(child.pid) == {}
