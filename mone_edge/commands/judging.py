"""`convert --ppl` and `--max-kld`: what a conversion cost, measured as `eval` does."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_edge.console import Console, human_bytes
from mone_edge.errors import CheckFailed, MoneEdgeError, UsageError
from mone_edge.machine import memory_bytes

if TYPE_CHECKING:
    from mone_edge.convert import Converted, Job
    from mone_edge.evaluate import EvalResult
    from mone_edge.source import Source


@dataclass(frozen=True)
class Judgement:
    """What is to be measured of every file, against the model that it was made from.

    Args:
        text: to score; None takes the evaluation text of the package.
        chunks: at most so many of 512 tokens.
        max_kld: mean KL divergence in nats a token that is still good enough; None takes all.

    Raises:
        UsageError: they contradict each other.
    """

    text: Path | None
    chunks: int | None
    max_kld: float | None

    def __post_init__(self) -> None:
        if self.chunks and not self.wanted:
            raise UsageError("--chunks limits the text of --ppl, which is not given")

    @property
    def wanted(self) -> bool:
        return self.text is not None or self.max_kld is not None

    @property
    def file(self) -> Path:
        from mone_edge import demo

        return self.text or demo.evaluation_text()

    def require(self, source: "Source", jobs: "Sequence[Job]") -> None:
        """Refuse now what could not be measured after hours of work.

        Raises:
            MoneEdgeError: the text or the patched llama.cpp is missing, the text is too short, or
                the model and a file made of it have no room in memory beside each other.
        """
        from mone_edge import runtime
        from mone_edge.evaluate import read_text
        from mone_edge.scoring import N_CTX, require_tokens

        start = read_text(self.file)[: 128 * N_CTX]  # a long text need not be read to its end
        require_tokens(len(source.tokenizer().ids(start)), N_CTX)
        runtime.load()
        weights = sum(math.prod(ref.shape) for ref in source.tensors.values())
        base = source.size if source.keeps_types else 4 * weights  # torch computes in float32
        needed = base + max(job.data_bytes for job in jobs)
        if needed > (there := memory_bytes()):
            raise MoneEdgeError(
                f"comparing {source.name} with the result takes {human_bytes(needed)} of memory, "
                f"this machine has {human_bytes(there)}; leave out --ppl and --max-kld, and "
                "compare with a quantised one: mone-edge eval FILE --ppl TEXT --kld-base GGUF"
            )

    def measure(
        self, console: Console, source: "Source", made: "Sequence[Converted]", threads: int | None
    ) -> "list[EvalResult]":
        """Measure every file, and say on its model card what was found."""
        from mone_edge import card
        from mone_edge.evaluate import evaluate

        with console.progress("eval") as update:
            results = evaluate(
                [file.outfile for file in made],
                text=self.file,
                kld_base=source.path,
                max_chunks=self.chunks,
                threads=threads,
                progress=lambda _what, done, total: update(done, total),
            )
        for file, result in zip(made, results, strict=True):
            card.add_cost(file.card, source.name, self.file.name, result)
        return results

    def later(self, source: "Source", made: "Sequence[Converted]") -> str:
        """What to type to measure the files when they are there."""
        command = ["mone-edge", "eval", *(str(file.outfile) for file in made)]
        command += ["--ppl", str(self.file), "--kld-base", str(source.path)]
        command += ["--chunks", str(self.chunks)] if self.chunks else []
        return f"measure with: {shlex.join(command)}"

    def require_good(self, results: "Sequence[EvalResult]") -> None:
        """Raises:
        CheckFailed: a file is further from the model than `max_kld`.
        """
        for result in results:
            far = result.divergence.kld_mean if result.divergence else 0.0
            if self.max_kld is not None and not far <= self.max_kld:
                raise CheckFailed(
                    f"{result.model} is made, and its KL divergence is {far:.4f}, above --max-kld "
                    f"{self.max_kld:g}; remove fewer experts (--prune-ratio), lose less in place "
                    "of each (--method novice-error) or take a larger --outtype"
                )


def measured_keys(result: "EvalResult") -> dict[str, Any]:
    """What a result adds to the JSON of a conversion, by the keys of `eval`."""
    parts = (vars(part) for part in (result.text, result.divergence) if part)
    return {key: value for part in parts for key, value in part.items()}


def measured_text(result: "EvalResult") -> str:
    """The same for people."""
    score, far = result.text, result.divergence
    assert score and far
    return (
        f"  KL divergence {far.kld_mean:.4f} ± {far.kld_stderr:.4f}, same top token "
        f"{far.same_top_p:.1%}, perplexity {score.ppl:.2f} ± {score.ppl_stderr:.2f} "
        f"(before: {far.ppl_base:.2f})"
    )
