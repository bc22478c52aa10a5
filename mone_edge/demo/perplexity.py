"""Perplexity of the dense model and of the demo made of it, by the same code on the same tokens.

    python -m mone_edge.demo.perplexity

prints one JSON document; with two cores it takes some minutes. Every window of `--context` tokens
is scored on its own, all tokens but its first.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from mone_edge.demo import dense_model_dir, evaluation_text, model_dir
from mone_edge.errors import MoneEdgeError


def windows(folder: Path, text: str, context: int, limit: int | None = None) -> Any:
    """Tokens [windows, context] of a text; the rest that fills no window is left out.

    With `limit`, that many windows evenly spread over the text.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    rows = ids[: len(ids) // context * context].view(-1, context)
    if limit is not None and limit < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, limit).long()]
    return rows


def mean_negative_log_likelihood(folder: Path, rows: Any, dtype: str = "bfloat16") -> float:
    """In nats a token, over tokens [windows, context]."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    total = 0.0
    tokens: int = len(rows) * (rows.shape[1] - 1)
    with torch.inference_mode():
        for row in rows:
            logits = model(row.unsqueeze(0), use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return total / tokens


def compare(text: Path, context: int, limit: int | None, dtype: str) -> dict[str, object]:
    """Both perplexities on a text file, and their ratio."""
    dense, moe = dense_model_dir(), model_dir()
    rows = windows(moe, text.read_text(encoding="utf-8"), context, limit)
    if not len(rows):
        raise MoneEdgeError(
            f"{text} is shorter than one window of {context} tokens; give a smaller --context"
        )
    started = time.monotonic()
    losses = [mean_negative_log_likelihood(folder, rows, dtype) for folder in (dense, moe)]
    return {
        "text": text.name,
        "context": context,
        "tokens": len(rows) * (context - 1),
        "dtype": dtype,
        "dense_ppl": round(math.exp(losses[0]), 3),
        "moe_ppl": round(math.exp(losses[1]), 3),
        "ratio": round(math.exp(losses[1] - losses[0]), 4),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mone_edge.demo.perplexity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, default=evaluation_text())
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, help="only so many, evenly spread")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    try:
        result = compare(arguments.text, arguments.context, arguments.windows, arguments.dtype)
    except MoneEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
