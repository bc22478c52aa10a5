"""The one exception tree. A message says what failed, with the numbers, and what to type next."""


class MoneEdgeError(Exception):
    """Something the user can act on: shown as one line, without a traceback."""

    exit_code = 1


class UsageError(MoneEdgeError):
    """The command line or a recipe asks for something that does not exist or cannot be."""

    exit_code = 2


class RuntimeMissing(MoneEdgeError):
    """The patched llama.cpp is not built, or another llama-cpp-python stands in its place."""


class CheckFailed(MoneEdgeError):
    """What was asked for is made, and a check that was asked for failed."""

    exit_code = 3


class Stopped(KeyboardInterrupt):
    """Interrupted after the result was made; the message says what is there, and what is not."""


class Resumable(KeyboardInterrupt):
    """Interrupted, and what was finished is kept: the same command goes on, with these options."""

    def __init__(self, *options: str) -> None:
        super().__init__(*options)
        self.options = options
