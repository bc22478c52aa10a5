"""Blocks of rows of lazy tensors: the same values, and none where rows depend on each other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mone_edge import conversion, rowwise
from mone_edge.source import Source, resolve
from tests import tiny

STORED = torch.arange(48.0).reshape(8, 3, 2)


@pytest.fixture(scope="module")
def lazy() -> Any:
    return conversion.packages()[1].LazyTorchTensor


def blocks(lazy: Any, work: Callable[[Any], Any], rows: int = 3) -> list[rowwise.Block] | None:
    leaf = lazy(meta=STORED.to("meta"), args=(), func=lambda: STORED.clone())
    node = work(leaf)
    return rowwise.blocks(node.numpy(), conversion.packages()[0].LazyBase, rows, {})


@pytest.mark.parametrize(
    "work",
    [
        lambda t: t,
        lambda t: t.to(torch.float16),
        lambda t: t.transpose(1, 2) * 2 + 1,
        lambda t: t[:, 1:],
        lambda t: t.split(1, dim=1)[2],
        lambda t: t.reshape(-1, 6),
    ],
)
def test_work_on_each_row_is_done_in_blocks(lazy: Any, work: Callable[[Any], Any]) -> None:
    made = blocks(lazy, work)
    assert made is not None and len(made) == 3
    np.testing.assert_array_equal(np.concatenate([b() for b in made]), work(STORED).numpy())


@pytest.mark.parametrize(
    "work",
    [
        lambda t: t.flip(0),
        lambda t: t.roll(1, 0),
        lambda t: t - t.mean(0),
        lambda t: t.reshape(2, 4, 3, 2).swapaxes(0, 1).reshape(8, 3, 2),
        lambda t: t[:4],
        lambda t: t.transpose(0, 1),
        lambda t: torch.cat([t, t]),
    ],
)
def test_work_across_rows_is_not(lazy: Any, work: Callable[[Any], Any]) -> None:
    assert blocks(lazy, work) is None


def test_a_model_in_blocks_is_the_model(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """granitemoe stores the experts of a layer in one tensor, gate and up together."""
    folder = tmp_path_factory.mktemp("granite") / "model"
    source: Source = resolve(str(tiny.make_checkpoint("granitemoe", folder)))
    with monkeypatch.context() as patched:
        patched.setattr(rowwise, "blocks", lambda *_: None)
        whole = source.open(tokenizer_pre="gpt-2")
    monkeypatch.setattr(conversion, "BLOCK_VALUES", 256)
    parts = source.open(tokenizer_pre="gpt-2")
    for name, tensor in parts.tensors.items():
        np.testing.assert_array_equal(tensor.read(), whole.tensors[name].read())
    assert {len(t.chunks) for n, t in parts.tensors.items() if "_exps" in n} == {8}
    assert {len(t.chunks) for n, t in whole.tensors.items() if "_exps" in n} == {1}
    assert len(parts.tensors["token_embd.weight"].chunks) == 128
    assert len(parts.tensors["blk.0.attn_q.weight"].chunks) == 1  # its rows are permuted
    picked = parts.tensors["token_embd.weight"].select([5, 1])
    np.testing.assert_array_equal(picked.read(), whole.tensors["token_embd.weight"].read()[[5, 1]])
