"""What the programs of one launch do to memory: every access must lie inside of its tensor, and whatever two programs,
or two lanes of one, do to the same element must be ordered. `strict` reports the accesses, program after program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NOBODY, SEVERAL = -1, -2  # in place of the number of a program


class StrictError(RuntimeError):
    """A kernel did what the interpreter lets pass and a device does not."""


class OutOfBounds(StrictError):
    """A lane that is not masked accesses memory outside of the tensor that its pointer came from."""


class Race(StrictError):
    """Two programs, or two lanes of one, touch the same element, one of them writes, and nothing orders them."""


class Touched:
    """For every element of a storage: the last program that wrote it, when, which of its lanes, and before which of its
    barriers; which program has read it, and when; which has changed it atomically."""

    def __init__(self, elements: int):
        self.writer, self.reader, self.changer = (np.full(elements, NOBODY) for _ in range(3))
        self.written, self.read, self.lane, self.phase = (np.zeros(elements, np.int64) for _ in range(4))


@dataclass(frozen=True)
class Argument:
    """A tensor that a kernel was given. `start` is the place of its first element in its storage."""

    name: str
    first: int
    itemsize: int
    elements: int
    start: int
    touched: Touched

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        """In bytes, from the first element."""
        return (addresses - np.uint64(self.first)).view(np.int64)

    def outside(self, addresses: np.ndarray) -> np.ndarray:
        offsets = self.offsets(addresses)
        return (offsets < 0) | (offsets >= self.elements * self.itemsize) | (offsets % self.itemsize != 0)


class Accesses:
    """The memory of one launch, and what each of its programs knows of the others."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]):
        self.kernel = kernel
        self.arguments: list[Argument] = []
        self.writes = 0
        self._clock = 0
        touched: dict[tuple[int, int], Touched] = {}  # tensors may share a storage
        for name, t in tensors.items():
            storage, size = t.untyped_storage(), t.element_size()
            shared = touched.setdefault((storage.data_ptr(), size), Touched(storage.nbytes() // size))
            span = sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
            elements = span + 1 if t.numel() else 0
            self.arguments.append(Argument(name, t.data_ptr(), size, elements, t.storage_offset(), shared))
        # {another program: until when its accesses come before what follows here}. A release leaves what a program
        # knows at the address of its atomic operation, and an acquire there takes it up.
        self._known: dict[int, dict[int, int]] = {}
        self._released: dict[int, dict[int, int]] = {}
        self._names: dict[int, Any] = {}

    def begin_program(self, number: int, name: Any) -> None:
        self._me, self._phase = number, 0
        self._names[number] = name

    def barrier(self) -> None:
        """Of the lanes of the program."""
        self._phase += 1

    def read(self, addresses: np.ndarray, mask: np.ndarray, origin: int | None) -> None:
        argument, at, lanes = self._located("reads", addresses, mask, origin)
        t = argument.touched
        self._forbid(self._unordered(t.writer[at], t.written[at]), argument, at, "reads", "wrote", t.writer)
        self._forbid(self._foreign(t.changer[at]), argument, at, "reads", "changed atomically", t.changer)
        self._forbid(self._other_lanes(t, at, lanes), argument, at, "reads", "wrote, without a barrier")
        self._mark(t.reader, at)
        t.read[at] = self._clock

    def write(self, addresses: np.ndarray, mask: np.ndarray, origin: int | None) -> None:
        argument, at, lanes = self._located("writes", addresses, mask, origin)
        t = argument.touched
        self.writes += 1
        again = np.ones(at.shape, bool)
        again[np.unique(at, return_index=True)[1]] = False
        self._forbid(again, argument, at, "writes", "writes")
        self._forbid(self._unordered(t.writer[at], t.written[at]), argument, at, "writes", "wrote", t.writer)
        self._forbid(self._unordered(t.reader[at], t.read[at]), argument, at, "writes", "read", t.reader)
        self._forbid(self._foreign(t.changer[at]), argument, at, "writes", "changed atomically", t.changer)
        self._forbid(self._other_lanes(t, at, lanes), argument, at, "writes", "wrote, without a barrier")
        t.writer[at], t.written[at], t.lane[at], t.phase[at] = self._me, self._clock, lanes, self._phase

    def change(self, addresses: np.ndarray, mask: np.ndarray, origin: int | None, semantics: str, scope: str) -> None:
        """An atomic operation. It orders programs unless it is relaxed, or for the lanes of one program alone."""
        argument, at, _ = self._located("changes", addresses, mask, origin)
        t = argument.touched
        self.writes += 1
        self._forbid(self._unordered(t.writer[at], t.written[at]), argument, at, "changes", "wrote", t.writer)
        self._forbid(self._unordered(t.reader[at], t.read[at]), argument, at, "changes", "read", t.reader)
        self._mark(t.changer, at)
        if semantics == "ACQUIRE_RELEASE" and addresses.size == 1:
            self.barrier()  # all lanes wait for the one that does it
        if scope == "CTA":
            return
        known = self._known.setdefault(self._me, {})
        for address in {argument.first + (int(i) - argument.start) * argument.itemsize for i in at}:
            if semantics in ("ACQUIRE", "ACQUIRE_RELEASE"):
                _learn(known, self._released.get(address, {}))
            if semantics in ("RELEASE", "ACQUIRE_RELEASE"):
                _learn(self._released.setdefault(address, {}), {**known, self._me: self._clock})

    def program(self) -> str:
        return f"{self.kernel}: program {self._names[self._me]}"

    def _located(
        self, does: str, addresses: np.ndarray, mask: np.ndarray, origin: int | None
    ) -> tuple[Argument, np.ndarray, np.ndarray]:
        """The tensor, the places in its storage and the lanes of an access; none if all lanes are masked. `origin` is
        the address that the pointers were made from, if that is known."""
        self._clock += 1
        addresses, mask = (a.ravel() for a in np.broadcast_arrays(addresses, mask))
        lanes = np.flatnonzero(mask)
        addresses = addresses[lanes]
        candidates = [a for a in self.arguments if a.first == origin] or self.arguments
        argument = min(candidates, key=lambda a: int(a.outside(addresses).sum()))
        outside = argument.outside(addresses)
        if outside.any():
            element = argument.offsets(addresses)[outside][0] / argument.itemsize
            raise OutOfBounds(
                f"{self.program()} {does} element {element:g} of {argument.name}, which has {argument.elements}"
            )
        return argument, argument.start + argument.offsets(addresses) // argument.itemsize, lanes

    def _foreign(self, programs: np.ndarray) -> np.ndarray:
        return (programs != NOBODY) & (programs != self._me)

    def _unordered(self, programs: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Where another program did something at a time of which this one need not know."""
        unordered = self._foreign(programs)
        known = self._known.get(self._me, {})
        for other in np.unique(programs[unordered & (programs != SEVERAL)]):
            unordered &= (programs != other) | (times > known.get(int(other), -1))
        return unordered

    def _other_lanes(self, t: Touched, at: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Where another lane of this program has written since the last barrier."""
        return (t.writer[at] == self._me) & (t.phase[at] == self._phase) & (t.lane[at] != lanes)

    def _mark(self, programs: np.ndarray, at: np.ndarray) -> None:
        programs[at] = np.where(self._foreign(programs[at]), SEVERAL, self._me)

    def _forbid(
        self,
        bad: np.ndarray,
        argument: Argument,
        at: np.ndarray,
        does: str,
        did: str,
        programs: np.ndarray | None = None,
    ) -> None:
        if not bad.any():
            return
        place = int(at[np.flatnonzero(bad)[0]])
        who = "another lane of it" if programs is None else self._name(int(programs[place]))
        raise Race(f"{self.program()} {does} {argument.name}[{place - argument.start}], which {who} {did}")

    def _name(self, number: int) -> str:
        return "several programs" if number == SEVERAL else f"program {self._names[number]}"


def _learn(known: dict[int, int], more: dict[int, int]) -> None:
    known.update({program: max(time, known.get(program, -1)) for program, time in more.items()})
