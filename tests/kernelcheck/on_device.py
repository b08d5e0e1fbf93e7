"""The cases of cases_gpu.py on a real GPU: an engine that takes their CPU tensors there and the results back.

As a program, `python -m kernelcheck.on_device BACKEND` in tests/, it runs some of them for compute-sanitizer.
"""

import importlib
import sys
from types import SimpleNamespace

import torch
from kernelcheck.cases_gpu import bits, cases

from armor import library


class OnDevice:
    """The raw operators of `operators` for CPU tensors, computed on `device`."""

    def __init__(self, operators, device):
        self.operators, self.device = operators, torch.device(device)

    def __getattr__(self, op):
        def call(*arguments):
            given = [t.to(self.device) if isinstance(t, torch.Tensor) else t for t in arguments]
            result = getattr(self.operators, op)(*given)
            result = (result,) if isinstance(result, torch.Tensor) else tuple(result)
            assert all(t.device.type == self.device.type for t in result)
            assert self.device.index in (None, result[0].device.index)
            for before, after in zip(arguments, given, strict=True):
                if isinstance(before, torch.Tensor):
                    assert torch.equal(bits(before), bits(after.cpu())), f"{op} writes to one of its inputs"
            return tuple(t.cpu() for t in result)

        return call


def operators(backend):
    """The raw operators of a backend, "compiled" or "triton", whatever serves CUDA tensors otherwise."""
    if backend == "compiled":
        return torch.ops.armor
    modules = {op: importlib.import_module(f"armor_kernels.{op.partition('_')[0]}") for op in library.backends()}
    return SimpleNamespace(**{op: getattr(module, op) for op, module in modules.items()})


def main(backend):
    chosen = [c for c in cases(core=True, large=False) if backend == "triton" or not c.op.startswith("transport")]
    engine = OnDevice(operators(backend), "cuda")
    for case in chosen[::4]:
        # not case.run: to fill the memory first would hide that a kernel reads what it has not written
        case.check(getattr(engine, case.op)(*case.arguments))
    print(len(chosen[::4]), "cases of", backend)


def on_two_streams(step, both, cycles, repeats):
    """Outputs of step(*given), `repeats` for each of both, every one on a stream of its own at the same time.

    The inputs arrive on each stream only after it has slept for so many cycles: a launch on another stream would not
    wait for them.
    """
    arriving = [[torch.zeros_like(t) for t in given] for given in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    found = [[], []]
    for stream, given, later in zip(streams, both, arriving, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            for zeros, values in zip(later, given, strict=True):
                zeros.copy_(values)
    for _ in range(repeats):
        for stream, later, outputs in zip(streams, arriving, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(step(*later))
    torch.cuda.synchronize()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
