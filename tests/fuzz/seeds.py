"""Seed files of the fuzzer: tiny pruned models, and the bytes of them that may be changed.

In: a folder. Out: GGUFs in it, `x.gguf.ranges` beside each: the header's counts, the whole of
`expert_kept_count` and `expert_skip_threshold`, the tensor infos (name, shape, type, offset) of
routers, experts, novices and `eid2slot`, and the values of the latter. Other keys are llama.cpp's
own business.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf

from tests.runtime import tiny_gguf as tiny

KEPT = (4, 1, tiny.N_EXPERTS)
EMPTY = (0, 5, 2)
ORDER = (6, 1, 4, 3, 0, 7, 2, 5)
HEADER = (4, 24)  # version, count of tensors, count of keys
OURS = ("_exps.", "novice", "eid2slot", "ffn_gate_inp.")


def models() -> Iterator[tuple[str, tiny.Model, tuple[int, ...], str]]:
    """Name, model, kept counts and quantisation of each seed."""

    def small(arch: str) -> tiny.Model:
        return tiny.random_model(arch, n_embd=32, n_ff=32)

    everywhere = dict.fromkeys(range(tiny.N_LAYERS), ORDER)
    groups = {"expert_group_count": 4, "expert_group_used_count": 2}
    grouped = replace(small("qwen3moe"), keys=small("qwen3moe").keys | groups)
    yield "plain", tiny.pruned(small("olmoe"), KEPT), KEPT, "Q4_0"
    yield "empty", tiny.pruned(small("qwen2moe"), EMPTY), EMPTY, "F32"
    low_rank = tiny.with_novices(tiny.pruned(small("olmoe"), EMPTY), EMPTY, (3, 32, 2))
    yield "novices", low_rank, EMPTY, "F16"
    ordered = tiny.pruned(tiny.stored_in_order(grouped, everywhere), KEPT)
    yield "slots", ordered, KEPT, "Q8_0"
    keyed = replace(low_rank, keys=low_rank.keys | {"expert_skip_threshold": 0.5})
    yield "skipping", keyed, EMPTY, "Q8_0"
    grove = tiny.pruned(tiny.stored_in_order(tiny.grovemoe(), everywhere), KEPT)
    yield "grove", grove, KEPT, "F32"


def write(folder: Path) -> list[Path]:
    """Write the seeds and their ranges."""
    paths = []
    for name, model, kept, quant in models():
        path = tiny.write(folder / f"{name}.gguf", model, quant, kept=kept)
        lines = [f"{begin} {end}\n" for begin, end in ranges(path)]
        path.with_name(f"{path.name}.ranges").write_text("".join(lines), encoding="ascii")
        paths.append(path)
    return paths


def ranges(path: Path) -> Iterator[tuple[int, int]]:
    """The bytes that may be changed; a short range is chosen as often as a long one."""
    reader = gguf.GGUFReader(path)
    yield HEADER
    for name, key in reader.fields.items():
        if name.endswith(".expert_kept_count"):
            yield extent(key)
            yield from ((int(key.offset) + 8, extent(key)[1]),) * 8
        if name.endswith(".expert_skip_threshold"):
            yield extent(key)
    for tensor in reader.tensors:
        if any(part in tensor.name for part in OURS):
            yield extent(tensor.field)
        if "eid2slot" in tensor.name:
            yield tensor.data_offset, tensor.data_offset + int(tensor.n_bytes)


def extent(entry: gguf.ReaderField) -> tuple[int, int]:
    """First byte of a key or tensor info, and the one after its last."""
    return int(entry.offset), int(entry.offset) + sum(part.nbytes for part in entry.parts)
