"""A model of the Hugging Face hub, fetched into its cache.

In: `org/name[@revision]`. Out: a folder. Knows nothing about what is in it.
"""

import logging
import tempfile
from contextlib import suppress
from pathlib import Path

from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError
from mone_edge.paths import cache_dir, exists

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt", "README.md")
OTHER_FORMS = ("*/*", "consolidated*")  # the same weights once more


def say_less() -> None:
    """Keep the library's account of its retries off the terminal: what fails is one error."""
    from huggingface_hub.utils.logging import set_verbosity

    set_verbosity(logging.ERROR)


def stay_offline() -> None:
    """Let the hub's libraries read their caches only, from now on."""
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def download(model: str, *, offline: bool) -> Path:
    """The model's folder, under the model's name: config, tokenizer and safetensors only.

    Raises:
        MoneEdgeError: there is no such model or revision, it is gated, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say_less()
    repo, _, revision = model.partition("@")
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(OTHER_FORMS),
            local_files_only=offline,
        )
    except HFValidationError as error:
        raise MoneEdgeError(
            f"no model {model}: not a file or folder here, and not a name that the hub allows"
        ) from error
    except GatedRepoError as error:
        raise MoneEdgeError(
            f"{repo} is gated: accept its terms on its hub page, then: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise MoneEdgeError(f"{repo} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise MoneEdgeError(
            f"the hub has no model {repo} (or it is private: hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "--offline was given" if offline else "the hub cannot be reached"
        raise MoneEdgeError(
            f"{model} is neither a folder here nor in the hub cache, and {why}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MoneEdgeError(f"cannot fetch {model} from the hub: {reason(error)}") from error
    return _named(Path(folder), repo.rpartition("/")[2])


def _named(snapshot: Path, name: str) -> Path:
    """A link to the snapshot; or the snapshot itself, where no link can be made.

    In the hub's cache a folder is named by its commit, and from the folder's name llama.cpp's
    converter takes the model's name and version (of DeepSeek V4 the chat template too).
    """
    link = cache_dir() / "hub" / snapshot.name / name
    with suppress(OSError):
        if not exists(link) or not link.samefile(snapshot):
            link.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=link.parent) as place:
                made = Path(place) / name
                made.symlink_to(snapshot.absolute(), target_is_directory=True)
                made.replace(link)
        return link
    return snapshot
