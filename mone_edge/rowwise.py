"""Lazy tensors of llama.cpp's `conversion` package, evaluated a few rows at a time.

In: a node of the package's lazy graph. Out: its value, or the values of blocks of its rows, so that
neither an embedding nor a tensor of all experts is ever in memory whole. The graph records what
will be done to a stored tensor, not what that means; whether each row is worked on by itself is
found out by doing it to two random rows, together and one by one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBE_ROWS = 2  # enough to see rows swapped, shifted or mixed

Block = Callable[[], NDArray[Any]]
Known = dict[Any, bool]  # what was done to stored tensors -> whether it is done row by row


def evaluate(node: Any, lazy: Any, given: tuple[Any, Any] | None = None) -> Any:
    """The value of a node, without the package's habit of keeping every value it made.

    Args:
        lazy: the package's base class of nodes.
        given: a node and the value that it shall have.
    """
    if not isinstance(node, lazy):
        return node
    if given is not None and node is given[0]:
        return given[1]
    if node._data is not None:
        return node._data
    arguments = lazy._recurse_apply(node._args, lambda n: evaluate(n, lazy, given))
    return node._func(*arguments, **node._kwargs)


def blocks(node: Any, lazy: Any, rows: int, known: Known) -> list[Block] | None:
    """The value of a node in blocks of `rows` slices of dimension 0, each read when called.

    Args:
        known: what was found out before; the same is done to most layers.

    Returns:
        None where the node is not made row by row from one stored tensor of as many rows.
    """
    leaf = _leaf(node, lazy)
    if leaf is None:
        return None
    done = (_recipe(node, leaf, lazy), leaf._meta.shape, leaf._meta.dtype)
    if done not in known:
        known[done] = _is_rowwise(node, leaf, lazy)
    if not known[done]:
        return None

    def block(first: int) -> NDArray[Any]:
        stored = evaluate(leaf, lazy)[first : first + rows]
        return np.asarray(evaluate(node, lazy, (leaf, stored)))

    return [functools.partial(block, first) for first in range(0, len(leaf._meta), rows)]


def _leaf(node: Any, lazy: Any) -> Any:
    """The stored tensor that a node is made from; None where there are several."""
    inputs = [part for part in _flat(node._args) if isinstance(part, lazy)]
    found = [_leaf(part, lazy) for part in inputs]
    if len(found) > 1:
        return None
    return found[0] if found else node


def _recipe(node: Any, leaf: Any, lazy: Any) -> Any:
    """What is done to the leaf, in a form that can be compared."""
    if node is leaf or not isinstance(node, lazy):
        return "leaf" if node is leaf else repr(node)
    cells = (cell.cell_contents for cell in getattr(node._func, "__closure__", None) or ())
    function = getattr(node._func, "__code__", node._func)
    constants = tuple(cell for cell in cells if isinstance(cell, str | int))
    inputs = tuple(_recipe(part, leaf, lazy) for part in _flat(node._args))
    return function, constants, inputs, repr(node._kwargs)


def _flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, list | tuple):
        return [part for argument in arguments for part in _flat(argument)]
    return [arguments]


def _is_rowwise(node: Any, leaf: Any, lazy: Any) -> bool:
    import torch

    shape: Sequence[int] = leaf._meta.shape
    if not shape or len(node._meta) != shape[0] or not isinstance(leaf._meta, torch.Tensor):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((PROBE_ROWS, *shape[1:]), generator=generator).to(leaf._meta.dtype)
    try:
        together = np.asarray(evaluate(node, lazy, (leaf, rows)))
        alone = [
            np.asarray(evaluate(node, lazy, (leaf, rows[i : i + 1]))) for i in range(len(rows))
        ]
    except (RuntimeError, ValueError, IndexError, TypeError):  # a shape that is written down
        return False
    return together.shape[0] == len(rows) and np.array_equal(together, np.concatenate(alone))
