"""Runs jobs in worker processes, with one progress bar and a clean end on failure or Ctrl-C.

Called by run.py. A job's result depends on the job alone, never on the worker or the number of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from tqdm import tqdm

POLL_SECONDS = 0.2


class JobError(RuntimeError):
    """A job failed or its worker died; the cause, with the worker's traceback, is chained."""


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[Any], work: Sequence[float], workers: int, threads: int
) -> list[Any]:
    """[function(job, progress) for job in jobs], shared among workers; raises JobError at the first failure.

    function must be importable by name and report through progress(amount) what adds up to the job's entry
    of `work`. With one worker the jobs run in this process.
    """
    # Not a terminal: a line now and then instead of a bar that moves.
    interval = 0.1 if sys.stderr.isatty() else 20
    bar = tqdm(
        total=sum(work),
        mininterval=interval,
        bar_format="{percentage:3.0f}% |{bar:30}| {elapsed} < {remaining} {postfix}",
    )
    with bar:
        if min(workers, len(jobs)) == 1:
            return _run_here(function, jobs, threads, bar)
        return _run_in_processes(function, jobs, min(workers, len(jobs)), threads, bar)


def _run_here(function: Callable[..., Any], jobs: Sequence[Any], threads: int, bar: tqdm) -> list[Any]:
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results: list[Any] = []
        for job in jobs:
            bar.set_postfix_str(f"{job} ({len(results)} of {len(jobs)} done)", refresh=False)
            try:
                results.append(function(job, bar.update))
            except Exception as error:
                raise JobError(f"{job} failed: {type(error).__name__}: {error}") from error
        return results
    finally:
        torch.set_num_threads(previous)


def _run_in_processes(
    function: Callable[..., Any], jobs: Sequence[Any], workers: int, threads: int, bar: tqdm
) -> list[Any]:
    # spawn: a forked child would inherit CUDA and thread pools in a state it cannot use.
    context = multiprocessing.get_context("spawn")
    # Each job adds to its own cell, so no lock exists that a killed worker could hold.
    done_work = context.RawArray("d", len(jobs))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (done_work, threads))
    results: dict[int, Any] = {}
    try:
        with _sigint_held():
            futures = {pool.submit(_call, function, job, number): number for number, job in enumerate(jobs)}
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                results[futures[future]] = _result(future, jobs[futures[future]])
            bar.set_postfix_str(f"{len(results)} of {len(jobs)} jobs done", refresh=False)
            bar.update(sum(done_work) - bar.n)
    except BaseException:
        # Waiting for the running jobs could take minutes, and nobody wants their results any more.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()
    return [results[number] for number in range(len(jobs))]


def _result(future: Any, job: Any) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        reason = "out of memory, killed, or started by a script without `if __name__ == '__main__':`"
        raise JobError(f"a worker process died while {job} was running or waiting: {reason}") from error
    except Exception as error:
        raise JobError(f"{job} failed: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _sigint_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C; this one does when it leaves.

    It reaches every process of the terminal, and the parent alone decides what happens.
    """
    held: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # Python sets handlers from nowhere else
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what has come meanwhile is handled here
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


_done_work: Any = None


def _start_worker(done_work: Any, threads: int) -> None:
    global _done_work
    _done_work = done_work
    torch.set_num_threads(threads)


def _call(function: Callable[..., Any], job: Any, number: int) -> Any:
    def progress(amount: float) -> None:
        _done_work[number] += amount

    return function(job, progress)
