"""The C library is told; what it then does shows in page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading, torch
from rheostat.engines.allocation import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def steps():
    for _ in range(50):
        parts = [torch.ones(1 << 19) for _ in range(20)]  # 40 MiB in all
        del parts
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_take_the_memory_that_they_freed() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", SCRIPT, mode]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    pages = 40 * 256
    assert faults("keep") < 3 * pages
    assert faults("leave") > 6 * pages
