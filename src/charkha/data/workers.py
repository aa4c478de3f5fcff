"""A function over many blocks in several processes, with results in the order of the blocks.

What comes out does not depend on the number of processes. At most two blocks a process are under way, so memory is
bounded. A process that dies ends the work with an error instead of a hang; all end with the one that started them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from charkha.errors import CharkhaError

_ALONE_BYTES = 8 << 20  # below this, starting processes costs more than it saves
_MOST = 16
Task = TypeVar("Task")
Result = TypeVar("Result")
Shared = TypeVar("Shared")

_shared: Any = None  # in a worker: what every task of it needs


def worker_count(paths: Sequence[Path], wanted: int | None = None) -> int:
    """Processes for files of this size: the wish, else one a usable core (at most 16), one for small files."""
    if wanted is not None:
        return wanted
    size = sum(path.stat().st_size for path in paths if path.is_file())
    return 1 if size < _ALONE_BYTES else min(_MOST, usable_cores())


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_ordered(
    function: Callable[[Shared, Task], Result], tasks: Iterable[Task], shared: Shared, workers: int
) -> Iterator[Result]:
    """`function(shared, task)` of every task, in their order. `shared` is sent to each process once.

    Raises what the function raises, and CharkhaError when a process dies (killed, out of memory).
    """
    if workers <= 1:
        yield from (function(shared, task) for task in tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (shared, workers))
    waiting: deque[Future[Result]] = deque()
    rest = iter(tasks)
    try:
        waiting.extend(pool.submit(_run, function, task) for task in itertools.islice(rest, 2 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_run, function, task) for task in itertools.islice(rest, 1))
            yield result
    except BrokenProcessPool as error:
        raise CharkhaError(
            "a process that reads data died: it was killed, or the machine ran out of memory",
            remedy="run the same command again; with less memory, set data.num_proc: 1 (--workers 1)",
        ) from error
    finally:
        _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    """Ends the pool without waiting for blocks that nobody asks for any more."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _start(shared: Any, workers: int) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_shared, task)
