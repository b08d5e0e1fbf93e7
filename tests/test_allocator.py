"""`keep_memory` keeps memory, where there is a malloc that can, and says so where there is none."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from armor.training import allocator, loop
from armor.training.config import TrainConfig
from armor.training.resolve import resolve

# Four blocks of 16 MB, freed together, as the activations of a net are: more than malloc keeps of its own accord.
COUNT = """
import resource, torch
from armor.training.allocator import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(4 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual, can = faults(), keep_memory()
faults()
print(usual, int(can), faults())
"""


def test_memory_is_kept():
    """In a process of its own: nothing takes it back. A page that was never given back causes no fault."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    usual, can, kept = map(int, done.stdout.split())
    if not can:
        pytest.skip("the C library has no mallopt")
    assert kept < usual / 10


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda *_: 0)])
def test_another_c_library_is_left_alone(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert allocator.keep_memory() is False


def test_a_job_on_the_cpu_asks_for_it(monkeypatch):
    class Loading(Exception):
        pass

    def load(*_):
        raise Loading

    asked = []
    monkeypatch.setattr(loop, "keep_memory", lambda: asked.append(True))
    monkeypatch.setattr(loop.data, "load", load)
    with pytest.raises(Loading):
        loop.run_job(loop.Job("balanced", 0, "mean"), lambda _: None, resolve(TrainConfig(device="cpu")))
    assert asked == [True]
