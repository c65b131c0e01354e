"""Call a network in batches of one size, so that a row's result depends on that row alone.

The last bits of a result depend on the batch's size (docs/decisions.md#batch-size-and-last-bits).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

Row = TypeVar("Row")
Result = TypeVar("Result")


class FixedBatch(Generic[Row, Result]):
    """Results of rows, one for each; of a row on which the network fails, the exception.

    `network` takes exactly `size` rows, and may return an exception in place of a result. It runs
    for one caller at a time, so that others decode and encode meanwhile.
    """

    def __init__(
        self, network: Callable[[list[Row]], Sequence[Result | Exception]], size: int
    ) -> None:
        self.network, self.size = network, size
        self.lock = threading.Lock()

    def __call__(self, rows: Sequence[Row]) -> list[Result | Exception]:
        """Return results in the order of the rows.

        Raises:
            Exception: the network's, if memory ran out, or if all rows of a batch fail, one by one
                too: then the fault is not in the rows.
        """
        batches = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        return [result for batch in batches for result in self._batch(batch)]

    def _batch(self, rows: Sequence[Row]) -> list[Result | Exception]:
        return require_any(call_rows(self._padded, rows))

    def _padded(self, rows: Sequence[Row]) -> list[Result | Exception]:
        padding = [rows[-1]] * (self.size - len(rows))
        with self.lock:
            return list(self.network([*rows, *padding]))[: len(rows)]


def call_rows(
    network: Callable[[Sequence[Row]], Sequence[Result | Exception]], rows: Sequence[Row]
) -> list[Result | Exception]:
    """Call a network on all rows, or, if that fails, on each; a failing row gets its exception.

    Raises:
        torch.OutOfMemoryError: memory ran out, so the fault is not in the rows.
    """
    try:
        return list(network(rows))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (kernels raise what they like; each row tells its own)
        if len(rows) == 1:
            return [error]
    return [result for row in rows for result in call_rows(network, [row])]


def require_any(results: list[Result | Exception]) -> list[Result | Exception]:
    """Return the results.

    Raises:
        Exception: the first one, if all of several rows fail: then the fault is not in the rows.
    """
    failed = [result for result in results if isinstance(result, Exception)]
    if len(failed) == len(results) > 1:
        raise failed[0]
    return results


def error_line(error: Exception) -> str:
    """Return an exception in one line, for the `error` of a row."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
