"""Which threads of a launch run next: those that are furthest behind, so that threads that have parted meet again where
their ways do. Threads rest at barriers, at shuffles that others of their warp have not reached, and in loops that wait
for other blocks.
"""

from __future__ import annotations

import numpy as np
from kernelcheck.faults import Deadlock, Divergence
from kernelcheck.threads import Group

PATIENCE = 1000  # rounds that waiting loops may take while nothing in memory changes
STEPS = 20_000_000  # basic blocks that a launch may run
TURN = 50  # basic blocks that a cohort runs before another one may
COHORTS = 4  # parts of a launch that run out of step in random order


class Scheduler:
    def __init__(self, machine, generator=None):
        self._machine = machine
        self._generator = generator
        layout = machine.layout
        self._cohorts = [Cohort(machine, group) for group in _cohorts(layout, COHORTS if generator else 1)]

    def run(self) -> int:
        """Runs all threads to their end; how many instructions their warps executed."""
        steps, fruitless, changes = 0, 0, -1
        while True:
            active = [cohort for cohort in self._cohorts if cohort.ready]
            if active:
                cohort = active[0] if self._generator is None else self._generator.choice(active)
                steps += cohort.advance(TURN if self._generator is None else self._generator.randint(1, TURN))
                if steps > STEPS:
                    cohort.give_up(Deadlock, f"no end after {STEPS} basic blocks")
                continue
            waiting = [cohort for cohort in self._cohorts if cohort.resting]
            memory = self._machine.memory
            fruitless, changes = (fruitless + 1 if memory.changes == changes else 0), memory.changes
            if waiting and fruitless < PATIENCE:
                for cohort in waiting:
                    cohort.wake()
                continue
            lagging = [cohort for cohort in self._cohorts if cohort.parked]
            if lagging:
                lagging[0].insist()
            elif waiting:
                waiting[0].give_up(Deadlock, "waits for ever for what another thread should write")
            else:
                break
        for cohort in self._cohorts:
            cohort.check_barriers()
        return sum(cohort.executed for cohort in self._cohorts)


def _cohorts(layout, parts: int) -> list[Group]:
    """All threads, in groups of whole blocks."""
    groups = []
    for places in np.array_split(np.arange(len(layout.blocks)), parts):
        if len(places):
            start, end = int(places[0]) * layout.per_block, (int(places[-1]) + 1) * layout.per_block
            groups.append(Group(slice(start, end), layout))
    return groups


class Cohort:
    """Blocks whose threads run in step wherever they can. The dictionaries hold groups of threads by the number of the
    basic block that they are to run, or to leave."""

    def __init__(self, machine, group: Group):
        self.machine = machine
        self.ready: dict[int, Group] = {0: group}
        self.parked: dict[int, Group] = {}  # before a shuffle, until the rest of their warps comes
        self.arrived: dict[int, Group] = {}  # at a barrier
        self.resting: dict[int, Group] = {}  # in a loop that waits
        self.executed = 0

    def advance(self, most: int = 1, insisted: bool = False) -> int:
        """Runs the threads that are furthest behind until they part, wait or catch up with others, but not for more
        than so many basic blocks. How many these were."""
        steps = 0
        number = min(self.ready)
        group = self.ready.pop(number)
        while True:
            block = self.machine.block(number)
            if block.has_collectives and not insisted and not self._complete(group):
                self._add(self.parked, number, group)
                return steps + 1
            insisted = False
            lanes = group.lanes
            for step in block.steps:
                step(lanes)
            self.executed += block.length * group.warps
            steps += 1
            following = block.leave(self, number, group)
            if following is None:
                return steps
            overtaking = self.ready and min(self.ready) <= following
            if overtaking or following in self.parked or steps >= most:
                self.push(following, group)
                return steps
            number = following

    def push(self, number: int, group: Group):
        """Has threads run a basic block, together with those that wait there."""
        if number in self.parked:
            group = group.merged(self.parked.pop(number))
        self._add(self.ready, number, group)

    def rest(self, number: int, group: Group):
        self._add(self.resting, number, group)

    def wake(self):
        resting, self.resting = self.resting, {}
        for number, group in resting.items():
            self.push(number, group)

    def insist(self):
        """Runs threads that wait for others which will not come; the instruction itself says whom it misses."""
        number = min(self.parked)
        self.ready[number] = self.parked.pop(number)
        self.advance(insisted=True)

    def end(self, group: Group):
        self.machine.end(group)

    def arrive(self, number: int, group: Group) -> int | None:
        """Threads at a barrier, which is the end of this basic block: the block that follows, once all are there."""
        if not group.has_whole_blocks:
            self._add(self.arrived, number, group)
            return self._release()
        self.machine.pass_barrier(group)
        return number + 1

    def _release(self):
        """Lets those blocks go of which every thread has come to a barrier."""
        layout = self.machine.layout
        present = sum(np.bincount(layout.place[g.lanes], minlength=len(layout.blocks)) for g in self.arrived.values())
        complete = present == layout.per_block
        if not complete.any():
            return
        passing = []
        for number, group in list(self.arrived.items()):
            chosen = complete[layout.place[group.lanes]]
            if not chosen.any():
                continue
            del self.arrived[number]
            through, rest = group.split(chosen)
            if len(rest):
                self.arrived[number] = rest
            passing.append((number, through))
        self._check_same_barrier(passing)
        for number, group in passing:
            self.machine.pass_barrier(group)
            self.push(number + 1, group)

    def _check_same_barrier(self, passing: list[tuple[int, Group]]):
        """`barrier.sync` may be reached at different places of a kernel, `bar.sync` not."""
        place = self.machine.layout.place
        seen: dict[int, tuple[int, Group]] = {}
        for number, group in passing:
            for block in np.unique(place[group.lanes]).tolist():
                other = seen.setdefault(block, (number, group))
                sites = [self.machine.block(n).last for n in (number, other[0])]
                if other[0] != number and any("bar" in site.opcode for site in sites):
                    text = f"while {self.machine.layout.name(other[1].numbers[0])} is at `{sites[1].text}` elsewhere"
                    raise Divergence(sites[0].message(group.lanes, text))

    def check_barriers(self):
        if self.arrived:
            self.give_up(Divergence, "waits at a barrier that other threads of the block never reach")

    def give_up(self, error: type[Exception], text: str):
        groups = {**self.ready, **self.parked, **self.resting, **self.arrived}
        number = min(groups)
        raise error(self.machine.block(number).last.message(groups[number].lanes, text))

    def _complete(self, group: Group) -> bool:
        return group.has_whole_warps or self.machine.others_have_ended(group)

    @staticmethod
    def _add(groups: dict[int, Group], number: int, group: Group):
        groups[number] = group.merged(groups[number]) if number in groups else group
