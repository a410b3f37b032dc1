"""Work in processes of their own, none of which outlives who started them, however that ends."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_ORPHANED = 1  # exit status of a worker that nobody waits for


class _Worker(SpawnProcess):
    """A process that Ctrl-C does not reach.

    A terminal sends it to all processes, but what becomes of the workers is for the first to say.
    """

    def start(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):  # on Windows
            super().start()
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()  # what is blocked here is blocked there
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Worker


@contextmanager
def worker_pool(
    processes: int, set_up: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes for the ``with`` block.

    set_up: a function of a module, called with ``arguments`` in each process before its first job.
    A block that ends in an error, Ctrl-C among them, ends the processes where they are, and so does
    the death of this process, by whatever signal: work in them must be such that it can be cut off
    at any moment.

    Each worker listens at a pipe that nothing is ever sent through and whose other end is here
    alone: it closes with the block, or by the kernel's hand with this process.
    """
    context = _Context()
    listening, held = context.Pipe(duplex=False)
    # By its name: a worker must listen before it imports what may take seconds.
    name = None if set_up is None else (set_up.__module__, set_up.__name__)
    first = (listening, name, arguments)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=first)
    try:
        yield pool
    except BaseException:
        held.close()
        pool.shutdown(cancel_futures=True)
        raise
    else:
        pool.shutdown()
    finally:
        held.close()
        listening.close()


def _begin(
    listening: Connection, set_up: tuple[str, str] | None, arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(listening,), daemon=True).start()
    if set_up is not None:
        module, name = set_up
        getattr(importlib.import_module(module), name)(*arguments)


def _end_with(listening: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        listening.recv_bytes()
    os._exit(_ORPHANED)
