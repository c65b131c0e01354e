"""An index in an object store: a local copy, of which only what is missing travels.

Names of files are names of their content, so a copy never grows stale. CURRENT travels last. Object
stores of pyarrow have no conditional writes: publish from one process at a time.
"""

import contextlib
import os
import uuid

from pyarrow import fs

from cvmatch.data import manifest, storage
from cvmatch.index import versions

CACHE = "CVMATCH_CACHE"
"""Environment variable: directory of copies; else ~/.cache/cvmatch."""


def is_remote(uri: str) -> bool:
    """Whether files at `uri` cannot be memory-mapped."""
    return "://" in uri.removeprefix("file://")


def root(uri: str) -> str:
    """The local directory of an index: itself, or its copy."""
    if not is_remote(uri):
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    cache = os.environ.get(CACHE) or os.path.expanduser("~/.cache/cvmatch")
    return os.path.join(os.path.abspath(cache), manifest.digest(uri.rstrip("/"))[:16])


def fetched(uri: str, version: str = "") -> str:
    """`root(uri)`, where the current version, or the one named, is whole.

    Where nothing was published yet it is an empty directory.
    """
    to = root(uri)
    current = storage.join(uri, versions.CURRENT)
    if not is_remote(uri) or not (version or storage.exists(current)):
        return to
    name = version or storage.read_text(current).strip()
    place = f"versions/{name}/{versions.MANIFEST}"
    if storage.exists(storage.join(uri, place)):
        _copy(storage.join(uri, place), os.path.join(to, place))
        for file, entry in versions.read(to, name)["files"].items():
            _fetch(storage.join(uri, file), os.path.join(to, file), entry["bytes"])
    if not version:
        versions.write(os.path.join(to, versions.CURRENT), f"{name}\n".encode())
    return to


def pushed(uri: str, version: str) -> None:
    """Make a version of the local copy the current one at `uri`; nothing where that is the copy."""
    if not is_remote(uri):
        return
    here = root(uri)
    files = [*versions.read(here, version)["files"], f"versions/{version}/{versions.MANIFEST}"]
    for file in files:
        _push(os.path.join(here, file), storage.join(uri, file))
    storage.write_text(storage.join(uri, versions.CURRENT), f"{version}\n")


def _fetch(source: str, target: str, size: int) -> None:
    if not os.path.exists(target) or os.path.getsize(target) != size:
        _copy(source, target)


def _copy(source: str, target: str) -> None:
    """Copy a file here, whole or not at all."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    filesystem, path = storage.resolve(source)
    aside = f"{target}.{uuid.uuid4().hex}.part"  # a name that no other process copies to
    try:
        fs.copy_files(path, aside, filesystem, fs.LocalFileSystem())
        os.replace(aside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is in place, or no copy was begun
            os.remove(aside)


def _push(source: str, target: str) -> None:
    filesystem, path = storage.resolve(target)
    if filesystem.get_file_info(path).size != os.path.getsize(source):
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        fs.copy_files(source, path, fs.LocalFileSystem(), filesystem)
