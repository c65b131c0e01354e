"""Locations as `str` URIs (never `Path`, which turns `s3://x` into `s3:/x`): open, list, publish.

A location is a local path or anything that pyarrow.fs reads (`s3://`, `gs://`, ...). A file appears
whole or not at all: local files are written aside and renamed; object stores commit on close.

What an object store refuses for a moment is asked for again, for PATIENCE_S seconds.

Settings use the names alone, so pyarrow is imported where a file system is needed.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tenacity

if TYPE_CHECKING:
    from pyarrow import fs

_OBJECT_STORES = ("s3", "gcs", "abfs")
_DRIVE = re.compile(r"[A-Za-z]:")

CACHE = "CVMATCH_CACHE"
"""Environment variable: directory of this node's copies; else ~/.cache/cvmatch."""

PATIENCE_S = 180.0
"""Seconds for which a request is made again that a store refuses for a passing reason."""

PASSING = (
    r"INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING"
    r"|HTTP status (5\d\d|429)|status code:? (5\d\d|429)|timed out|onnection re(set|fused)"
)
"""Pattern in errors of faults that pass: pyarrow's object stores raise OSError whatever happens."""

_log = logging.getLogger(__name__)


def is_passing(error: BaseException) -> bool:
    """Return whether an error says that a store cannot be reached now, and nothing of a file."""
    return isinstance(error, OSError) and bool(re.search(PASSING, str(error)))


def _warn_of_wait(state: tenacity.RetryCallState) -> None:
    error = state.outcome and state.outcome.exception()
    _log.warning("storage: waiting for the store, attempt %d: %s", state.attempt_number, error)


retry_passing = tenacity.retry(
    retry=tenacity.retry_if_exception(is_passing),
    wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
    stop=lambda state: (state.seconds_since_start or 0.0) > PATIENCE_S,
    before_sleep=_warn_of_wait,
    reraise=True,
)
"""Decorator: call again, after longer and longer waits, while the error is one that passes."""


def absolute(location: str) -> str:
    """`location` so that it means the same in every process: Ray's workers change directory."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def resolve(location: str) -> "tuple[fs.FileSystem, str]":
    """Return the file system of `location`, and the path in it."""
    from pyarrow import fs  # noqa: PLC0415 (see above)

    return fs.FileSystem.from_uri(absolute(location))


def is_remote(location: str) -> bool:
    """Return whether files there cannot be opened by their paths."""
    return "://" in location.removeprefix("file://")


def local_path(location: str) -> str:
    """Return the absolute path of a location that is not remote."""
    return absolute(location.removeprefix("file://"))


def cache_directory() -> str:
    """Return the directory of this node's copies of what is in object stores."""
    return os.path.abspath(os.environ.get(CACHE) or os.path.expanduser("~/.cache/cvmatch"))


@retry_passing
def local_directory(location: str) -> str:
    """Return the local directory of a location: itself, or this node's copy of what is there now.

    A copy is named by the sizes and times of the files, so one that has changed is copied again.

    Raises:
        FileNotFoundError: there is no file at a URI.
    """
    if not is_remote(location):
        return local_path(location)
    from pyarrow import fs  # noqa: PLC0415 (see above)

    filesystem, path = resolve(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    files = sorted((one.path, one.size, one.mtime_ns) for one in found if one.is_file)
    if not files:
        raise FileNotFoundError(f"{location}: expected a directory with files, found none.")
    name = hashlib.sha256(json.dumps([location, files]).encode()).hexdigest()[:16]
    return _keep_copy(filesystem, path, os.path.join(cache_directory(), "directories", name))


@retry_passing
def local_file(location: str) -> str:
    """Return the local path of a file: itself, or this node's copy of what is there now.

    A copy is named by size and time of the file, so one that has changed is copied again.

    Raises:
        FileNotFoundError: there is no file.
    """
    filesystem, path = resolve(location)
    found = filesystem.get_file_info(path)
    if not found.is_file:
        raise FileNotFoundError(f"{location}: expected a file, found none.")
    if not is_remote(location):
        return local_path(location)
    name = hashlib.sha256(json.dumps([location, found.size, found.mtime_ns]).encode()).hexdigest()
    folder = os.path.join(cache_directory(), "files", name[:16])
    return _keep_copy(filesystem, path, os.path.join(folder, os.path.basename(path)))


def _keep_copy(filesystem: "fs.FileSystem", path: str, copy: str) -> str:
    """Copy a file or a directory to `copy`, whole or not at all, unless it is there; return it."""
    from pyarrow import fs  # noqa: PLC0415 (see above)

    if os.path.exists(copy):
        return copy
    aside = f"{copy}.{uuid.uuid4().hex}.tmp"
    os.makedirs(aside)
    try:
        whole = os.path.join(aside, os.path.basename(copy))
        if not filesystem.get_file_info(path).is_file:
            os.mkdir(whole)  # copy_files makes the directories inside it alone
        fs.copy_files(path, whole, filesystem, fs.LocalFileSystem())
        os.rename(whole, copy)
    except OSError:
        if not os.path.exists(copy):  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return copy


def describe_local(directory: str) -> str:
    """Return a directory with the name of this node: another may not have it."""
    return f"{directory!r} (on {platform.node()})"


def join(location: str, *parts: str) -> str:
    """`location/part/...`."""
    return "/".join([location.rstrip("/"), *parts])


def inside(root: str, relative: str) -> str:
    """`root/relative`, where `relative` comes from a file that we did not write.

    Where `root` is a URI, `relative` is quoted, so that no `%2e%2e` in it turns into `..`.

    Raises:
        ValueError: the path is absolute, names a drive, leaves `root`, or is empty.
    """
    parts = [part for part in relative.replace("\\", "/").split("/") if part != "."]
    if not any(parts) or "\0" in relative:
        raise ValueError(f"path {relative!r} names no file below the data root {root}")
    if not parts[0] or parts[0].endswith(":") or ".." in parts or _DRIVE.match(relative):
        raise ValueError(f"path {relative!r} leaves the data root {root}")
    parts = [part for part in parts if part]
    return join(root, *(map(urllib.parse.quote, parts) if "://" in root else parts))


@retry_passing
def exists(location: str) -> bool:
    """Return whether a file or directory is there."""
    filesystem, path = resolve(location)
    return filesystem.get_file_info(path).type.name != "NotFound"


@retry_passing
def is_directory(location: str) -> bool:
    """Return whether a directory is there."""
    filesystem, path = resolve(location)
    return filesystem.get_file_info(path).type.name == "Directory"


@retry_passing
def names(location: str, directories: bool = False) -> list[str]:
    """Sorted names of the entries (or only `directories`) of a directory; empty where it is not."""
    from pyarrow import fs  # noqa: PLC0415 (see above)

    filesystem, path = resolve(location)
    entries = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(e.base_name for e in entries if not directories or e.type.name == "Directory")


@retry_passing
def list_files(
    location: str, ending: str | tuple[str, ...], hidden: tuple[str, ...] = (".", "_")
) -> list[str]:
    """List the data files of a directory and of all below: sorted paths, relative to it.

    Names may end in (one of) `ending` in any case. What is hidden, or below something hidden, is
    left out: names that begin with a dot (`._a.parquet`), or, as Hadoop has it, with `_`. (Those
    of photos may begin with `_`: pass `hidden`.)
    This is the one rule: who counts rows, who reads them and who hashes them all go by it.
    """
    from pyarrow import fs  # noqa: PLC0415 (see above)

    filesystem, path = resolve(location)
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    base = path.rstrip("/") + "/"
    files = [one.path.removeprefix(base) for one in found if one.is_file]
    return sorted(
        file
        for file in files
        if file.lower().endswith(ending)
        and not any(part.startswith(hidden) for part in file.split("/"))
    )


@retry_passing
def read_bytes(location: str) -> bytes:
    """Read a file.

    Raises:
        FileNotFoundError: there is none; names it.
    """
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def read_text(location: str) -> str:
    """Read a UTF-8 file."""
    return read_bytes(location).decode()


def read_json(location: str) -> Any:
    """Read a JSON file."""
    return json.loads(read_bytes(location))


@retry_passing
def write_bytes(location: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    filesystem, path = resolve(location)
    if filesystem.type_name in _OBJECT_STORES:
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    with filesystem.open_output_stream(aside) as stream:
        stream.write(data)
    filesystem.move(aside, path)


@retry_passing
def swap_bytes(location: str, old: bytes | None, new: bytes) -> bool:
    """Write a small file if its content is `old` still (None: there is none).

    Of several who try at once, one does. Returns whether the content is `new`; no one else must
    write the same, since the answer to a put that was done may be lost.
    """
    if not is_remote(location):
        return _swap_local(local_path(location), old, new)
    return _swap_remote(location, old, new)


def _swap_local(path: str, old: bytes | None, new: bytes) -> bool:
    """Swap by a hard link, or by a rename under the lock of the file that is renamed over."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(aside, "xb") as file:
        file.write(new)
    try:
        if old is None:
            os.link(aside, path)
            return True
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)) or file.read() != old:
                return False
            os.replace(aside, path)
            return True
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is in place
            os.remove(aside)


def _swap_remote(location: str, old: bytes | None, new: bytes) -> bool:
    """Swap by a conditional put."""
    import obstore  # noqa: PLC0415 (only where something is shared in a store)
    from obstore import exceptions  # noqa: PLC0415

    folder, _, name = location.rpartition("/")
    store = _conditional_store(folder)
    try:
        found = None if old is None else obstore.get(store, name)
        if found is None:
            obstore.put(store, name, new, mode="create")
        elif (content := bytes(found.bytes())) != old:
            return content == new
        else:
            mark: Any = {key: found.meta[key] for key in ("e_tag", "version") if found.meta[key]}
            obstore.put(store, name, new, mode=mark)
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        return bytes(obstore.get(store, name).bytes()) == new
    except FileNotFoundError:
        return False
    except exceptions.BaseError as error:
        raise OSError(f"{location}: {error}") from error  # which may pass
    return True


def _conditional_store(folder: str) -> Any:
    """Open a folder of an object store for conditional puts, where pyarrow opens it."""
    from obstore.store import from_url  # noqa: PLC0415

    filesystem: Any = resolve(folder)[0]
    if filesystem.type_name != "s3":
        return from_url(folder)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"region": filesystem.region}
    if endpoint:
        options |= {"endpoint": endpoint}
        options |= {"client_options": {"allow_http": endpoint.startswith("http://")}}
    return from_url(folder, **options)


def write_text(location: str, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    write_bytes(location, text.encode())


def replace_non_finite(value: Any) -> Any:
    """Return a tree of JSON with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: replace_non_finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(location: str, value: Any) -> None:
    """Write a JSON file with sorted keys, whole or not at all."""
    write_text(location, json.dumps(value, indent=2, sort_keys=True) + "\n")


@retry_passing
def remove(location: str) -> None:
    """Delete a file, or a directory and all in it, or nothing where there is none."""
    filesystem, path = resolve(location)
    kind = filesystem.get_file_info(path).type.name
    if kind == "Directory":
        filesystem.delete_dir(path)
    elif kind == "File":
        filesystem.delete_file(path)
