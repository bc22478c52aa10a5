"""The model card that stands beside a GGUF: what was done to the model, how to do it again, and,
where it was measured, what it cost."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mone_edge.paths import atomic_write
from mone_edge.plan import PrunePlan
from mone_edge.recipe import Recipe

if TYPE_CHECKING:
    from mone_edge.evaluate import EvalResult

TEMPLATE = """---
base_model: {base}
library_name: gguf
tags: [moe, mone, pruned, gguf]
---
# {name}

{model}, {what}, written by mone-edge ({bytes} bytes).

{runs}

Make it again, in the folder where it was made:

```
{command}
```

Statistics: {stats}. Experts kept in each MoE layer: {kept}.
"""
PATCHED = """It needs the patched llama.cpp of mone-edge (`mone-edge runtime build`, then
`mone-edge run {name}`); an unpatched llama.cpp refuses the file."""
STOCK = "It runs on any llama.cpp that knows the architecture."
COST = """
What it cost, on {tokens:,} tokens of {text}: a KL divergence from {model} of {kld:.4f} ±
{kld_stderr:.4f} nats a token, the same most likely token at {same_top:.1%} of the positions,
perplexity {ppl:.2f} ± {ppl_stderr:.2f} (before: {ppl_base:.2f}).
"""
SKIPS = """

The patched llama.cpp runs no expert of a gate weight up to {share:g} of the token's largest;
another runs all that the router selects."""


def write(
    card: Path,
    outfile: Path,
    first: Path,
    plan: PrunePlan | None,
    recipe: Recipe,
    size: int,
    given: Sequence[str] = (),
    *,
    weighed: bool = False,
) -> None:
    """Write the card of a GGUF.

    Args:
        outfile: as the command named it.
        first: the file to run: `outfile`, or the first of its parts.
        given: arguments that name what was made before (`--stats FILE`), to make the same again.
        weighed: whether statistics gave an importance matrix.
    """
    patched = plan is not None and not plan.cuts and plan.removed_fraction > 0
    if plan is None or plan.removed_fraction == 0:
        what, kept = "not pruned", "all"
        stats = "for the importance matrix" if weighed else "none needed"
    else:
        what = (
            f"with {plan.removed_fraction:.1%} of its routed experts removed by `{plan.method}` "
            f"({plan.scope} scope; replaced by `{plan.replacement}`)"
        )
        if plan.groups:
            what = (
                f"with its routed experts grouped and merged by `{plan.method}` into "
                f"{1 - plan.removed_fraction:.1%} of their number"
            )
        kept = " ".join(str(len(ids)) for ids in plan.kept.values())
        stats = f"sha256 {plan.stats_sha256[:16]}" if plan.stats_sha256 else "in memory"
    runs = PATCHED.format(name=first.name) if patched else STOCK
    if recipe.skip_threshold:
        runs += SKIPS.format(share=recipe.skip_threshold)
    own_recipe = str(outfile.with_suffix(".recipe.yaml"))
    command = ["mone-edge", "convert", recipe.model, "--recipe", own_recipe, *given]
    command += ["-o", str(outfile)]
    text = TEMPLATE.format(
        base=recipe.model,
        name=outfile.name,
        model=recipe.model,
        what=what,
        bytes=f"{size:,}",
        runs=runs,
        command=shlex.join(command),
        stats=stats,
        kept=kept,
    )
    with atomic_write(card) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def add_cost(card: Path, model: str, text: str, measured: "EvalResult") -> None:
    """Append what `eval` measured on a text, against the model that was converted."""
    score, far = measured.text, measured.divergence
    assert score and far
    cost = COST.format(
        text=text,
        model=model,
        tokens=score.tokens,
        kld=far.kld_mean,
        kld_stderr=far.kld_stderr,
        same_top=far.same_top_p,
        ppl=score.ppl,
        ppl_stderr=score.ppl_stderr,
        ppl_base=far.ppl_base,
    )
    with atomic_write(card) as temporary:
        temporary.write_text(card.read_text(encoding="utf-8") + cost, encoding="utf-8")
