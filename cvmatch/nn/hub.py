"""Base models by hub id or directory: safetensors only, and advice where a model cannot be had."""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from cvmatch.data import storage


class SafeArguments(TypedDict):
    """Arguments of `from_pretrained`: safetensors only."""

    use_safetensors: bool


@contextmanager
def from_pretrained_kwargs(name: str, flag: str) -> Iterator[SafeArguments]:
    """Turn a failed `from_pretrained(name)` into advice.

        with from_pretrained_kwargs(config.clip, "--clip") as safe:
            model = CLIPVisionModel.from_pretrained(config.clip, **safe)

    Args:
        name: Hub id or directory of the model.
        flag: Command-line flag that takes a directory in place of the hub's id.

    Yields:
        Arguments for `from_pretrained`: safetensors only, so nothing is unpickled.

    Raises:
        ValueError: there is no such directory, the hub cannot be reached, or there are no
            safetensors; says what to download and which flag takes its directory.
    """
    transformers_logging.disable_progress_bar()  # weights of a laptop load in milliseconds
    transformers_logging.set_verbosity_error()  # of a new head for new classes
    try:
        yield SafeArguments(use_safetensors=True)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{flag} {name}: expected a directory with *.safetensors and *.json as save_pretrained "
            f"writes it, or the id of a model on the Hugging Face hub. Got: {reason} "
            f"{_advice(name)} Then pass {flag} DIR."
        ) from error


def check_all(*checks: Callable[[], Any]) -> None:
    """Run a check of each base model, and report all that are not there in one error.

    Raises:
        ValueError: what those checks say that raised one, a line each.
    """
    messages = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            messages.append(str(error))
    if messages:
        raise ValueError("\n".join(messages))


def check_model(name: str, flag: str, *folders: str, revision: str = "main") -> None:
    """Check that a base model can be had, without loading its weights.

    Args:
        name: Hub id or directory of the model.
        flag: As in `from_pretrained_kwargs`.
        folders: Those of its parts, such as unet and vae, if it has several.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: as in `from_pretrained_kwargs`.
    """
    for folder in folders or ("",):
        with from_pretrained_kwargs(name, flag):
            cached_file(name, "config.json", subfolder=folder, revision=revision)
            local = os.path.join(name, folder)
            if os.path.isdir(local) and not glob.glob("*.safetensors", root_dir=local):
                raise OSError(f"there are no *.safetensors in {local}.")


def absolute_or_hub_id(name: str) -> str:
    """Return the absolute path of a local directory or URI, or the hub id unchanged.

    Ray's workers change directory, so a relative path would mean something else there.
    """
    return storage.absolute(name) if "://" in name or os.path.isdir(name) else name


def _advice(name: str) -> str:
    if os.path.isdir(name):
        return "Where only *.bin is there, from_pretrained(...).save_pretrained(DIR) converts it."
    if os.path.isabs(name) or name.startswith("."):
        return "Check the path; a base model is downloaded with `hf download ID --local-dir DIR`."
    return (
        f"On a machine with access run `hf download {name} --local-dir DIR` (where that holds no "
        "safetensors, from_pretrained(...).save_pretrained(DIR)) and copy DIR here."
    )
