"""Router rows of a model on disk, and how fine-tuning moved them.

In: `Source`s. Out: for each MoE layer the change of each row's l2 norm, what `--method router-norm`
ranks by. Reads headers and the routers' bytes, nothing else; needs no torch and no llama.cpp.
"""

import re

import numpy as np

from mone_edge.errors import MoneEdgeError
from mone_edge.safetensors_header import TensorRef
from mone_edge.source import Source
from mone_edge.stats import Float

# The number of a block, then names of a router's weight: llama.cpp's, transformers', older ones.
ROUTER = re.compile(
    r"(?:^blk|(?:^|\.)(?:layers|blocks|h))\.(?P<layer>\d+)\.(?:ffn_gate_inp|(?:.+\.)?"
    r"(?:gate|router)(?:\.(?:gate|layer|proj|classifier|wg))?)\.weight$"
)
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def norm_changes(tuned: Source, pretrained: Source) -> dict[int, Float]:
    """By block, `||w_tuned|| - ||w_pretrained||` of each expert's router row [E].

    The l2 norms of arXiv 2405.16646, whose experts with the smaller change go first. The change
    keeps its sign: the paper shows that the rows of the experts that learn the task grow.

    Raises:
        MoneEdgeError: the two have routers of other shapes, or the very same.
    """
    after, before = router_norms(tuned), router_norms(pretrained)
    if {i: len(n) for i, n in after.items()} != {i: len(n) for i, n in before.items()}:
        raise MoneEdgeError(
            f"--pretrained {pretrained.name} has {_described(before)}, "
            f"{tuned.name} has {_described(after)}: not the model that it was fine-tuned from"
        )
    changes = {layer: norms - before[layer] for layer, norms in after.items()}
    if not any(change.any() for change in changes.values()):
        raise MoneEdgeError(
            f"--pretrained {pretrained.name} has the routers of {tuned.name}: nothing to rank by; "
            "name the model that it was fine-tuned from"
        )
    return changes


def router_norms(source: Source) -> dict[int, Float]:
    """The l2 norm of each expert's router row [E], by block.

    Raises:
        MoneEdgeError: no router is found, two are in one block, or its type cannot be read.
    """
    found: dict[int, TensorRef] = {}
    for name, ref in source.tensors.items():
        match = ROUTER.search(name)
        if not match or ref.shape[:1] != (source.num_experts,) or len(ref.shape) != 2:
            continue
        layer = int(match["layer"])
        if layer in found:
            raise MoneEdgeError(f"{source.name}: block {layer} has two routers, {name} is one")
        found[layer] = ref
    if not found:
        raise MoneEdgeError(
            f"{source.name} ({source.architecture}) has no router weights of "
            f"{source.num_experts} rows under a name that is known"
        )
    return {layer: np.linalg.norm(_rows(ref), axis=1) for layer, ref in sorted(found.items())}


def _rows(ref: TensorRef) -> Float:
    """A router's weight [E, H] in float64."""
    if ref.dtype not in SIZES:
        raise MoneEdgeError(f"{ref.file}: a router of type {ref.dtype}, not F32, F16 or BF16")
    kind = f"<u{SIZES[ref.dtype]}" if ref.dtype == "BF16" else f"<f{SIZES[ref.dtype]}"
    try:
        values = np.fromfile(ref.file, kind, int(np.prod(ref.shape)), offset=ref.offset)
    except OSError as error:
        raise MoneEdgeError(f"cannot read {ref.file}: {error.strerror or error}") from error
    if ref.dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return values.reshape(ref.shape).astype(np.float64)


def _described(norms: dict[int, Float]) -> str:
    return f"routers in {len(norms)} blocks for {sorted({len(n) for n in norms.values()})} experts"
