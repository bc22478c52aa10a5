"""Tokens to distil on: text out of packages and sampled chats, packed into sequences of one
length."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mone_edge.demo.training import texts
from mone_edge.demo.training.chat import OPENING


def tokens_of(tokenizer: Any, text: str, length: int) -> Tensor:
    """[sequences, length] of a text; the rest that fills no sequence is left out."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)


def distillation_tokens(
    tokenizer: Any, packages: Path, chats: list[str], length: int, chat_share: float, seed: int
) -> Tensor:
    """Shuffled sequences [sequences, length], int64, without any text that calibration or
    evaluation uses.

    Documents are mixed by `Document.weight`; chats make up `chat_share` as far as they last.
    """
    held_out_documents = texts.evaluation_documents(packages) + texts.calibration_documents(
        packages
    )
    held_out = texts.ngrams("\n\n".join(document.text for document in held_out_documents))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for document in texts.distillation_documents(packages):
        text = texts.without_overlap(document.text, held_out)
        size = int(1_000_000 * document.weight)
        rows = tokens_of(tokenizer, text, length)
        keep = torch.randperm(len(rows), generator=generator)[: size // 4 // length]
        parts.append(rows[keep])
    answers = texts.as_chats(packages, OPENING, "<|im_end|>\n")
    parts.append(
        tokens_of(tokenizer, texts.without_overlap(answers, held_out), length)[
            : len(torch.cat(parts)) // 8
        ]
    )
    rows = torch.cat(parts)
    chat = tokens_of(tokenizer, "".join(chats), length)
    wanted = int(len(rows) * chat_share / (1 - chat_share))
    rows = torch.cat([rows, chat[:wanted]])
    return rows[torch.randperm(len(rows), generator=generator)]
