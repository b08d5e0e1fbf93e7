"""Counts what a computation asks of a GPU, without one: launches, the times that the host waits, and bytes.

`Counter` watches the operators that a piece of code calls. `fake_cuda` gives it tensors that call themselves CUDA
tensors and hold nothing, so that the code takes the ways that it takes on a GPU. Called by measure.py and counts.py.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import armor.library  # noqa: F401  (registers torch.ops.armor)

CUDA, META = torch.device("cuda:0"), torch.device("meta")
aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Inside, the operators on tensors of a device (any but the CPU) are counted.

    operators: (name, bytes) of those that compute or copy on the device, each a launch of at least one kernel; views
        compute nothing. The bytes are those of the arguments that are read and of the results, each once and as many as
        are in memory, so that those of an in-place operator are too few.
    syncs: the times that the host waits: for a number (`.item()`, `if tensor:`), for a shape that depends on data
        (`nonzero`, a mask as index), or for a copy between host and device, unless it is one to the device that asked
        for non_blocking.
    """

    COMPUTE_NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "device")

    def __init__(self):
        super().__init__()
        self.operators, self.syncs = [], 0

    @property
    def bytes(self):
        return sum(moved for _, moved in self.operators)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(map(_on_device, given)):
            if func in ANSWERS:
                self.syncs += 1
                return ANSWERS[func](*args)
            if _indexed_by_mask(func, args):
                self.syncs += 1
                return _indexed(*args)
        copied = _copied(func, args, kwargs)
        if copied == "to the host":
            self.syncs += 1
            return _host_copy(func, args, kwargs)
        result = func(*args, **kwargs)
        if copied == "to the device":
            self.syncs += not kwargs.get("non_blocking", False)
            return result
        unread = UNREAD[func](*args) if func in UNREAD else []
        given = [t for t in given if not any(t is other for other in unread)]
        tensors = {id(t): t for t in (*given, *tree_leaves(result)) if isinstance(t, torch.Tensor)}
        if any(map(_on_device, tensors.values())) and not func.is_view and func._opname not in self.COMPUTE_NOTHING:
            self.operators.append((func.name(), sum(map(_bytes, tensors.values()))))
        return result


def _on_device(t):
    return t.device.type != "cpu"


def _bytes(t):
    """Of the elements in memory: an expanded dimension has one."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _dual_backward_ignores(grad_value, mu, weights, losses, costs, clean_losses):
    """Only with costs does the gradient depend on mu, and only with clean losses on which branch a sample took."""
    return [t for t, needs in ((mu, costs), (losses, clean_losses)) if needs is None]


UNREAD = {torch.ops.armor.dual_backward.default: _dual_backward_ignores}


# ---- what the host waits for, and gets from tensors that hold nothing ------------------------------------------------


def _number(t):
    """Any will do that neither stops a training nor divides by zero."""
    return {torch.bool: False}.get(t.dtype, 1.0 if t.is_floating_point() else 1)


def _rows(t):
    """As many as there can be."""
    return t.new_empty(t.numel(), t.dim(), dtype=torch.int64)


ANSWERS = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda a, b: False,
    aten.nonzero.default: _rows,
    aten.masked_select.default: lambda t, mask: t.new_empty(t.numel()),
    aten._unique2.default: lambda t, *_: tuple(t.new_empty(t.numel(), dtype=d) for d in (t.dtype, *2 * [torch.int64])),
}
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def _indexed_by_mask(func, args):
    return func in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _indexed(t, indices, *values):
    """The tensor that was written to, or as many entries as a mask can choose."""
    masked = sum(1 if i is None else i.dim() for i in indices)
    return t if values else t.new_empty(indices[0].numel(), *t.shape[masked:])


def _copied(func, args, kwargs):
    """Which way an operator copies between host and device, if it does."""
    if func is aten._to_copy.default:
        ends = args[0].device, torch.device(kwargs.get("device") or args[0].device)
    elif func is aten.copy_.default:
        ends = args[1].device, args[0].device
    else:
        return None
    from_host, to_host = (end.type == "cpu" for end in ends)
    return None if from_host == to_host else "to the host" if to_host else "to the device"


def _host_copy(func, args, kwargs):
    """Numbers for the host to go on with, e.g. the losses that SciPy solves for."""
    into = args[0]
    if func is aten._to_copy.default:
        into = torch.empty(into.shape, dtype=kwargs.get("dtype") or into.dtype)
    return into.copy_(torch.linspace(0.5, 1.5, into.numel()).view(into.shape))


# ---- tensors that call themselves CUDA tensors -----------------------------------------------------------------------


CUDA_PROPERTIES = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_meta.__get__: False,
}
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)


class _CallsItselfCuda(TorchFunctionMode):
    """Python sees CUDA tensors, and everything below it sees meta tensors: PyTorch's own FakeTensor would have
    autograd ask the CUDA driver for streams, which needs a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CUDA_PROPERTIES and args[0].device == META:
            return CUDA_PROPERTIES[func]
        args, kwargs = tree_map(_meta_for_cuda, (args, kwargs or {}))
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device} | kwargs
        if func in FROM_NUMBERS and kwargs.get("device") == META and not isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs | {"device": "cpu"}).to(META)  # PyTorch drops the numbers of meta tensors
        return func(*args, **kwargs)


def _meta_for_cuda(value):
    named = isinstance(value, str) and value.split(":")[0] == "cuda"
    return META if named or (isinstance(value, torch.device) and value.type == "cuda") else value


@contextlib.contextmanager
def fake_cuda():
    """Inside, a tensor made on the device that is yielded calls itself a CUDA tensor, and holds nothing."""
    with _CallsItselfCuda():
        yield CUDA
