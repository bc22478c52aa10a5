"""Make the demo model anew: dense SmolLM2 -> experts and routers -> corrections -> a small asset.

The shipped asset was made with exactly these commands, on 2 cores, torch 2.13, in PACKAGES the text
packages that `mone_edge.demo.training.texts.SOURCES` says how to get:

    python -m mone_edge.demo.train texts --packages PACKAGES
    python -m mone_edge.demo.train layerwise --work WORK --packages PACKAGES
    python -m mone_edge.demo.train distill --work WORK --packages PACKAGES
    python -m mone_edge.demo.train pack --work WORK

A stage reads what the one before left in WORK; `distill` goes on from its last checkpoint if it is
started again. Training is not reproducible to the bit across machines; what is made from the asset
is (see `build.py`).
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from mone_edge.demo.build import CORRECTIONS
from mone_edge.demo.dense import dense_model_dir

log = logging.getLogger("mone_edge.demo.train")

SEQUENCE_TOKENS = 256
HELD_OUT_SEQUENCES = 32


def load_student(state: dict[str, Any] | None) -> Any:
    import torch
    from safetensors.torch import load_file

    from mone_edge.demo.training.model import (
        Shape,
        Student,
        load_dense,
        reorder,
    )

    student = Student(Shape())
    load_dense(student, load_file(dense_model_dir() / "model.safetensors"))
    if state is not None:
        for layer, order in enumerate(state["order"]):
            reorder(student, layer, order)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(state["parameters"][name])
    return student


def training_tokens(arguments: argparse.Namespace) -> Any:
    """[sequences, length]; kept in WORK, since cutting the overlap out takes a while."""
    import torch
    from transformers import AutoTokenizer

    from mone_edge.demo.training.data import distillation_tokens

    kept = arguments.work / f"tokens-{arguments.seed}.pt"
    if not kept.is_file():
        tokenizer = AutoTokenizer.from_pretrained(dense_model_dir())
        tokens = distillation_tokens(tokenizer, arguments.packages, SEQUENCE_TOKENS, arguments.seed)
        torch.save(tokens, kept)
    return torch.load(kept, weights_only=True)


def layerwise(arguments: argparse.Namespace) -> None:
    import torch

    from mone_edge.demo.training.distill import save_checkpoint
    from mone_edge.demo.training.layerwise import LayerwiseSettings, convert_layers

    torch.manual_seed(arguments.seed)
    tokens = training_tokens(arguments)[: arguments.sequences]
    log.info("layerwise: %d sequences of %d tokens", *tokens.shape)
    student = load_student(None)
    convert_layers(student, tokens, HELD_OUT_SEQUENCES, LayerwiseSettings())
    save_checkpoint(arguments.work / "layerwise.pt", student, None, 0, 0.0)


def distill(arguments: argparse.Namespace) -> None:
    import torch

    from mone_edge.demo.training.distill import DistillSettings
    from mone_edge.demo.training.distill import distill as run

    torch.manual_seed(arguments.seed)
    every = training_tokens(arguments)
    tokens, fitted = every[arguments.sequences :], every[: arguments.sequences]
    log.info("distill: %d sequences of %d tokens", *tokens.shape)
    checkpoint = arguments.work / "distilled.pt"
    source = checkpoint if checkpoint.is_file() else arguments.work / "layerwise.pt"
    state = torch.load(source, weights_only=True)
    held_out = fitted[-HELD_OUT_SEQUENCES:]
    settings = DistillSettings()
    run(load_student(state), tokens, held_out, settings, checkpoint, arguments.seconds, state)


def texts(arguments: argparse.Namespace) -> None:
    from mone_edge.demo import calibration_text, evaluation_text
    from mone_edge.demo.training import texts as sources

    evaluation = sources.evaluation_documents(arguments.packages)
    calibration = sources.calibration_documents(arguments.packages)
    for path, documents in ((evaluation_text(), evaluation), (calibration_text(), calibration)):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(document.text for document in documents), encoding="utf-8")


def pack(arguments: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from mone_edge.demo.training.pack import pack as packed

    state = torch.load(arguments.work / arguments.checkpoint, weights_only=True)
    save_file(packed(state), arguments.asset or CORRECTIONS)


STAGES = {
    "texts": texts,
    "layerwise": layerwise,
    "distill": distill,
    "pack": pack,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, default=Path())
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--sequences",
        type=int,
        default=832,
        help=f"how many layerwise reads (the last {HELD_OUT_SEQUENCES} only to choose ridges on); "
        "distill leaves them out",
    )
    parser.add_argument("--seconds", type=float, default=480, help="distill: how long, in all")
    parser.add_argument("--checkpoint", default="distilled.pt", help="pack: which, in WORK")
    parser.add_argument(
        "--asset", type=Path, help="pack: where to, instead of over the one that ships"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    STAGES[arguments.stage](arguments)


if __name__ == "__main__":
    main()
