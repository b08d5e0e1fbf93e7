"""What every test runs under: poisoned uninitialised memory, one thread, and no GPU test without a GPU."""

import signal

import pytest
import torch
from poison import poisoned_memory

try:
    from hypothesis import settings
except ImportError:  # `make gpu` takes a machine as it is
    pass
else:
    # Test machines are shared and slow at times; a failing example is printed so that it can be replayed.
    settings.register_profile("armor", deadline=None, print_blob=True)
    settings.load_profile("armor")


@pytest.fixture(autouse=True)
def unwritten_memory_is_poisoned():
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c_works():
    """Also where the tests run in the background of a script, whose shell has Ctrl-C ignored; children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        no_device = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            on_gpu = getattr(item.module, "DEVICE", "cuda") == "cuda"  # test_gpu.py may be tried elsewhere
            if item.get_closest_marker("gpu") and on_gpu:
                item.add_marker(no_device)
