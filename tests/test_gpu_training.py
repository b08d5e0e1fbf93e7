"""The training package on a GPU: its paths against the plain one, steps as CUDA graphs, no wait for the device."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")  # and the others of the `train` extra

from armor.training.config import (
    AttackConfig,
    AverageConfig,
    AWPConfig,
    DualConfig,
    OptimizerConfig,
    SpeedConfig,
    TrainConfig,
)
from armor.training.graph import WARMUPS
from armor.training.resolve import resolve
from armor.training.step import make_state, precision, train_step

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("ARMOR_TEST_DEVICE", "cuda")
SHAPE, BATCH = (3, 32, 32), 16
PROBLEM = SimpleNamespace(shape=SHAPE, classes=10)
METHODS = ["pgd", "trades", "mart", "udr", "penalised-ot", "natural"]
# Of the loss, relative: the attack takes signs of gradients, so a rounding may turn a pixel around.
PATHS = {
    "plain": ({"channels_last": False, "fold": False}, 0.0),
    "default": ({}, 1e-2),
    "tf32": ({"precision": "tf32"}, 2e-2),
    "bf16": ({"precision": "bf16"}, 6e-2),
    "compile": ({"compile": True}, 2e-2),
    "graph": ({"cuda_graph": True}, 1e-2),
    "graph of compiled in bf16": ({"cuda_graph": True, "compile": True, "precision": "bf16"}, 6e-2),
}


def batches(count):
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, y = torch.rand(BATCH, *SHAPE, generator=draw), torch.randint(10, (BATCH,), generator=draw)
        yield x.to(DEVICE, memory_format=torch.channels_last), y.to(DEVICE)


def trained(method, count, speed=None, **changes):
    """Losses of some steps, and the state after them."""
    config = resolve(
        TrainConfig(
            data="cifar10",
            model="wrn-10-1",
            method=method,
            batch_size=BATCH,
            attack=AttackConfig(steps=3),
            speed=SpeedConfig(**speed or {}),
            device=DEVICE,
            **changes,
        )
    )
    state = make_state(config, 0, "dc", PROBLEM, 100)
    with precision(config):
        losses = torch.stack([train_step(state, x, y)[0] for x, y in batches(count)])
    return losses.cpu(), state


@pytest.mark.parametrize("path", list(PATHS)[1:])
@pytest.mark.parametrize("method", METHODS)
def test_paths_train_as_the_plain_one(method, path):
    count = WARMUPS + 3
    plain, _ = trained(method, count, PATHS["plain"][0])
    found, state = trained(method, count, PATHS[path][0])
    torch.testing.assert_close(found, plain, rtol=PATHS[path][1], atol=0)
    if "graph" in path:
        assert state.graph.captured is not None


@pytest.mark.parametrize("solve", ["learned", "frozen"])
@pytest.mark.parametrize("divergence", [("kl", None), ("alpha", 3.0), ("renyi", 1.5)], ids=lambda family: family[0])
def test_graphs_hold_the_duals_too(divergence, solve):
    count, dual = WARMUPS + 4, DualConfig(divergence[0], 0.2, 0.1, divergence[1], solve, lr=0.05)
    plain, eager = trained("udr", count, dual=dual)
    found, graphed = trained("udr", count, {"cuda_graph": True}, dual=dual)
    torch.testing.assert_close(found, plain, rtol=1e-2, atol=0)
    torch.testing.assert_close(graphed.dual.log_lam, eager.dual.log_lam, rtol=1e-2, atol=1e-3)
    assert (eager.dual.log_lam.item() != 0.0) == (solve == "learned")


EXTRAS = {
    "alone": {},
    "mixed, clipped and with AWP": {
        "natural_mix": 0.5,
        "awp": AWPConfig(0.005),
        "optimizer": OptimizerConfig(clip=5.0),
    },
    "learned": {"dual": DualConfig("alpha", alpha=3.0, solve="learned")},
    "bf16": {"speed": SpeedConfig(precision="bf16")},
}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method, extras):
    if method == "natural" and "mixed" in extras:
        pytest.skip("natural has nothing to mix")
    given = {"data": "cifar10", "model": "wrn-10-1", "batch_size": BATCH, "device": DEVICE, "method": method}
    config = resolve(TrainConfig(**given, **EXTRAS[extras]))
    state = make_state(config, 0, "dc", PROBLEM, 100)
    (x, y), *further = batches(3)
    train_step(state, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        records = [train_step(state, x, y) for x, y in further]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(records).isfinite().all()


def test_ema_beside_a_graph():
    """The average is updated outside of the graph."""
    _, state = trained("pgd", WARMUPS + 4, {"cuda_graph": True}, average=AverageConfig("ema", decay=0.5))
    _, plain = trained("pgd", WARMUPS + 4, average=AverageConfig("ema", decay=0.5))
    for graphed, eager in zip(state.judged.parameters(), plain.judged.parameters(), strict=True):
        assert (graphed - eager).norm() < 0.05 * eager.norm() + 1e-3
