"""Chats sampled from the dense model itself: text to distil on that carries no licence of its own.

The user's turn is sampled as well, from the chat template cut off after `user\\n` (the method of
Magpie, arXiv:2406.08464), then the assistant's answer to it.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

log = logging.getLogger(__name__)

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
STARTS = (
    "", "", "", "", "What is", "How do I", "How does", "Write a short story about", "Why", "Who is",
    "Tell me about", "Explain", "Can you", "Give me", "Write a Python function that", "What are",
    "Describe", "Hi", "Compare", "I want to", "Summarize", "List", "What is the capital of",
    "What should I",
)  # fmt: skip


def sample_chats(dense_dir: Path, rounds: int, batch: int, seed: int) -> list[str]:
    """`rounds * batch` whole chats as text, special tokens included."""
    torch.manual_seed(seed)
    tokenizer: Any = AutoTokenizer.from_pretrained(dense_dir, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.bfloat16).eval()
    chats: list[str] = []
    for round_index in range(rounds):
        openings = [OPENING + STARTS[(round_index * batch + i) % len(STARTS)] for i in range(batch)]
        questions = _continue(model, tokenizer, openings, 40, 1.0)
        asked = [q + "<|im_end|>\n<|im_start|>assistant\n" for q in questions]
        answers = _continue(model, tokenizer, asked, 200, 0.8)
        chats += [answer + "<|im_end|>\n" for answer in answers]
        log.info("chats: %d of %d", len(chats), rounds * batch)
    return chats


def _continue(
    model: Any, tokenizer: Any, prompts: list[str], length: int, temperature: float
) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=length, do_sample=True, temperature=temperature, top_k=50
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [prompt + text.strip() for prompt, text in zip(prompts, texts, strict=True)]
