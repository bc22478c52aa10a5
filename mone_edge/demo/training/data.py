"""Tokens to distil on: text out of packages, packed into sequences of one length."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_edge.demo.training import texts


def tokens_of(tokenizer: Any, text: str, length: int) -> Tensor:
    """[sequences, length] of a text; the rest that fills no sequence is left out."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)


def distillation_tokens(tokenizer: Any, packages: Path, length: int, seed: int) -> Tensor:
    """Shuffled sequences [sequences, length], int64, without calibration and evaluation text.

    Documents are mixed by `Document.weight`; answers in the chat form make up a ninth.
    """
    apart = texts.evaluation_documents(packages) + texts.calibration_documents(packages)
    held_out = texts.ngrams("\n\n".join(document.text for document in apart))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for document in texts.distillation_documents(packages):
        text = texts.without_overlap(document.text, held_out)
        size = int(1_000_000 * document.weight)
        rows = tokens_of(tokenizer, text, length)
        keep = torch.randperm(len(rows), generator=generator)[: size // 4 // length]
        parts.append(rows[keep])
    answers = texts.without_overlap(texts.as_chats(packages), held_out)
    parts.append(tokens_of(tokenizer, answers, length)[: sum(map(len, parts)) // 8])
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=generator)]
