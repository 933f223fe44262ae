"""Ordered parallel map with bounded memory; `Executor.map` has no bound on waiting results in Python 3.11."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 64
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to items in threads, and yield each item with its result in the order of the items.

    Args:
        workers: number of threads.
        ahead: maximum number of results that are computed ahead of the consumer.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) > ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
