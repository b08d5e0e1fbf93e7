"""pytest plugin: once ARMOR_UNTIL, a time.time(), is over, the tests or cases that are left are skipped and say so."""

import os
import time

import pytest

UNTIL = float(os.environ.get("ARMOR_UNTIL", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    if time.time() > UNTIL:
        pytest.skip("the time given was over")
