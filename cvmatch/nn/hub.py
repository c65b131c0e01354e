"""Base models by hub id or directory: safetensors only, and advice where a model cannot be had.

Weights that do not fit are refused: a library that leaves layers random trains on, and says so in
a line that nobody reads.
"""

import glob
import json
import os
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cvmatch.data import storage

PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "backbone.")
"""What wrappers (DataParallel, Lightning, torch.compile) put in front of the names of weights."""

_LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header at most, as the library has it."""

V = TypeVar("V")


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
        ValueError: there is no such directory, the hub cannot be reached, there are no
            safetensors, or a file of them is damaged; says what to download and which flag takes
            its directory.
    """
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 (1.6 s)

    transformers_logging.disable_progress_bar()  # weights of a laptop load in milliseconds
    transformers_logging.set_verbosity_error()  # of a new head for new classes
    try:
        yield SafeArguments(use_safetensors=True)
    except (OSError, SafetensorError) as error:
        _check_files(name, flag)  # which knows more of a file than the libraries say
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
    """Check that a base model can be had and its files are whole, without loading its weights.

    Args:
        name: Hub id or directory of the model.
        flag: As in `from_pretrained_kwargs`.
        folders: Those of its parts, such as unet and vae, if it has several.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: as in `from_pretrained_kwargs`.
    """
    from transformers.utils import cached_file  # noqa: PLC0415 (as above)

    for folder in folders or ("",):
        with from_pretrained_kwargs(name, flag):
            cached_file(name, "config.json", subfolder=folder, revision=revision)
            local = os.path.join(name, folder)
            if os.path.isdir(local) and not glob.glob("*.safetensors", root_dir=local):
                raise OSError(f"there are no *.safetensors in {local}.")
    _check_files(name, flag, *folders)


def check_file(path: str, flag: str) -> None:
    """Check by its first bytes that a file holds weights, and by its length that it is whole.

    Raises:
        ValueError: it is a Git LFS pointer, a web page, a pickle by another name, or cut off; says
            what to do.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begin = file.read(64)
        if reason := _recognise(begin):
            raise ValueError(_file_error(path, flag, reason))
        if not path.endswith(".safetensors"):
            return
        expected = _expected_size(begin[:8], file)
    if expected is None and begin.startswith((b"PK", b"\x80")):
        reason = "a pickle (what torch.save writes) under another name: give it as .pth"
        raise ValueError(_file_error(path, flag, reason))
    if expected is None or expected > size:
        of = "" if expected is None else f" of {expected}"
        reason = f"{size} bytes{of}: a download that was cut off, or no safetensors"
        raise ValueError(_file_error(path, flag, reason))


def read_state(path: str, flag: str) -> Mapping[str, Tensor]:
    """Read the state dict of a local .safetensors, .pth or .bin file; nothing is unpickled.

    Raises:
        ValueError: as `check_file`, or it holds something else than a state dict.
    """
    check_file(path, flag)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        # Their text advises weights_only=False, which would run whatever code the file holds.
        raise ValueError(
            f"{flag} {path}: expected a state dict (names and tensors), got a file that is cut "
            "off, or one that holds Python objects, such as a whole pickled module. Where you "
            "trust it, write its weights on another machine: "
            "safetensors.torch.save_file(module.state_dict(), 'model.safetensors')."
        ) from error
    for name in ("state_dict", "model"):  # of training checkpoints
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not (isinstance(state, dict) and any(isinstance(one, Tensor) for one in state.values())):
        kind = f"a dict of {[*state][:3]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{flag} {path}: expected a state dict (names and tensors), got {kind}.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def strip_prefix(state: Mapping[str, V], expected: Collection[str]) -> Mapping[str, V]:
    """Take a wrapper's prefix off the names, where they are those that are expected but for it."""
    if any(name in expected for name in state):
        return state
    for prefix in PREFIXES:
        bare = {name.removeprefix(prefix): value for name, value in state.items()}
        if all(name.startswith(prefix) for name in state) and any(one in expected for one in bare):
            return bare
    return state


def load(kind: Any, name: str, flag: str, heads: Sequence[str] = (), **options: Any) -> Any:
    """Return `kind.from_pretrained(name)`, of which no weight is random but those of a new head.

    Args:
        kind: Class of transformers or diffusers.
        name: Hub id or directory of the model.
        flag: As in `from_pretrained_kwargs`.
        heads: Prefixes of heads, each of which a training makes anew where it lacks, or has
            another shape, as a whole.
        options: Of `from_pretrained`.

    Raises:
        ValueError: as `from_pretrained_kwargs` and `check_fit`.
    """
    with from_pretrained_kwargs(name, flag) as safe:
        model, info = kind.from_pretrained(name, output_loading_info=True, **safe, **options)
    # An entry of another shape comes with both shapes.
    other = {one if isinstance(one, str) else one[0] for one in info["mismatched_keys"]}
    lacking = {*info["missing_keys"], *other}
    for prefix in heads:
        head = {one for one in model.state_dict() if one.startswith(prefix)}
        lacking -= head if head <= lacking else set()
    place = "/".join([name, *filter(None, [options.get("subfolder")])])
    check_fit(place, flag, lacking, info["unexpected_keys"])
    return model


def check_fit(name: str, flag: str, lacking: Collection[str], instead: Collection[str]) -> None:
    """Refuse a base model whose weights lack, or have another shape.

    Args:
        name: Hub id, directory or file of the model.
        flag: Command-line flag that takes it.
        lacking: Names of the weights that would be random.
        instead: Names in its files that nothing takes.

    Raises:
        ValueError: some lack.
    """
    if not lacking:
        return
    first = sorted(lacking)
    text = (
        f"{flag} {name}: expected all weights of its architecture, got {len(lacking)} that lack "
        f"or have another shape, such as {first[:3]}: they would be random."
    )
    prefix = next((p for p in PREFIXES if p + first[0] in instead), None)
    if prefix:
        text += (
            f" Its names begin with {prefix!r}, a wrapper's: save the state dict without it "
            f"(name.removeprefix({prefix!r}))."
        )
    elif instead:
        text += f" There is instead: {sorted(instead)[:3]}. Is its config.json another model's?"
    else:
        text += " Is a part of its files missing? Download it again."
    raise ValueError(text)


def _check_files(name: str, flag: str, *folders: str) -> None:
    """Check the safetensors of a local directory, or of its `folders`."""
    for folder in folders or ("", "*"):
        for path in sorted(glob.glob(os.path.join(glob.escape(name), folder, "*.safetensors"))):
            check_file(path, flag)


def _recognise(begin: bytes) -> str | None:
    """Return what a file is that holds no weights, by its first bytes; None if it is not known."""
    if not begin:
        return "an empty file: a download that was cut off"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull` where it was cloned"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as that of an error or of a log-in"
    return None


def _file_error(path: str, flag: str, reason: str) -> str:
    return (
        f"{flag}: expected weights in {path}, got {reason}. Download it again (`hf download ID "
        f"--local-dir DIR`) and pass what was downloaded."
    )


def _expected_size(begin: bytes, file: Any) -> int | None:
    """Return the bytes that a safetensors file has by its header; None where it has none."""
    header = int.from_bytes(begin, "little")
    if len(begin) < 8 or not 2 <= header <= _LONGEST_HEADER:
        return None
    file.seek(8)
    try:
        tensors = json.loads(file.read(header))
        ends = [one["data_offsets"][1] for key, one in tensors.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return 8 + header + max(ends, default=0)


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
