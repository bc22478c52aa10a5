"""How little a low-rank novice can leave of an expert at best, and what it takes: by rank.

    python -m benchmarks.rank_bound MODEL [--data a.txt ...] [--samples 32] [--seq-len 512]

MODEL is a checkpoint folder or `demo`. Whatever a novice of rank R makes of its input, it puts out
a constant and something in R directions. So of the squared distance of an expert's outputs from
their mean, both weighted by the squared gate weights, it cannot leave less than the share outside
of the R directions that hold most: the eigenvalues of the outputs' covariance after the R largest
(Eckart and Young, 1936). Real novices leave more, since they are linear in the input.

With b the share of an expert's bytes that a novice takes in a Q4_K_M file, constants of the same
bytes remove 1 - b times as many experts. Where all are worth the same they leave 1 - b of the
distance, so novices leave at least `share outside / (1 - b)` of what constants do; criteria remove
what is worth least first, which makes that a low bound.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_edge import calibration
from mone_edge.collect.experts import (
    experts_implementation,
    experts_modules,
    input_width,
    num_experts,
    output_width,
    register,
    routed,
    routed_inputs,
    run_expert,
)
from mone_edge.collect.loading import load_model
from mone_edge.low_rank import EXPERT_BITS, stored_bits
from mone_edge.source import Checkpoint, resolve

IMPLEMENTATION = "mone-edge-output-moments"
RANKS = (1, 2, 4, 8, 16, 32, 64)
_MOMENTS = "_mone_edge_output_moments"


class OutputMoments:
    """Of one layer's experts: sums of w, w y and w y y^T over their tokens, w the squared gate."""

    def __init__(self, experts: int, width: int) -> None:
        self.weight = torch.zeros(experts, dtype=torch.float64)
        self.sum = torch.zeros(experts, width, dtype=torch.float64)
        self.square = torch.zeros(experts, width, width)

    def add(self, expert: int, output: Tensor, gate: Tensor) -> None:
        """Outputs [n, width] and gate weights [n] of one expert."""
        weighted = output * gate[:, None]
        self.weight[expert] += gate.double().square().sum()
        self.sum[expert] += (weighted * gate[:, None]).double().sum(dim=0)
        self.square[expert].addmm_(weighted.T, weighted)

    def spectra(self) -> Tensor:
        """Eigenvalues of each expert's covariance times weight, descending: [experts, width]."""
        mean = self.sum / self.weight.clamp_min(1e-30)[:, None]
        constant = self.weight[:, None, None] * mean[:, :, None] * mean[:, None, :]
        return torch.linalg.eigvalsh(self.square.double() - constant).flip(1).clamp_min(0)


def _collecting(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros_like(hidden)
    moments: OutputMoments = getattr(module, _MOMENTS)
    for expert, token, slot in routed(index):
        inputs, gate = routed_inputs(module, hidden[token], weights[token, slot].float())
        _, output = run_expert(module, expert, inputs)
        moments.add(expert, output, gate)
        total.index_add_(0, token, output * gate[:, None])
    return total


register(IMPLEMENTATION, _collecting)


def outside(spectra: Tensor, rank: int) -> float:
    """Share of a layer's distance that lies outside each expert's `rank` leading directions."""
    return float(spectra[:, rank:].sum() / spectra.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", action="append", default=[], help="as of `mone-edge stats`")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = resolve(arguments.model)
    assert isinstance(source, Checkpoint)
    batches = calibration.load(
        arguments.data,
        source.tokenizer(),
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        seed=1,
    )
    network = load_model(Path(source.path), device="cpu", dtype="float32")
    modules = [module for _, module in experts_modules(network).values()]
    for module in modules:
        setattr(module, _MOMENTS, OutputMoments(num_experts(module), output_width(module)))
    with torch.inference_mode(), experts_implementation(network, IMPLEMENTATION):
        for ids in batches.tokens:
            network.base_model(input_ids=torch.as_tensor(ids)[None].long(), use_cache=False)
    spectra = [getattr(module, _MOMENTS).spectra() for module in modules]

    module = modules[0]
    size = sum(p.numel() for p in module.parameters(recurse=False)) // num_experts(module)
    print(f"{source.name}: {len(modules)} layers, {size} weights an expert,", end=" ")
    print(f"{batches.tokens.size} tokens")
    print(
        "\n| rank | bytes of an expert | left at least | of what constants of these bytes leave |"
    )
    print("|--:|--:|--:|--:|")
    for rank in RANKS:
        taken = stored_bits(rank, input_width(module), output_width(module)) / EXPERT_BITS / size
        if taken >= 1:
            break
        left = sum(outside(layer, rank) for layer in spectra) / len(spectra)
        print(f"| {rank} | {taken:.1%} | {left:.2f} | {left / (1 - taken):.2f} |")


if __name__ == "__main__":
    main()
