"""transformers, kept from talking and from running what a checkpoint brings along."""

import logging as levels
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# All that transformers raises on a config, a tokenizer or weights that it cannot use.
LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no warning of transformers (unless `-v` is given); code that a
    checkpoint brings along is refused, without the question on the terminal, also where llama.cpp's
    converters ask for it."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    patience = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    run_code = dynamic_module_utils.get_class_in_module
    logging.disable_progress_bar()
    if not levels.getLogger().isEnabledFor(levels.INFO):
        logging.set_verbosity_error()
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    dynamic_module_utils.get_class_in_module = _refuse_code
    try:
        yield
    finally:
        dynamic_module_utils.get_class_in_module = run_code
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _refuse_code(class_name: str, *_: object, **__: object) -> None:
    raise ValueError(f"it brings Python code of its own ({class_name}), which is not run")
