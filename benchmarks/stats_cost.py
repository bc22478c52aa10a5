"""What measuring costs beyond running: `python -m benchmarks.stats_cost [ROUNDS]`.

The same tokens through a random `olmoe` model of four layers (width 1024, 64 experts of 512, top-8,
float32), in alternation: transformers' forward pass with its eager experts, with its default ones
(grouped_mm), `mone-edge stats`' own collection, and the part of it that is the same for any number
of tokens: all experts on a sample. CPU time of the process and wall time; the median of the ratios.
Not a test: minutes, and the numbers are the machine's.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch

from mone_edge.calibration import Batches
from mone_edge.collect import sampling
from mone_edge.collect.experts import experts_modules
from mone_edge.collect.torch_model import BATCH_TOKENS, collect_loaded

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
SAMPLES, SEQ_LEN = 16, 512


def random_model() -> Any:
    """A random model on the CPU, ready to run."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**SHAPE)).eval()


def forward(model: Any, tokens: torch.Tensor, experts: str) -> None:
    """A plain pass over all tokens, in the batches that the collection uses."""
    model.set_experts_implementation(experts)
    with torch.inference_mode():
        for part in tokens.split(BATCH_TOKENS // SEQ_LEN):
            model(input_ids=part, use_cache=False, logits_to_keep=1)


def measure(model: Any, tokens: torch.Tensor) -> None:
    """The collection of every statistic."""
    model.set_experts_implementation("eager")
    rows = tokens.numpy()
    collect_loaded(model, Batches(rows, ("random",), "", 0, SAMPLES, SEQ_LEN, rows.size))


def sample(model: Any) -> None:
    """All experts of every layer on sampled tokens."""
    inputs = torch.randn(sampling.TOKENS, SHAPE["hidden_size"])
    with torch.inference_mode():
        for name, _ in experts_modules(model).values():
            sampling.sums(model, name, inputs)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@click.command(help=__doc__)
@click.argument("rounds", default=7)
def main(rounds: int) -> None:
    model = random_model()
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(2, 512, (SAMPLES, SEQ_LEN)))
    works: dict[str, Callable[[], None]] = {
        "eager forward": lambda: forward(model, tokens, "eager"),
        "grouped_mm forward": lambda: forward(model, tokens, "grouped_mm"),
        "statistics": lambda: measure(model, tokens),
        "of them, sampling": lambda: sample(model),
    }
    for work in works.values():
        work()  # warm
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    for name in works:
        wall, cpu = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
        pairs = list(zip(times["statistics"], times[name], strict=True))
        ratios = [statistics.median(ours[i] / t[i] for ours, t in pairs) for i in (0, 1)]
        print(
            f"{name:20} {wall:6.2f} s wall {cpu:6.2f} s CPU; "
            f"statistics / this: {ratios[0]:.3f} wall, {ratios[1]:.3f} CPU"
        )


if __name__ == "__main__":
    main()
