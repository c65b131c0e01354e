"""A directory of files that never change, and CURRENT, which names the version that readers open.

Everything is written aside, hashed, made durable and renamed into place; a version's manifest lists
each of its files with size and hash, and CURRENT is replaced last. So an interrupted publication
leaves the old version readable, and a reader keeps the one that it opened.

Readers memory-map the files. So an index in an object store is worked on in a local copy, of which
only what is missing travels: names are of content (a version's has a random part there), and a copy
never grows stale. CURRENT travels last, if the version that was changed is the current one still.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import tenacity
from pyarrow import fs

from cvmatch.data import storage
from cvmatch.data.manifest import digest
from cvmatch.index import manifest as manifests
from cvmatch.index.manifest import FileInfo, Files, IndexManifest

SMALL = 16 * 2**20
"""Bytes up to which a file is hashed at each opening; of a larger one only the size is checked."""

CURRENT = "CURRENT"

_LOCK = "LOCK"


class StaleVersionError(ValueError):
    """Something else changed the index since the version was read that a change is of."""


retry_stale = tenacity.retry(
    retry=tenacity.retry_if_exception_type(StaleVersionError),
    wait=tenacity.wait_random(0, 1),
    stop=tenacity.stop_after_attempt(50),
    reraise=True,
)
"""Decorator of a change that reads the current version itself: do it again on the newer one."""


def move_into_place(root: str, staged: str, name: str) -> Files:
    """Move a finished file or directory to `root/name`, a name of its content; return its files.

    What has that name already is kept if these files are whole, else replaced. Either way they are
    of this moment, by which `vacuum` spares what a manifest will list.
    """
    target = os.path.join(root, name)
    files = hash_files(staged, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.exists(target):
        for path in walk_files(target):
            os.utime(path)
        if files.items() <= hash_files(target, name).items():
            return files
        os.replace(target, f"{staged}.damaged")
    for path in walk_files(staged):
        os.utime(path)
        _sync(path)
    os.replace(staged, target)
    _sync(os.path.dirname(target))
    return files


def move_file_into_place(root: str, staged: str, folder: str) -> tuple[str, Files]:
    """Move a finished file below `root/folder`, named by its content; return name and files."""
    (info,) = hash_files(staged, folder).values()
    name = f"{folder}/{info.sha256[:16]}{os.path.splitext(staged)[1]}"
    return name, move_into_place(root, staged, name)


def commit(root: str, manifest: IndexManifest, beside: Mapping[str, bytes]) -> IndexManifest:
    """Make a version the current one; return its manifest.

    A change names the version that it changes as its `parent`; a build, which follows whatever is
    current, names none. `beside`: small files that are kept with the manifest.

    Raises:
        StaleVersionError: the parent is not the current version any more. Nothing was published.
        FileNotFoundError: a file was removed meanwhile (of an older version, whose shards a build
            takes again). Nothing was published.
    """
    with publish_lock(root):
        current = current_version(root)
        if manifest.parent not in (None, current):
            raise _stale(root, manifest.parent, current)
        for name in manifest.files:
            if not os.path.exists(os.path.join(root, name)):
                raise FileNotFoundError(
                    f"index {root}: {name} was removed while this version was made, by vacuum "
                    "perhaps. Nothing was published. Run it again."
                )
        return _write_version(root, dataclasses.replace(manifest, parent=current), beside)


def list_versions(root: str) -> list[str]:
    """Return the names of the published versions, oldest first."""
    folder = os.path.join(root, "versions")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if os.path.exists(_manifest_path(root, name)))


def current_version(root: str) -> str | None:
    """Return the name of the current version; None where nothing was published yet."""
    path = os.path.join(root, CURRENT)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def read_version(root: str, version: str = "") -> IndexManifest:
    """Read the manifest of `version`, by default of the current one.

    Raises:
        FileNotFoundError: nothing published there, or no such version.
        ValueError: see `read_manifest`.
    """
    name = version or current_version(root)
    if name is None or not os.path.exists(_manifest_path(root, name)):
        raise FileNotFoundError(
            f"index {root}: expected version {name or 'named in CURRENT'}, found "
            f"{list_versions(root) or 'no index'}. Build it: cvmatch build-index --output {root}"
        )
    return manifests.read_manifest(_manifest_path(root, name))


def check_files(root: str, files: Files, deep: bool = False) -> None:
    """Check the size of each file, and the hash of each small one; `deep`: of all.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or changed; says what was expected.
    """
    for name, info in files.items():
        path = os.path.join(root, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"index {root}: {name} is missing. Copy or build it again.")
        size = os.path.getsize(path)
        hashed = size == info.bytes and (deep or size <= SMALL)
        got = FileInfo(size, _hash(path) if hashed else info.sha256)
        if got != info:
            raise ValueError(
                f"index {root}: {name} is damaged: expected {info}, got {got}. Copy it again, or "
                f"build the index again: cvmatch build-index --output {root}"
            )


def hash_files(path: str, name: str) -> Files:
    """Return size and hash of a file, or of each file below a directory, by `name` and path."""
    files = {}
    for file in walk_files(path):
        below = os.path.relpath(file, path)
        key = name if below == "." else f"{name}/{below}"
        files[key] = FileInfo(os.path.getsize(file), _hash(file))
    return files


def write_file(path: str, data: bytes) -> None:
    """Write a file so that it is there whole, after a power cut too, or not at all."""
    staged = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(staged, "wb") as file:
        file.write(data)
    _sync(staged)
    os.replace(staged, path)
    _sync(os.path.dirname(path))


def walk_files(path: str) -> list[str]:
    """Return the file at a path, or all below it, sorted."""
    if os.path.isfile(path):
        return [path]
    return sorted(os.path.join(d, name) for d, _, names in os.walk(path) for name in names)


@contextlib.contextmanager
def publish_lock(root: str) -> Iterator[None]:
    """Let no other process publish there. The lock of one that is killed is gone with it."""
    with open(os.path.join(root, _LOCK), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def locate_matcher(uri: str, model: str) -> str:
    """Return where every node finds the matcher of that fingerprint: a URI for an object store."""
    return storage.join(uri if storage.is_remote(uri) else local_root(uri), "matcher", model)


def local_root(uri: str) -> str:
    """Return the local directory of an index: itself, or its copy."""
    if not storage.is_remote(uri):
        return storage.local_path(uri)
    return os.path.join(storage.cache_directory(), digest(uri.rstrip("/"))[:16])


def fetch(uri: str, version: str = "") -> str:
    """Copy what is missing of the current version, or the one named; return `local_root(uri)`.

    Where nothing was published yet it is an empty directory.
    """
    root = local_root(uri)
    current = storage.join(uri, CURRENT)
    if not storage.is_remote(uri):
        return root
    if not (version or storage.exists(current)):
        with contextlib.suppress(FileNotFoundError):  # of an index that was there before
            os.remove(os.path.join(root, CURRENT))
        return root
    name = version or storage.read_text(current).strip()
    if storage.exists(_manifest_path(uri, name)):
        _copy(_manifest_path(uri, name), _manifest_path(root, name))
        for file, info in read_version(root, name).files.items():
            path = os.path.join(root, file)
            if not os.path.exists(path) or os.path.getsize(path) != info.bytes:
                _copy(storage.join(uri, file), path)
    if not version:
        write_file(os.path.join(root, CURRENT), _line(name))
    return root


def push(uri: str, version: str) -> None:
    """Make a version of the local copy the current one at `uri`; nothing where that is the copy.

    Raises:
        StaleVersionError: the version that it follows is not the current one there any more.
    """
    if not storage.is_remote(uri):
        return
    root, place = local_root(uri), storage.join(uri, CURRENT)
    current = storage.read_bytes(place) if storage.exists(place) else None
    if current == _line(version):
        return
    info = read_version(root, version)
    parent = _line(info.parent) if info.parent else None
    if current != parent:
        raise _stale(uri, info.parent, current and current.decode().strip())
    for file in [*info.files, f"versions/{version}/{manifests.NAME}"]:
        _push(os.path.join(root, file), storage.join(uri, file))
    if not storage.swap_bytes(place, parent, _line(version)):
        raise _stale(uri, info.parent, storage.read_text(place).strip())


def _write_version(
    root: str, manifest: IndexManifest, beside: Mapping[str, bytes]
) -> IndexManifest:
    folder = os.path.join(root, "versions")
    os.makedirs(folder, exist_ok=True)
    number = 1 + max((int(name[1:].partition("-")[0]) for name in os.listdir(folder)), default=0)
    version = f"v{number:06d}"
    if os.path.dirname(root) == storage.cache_directory():
        version += f"-{uuid.uuid4().hex[:8]}"  # another copy may make one of this number meanwhile
    os.mkdir(os.path.join(folder, version))
    files = dict(manifest.files)
    for name, data in beside.items():
        path = os.path.join(folder, version, name)
        write_file(path, data)
        files |= hash_files(path, f"versions/{version}/{name}")
    signed = dataclasses.replace(
        manifest,
        version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
    ).sign()
    write_file(_manifest_path(root, version), signed.to_json().encode())
    write_file(os.path.join(root, CURRENT), _line(version))
    return signed


def _line(version: str) -> bytes:
    return f"{version}\n".encode()


def _stale(where: str, parent: str | None, current: str | bytes | None) -> StaleVersionError:
    return StaleVersionError(
        f"index {where}: this is a change of version {parent}, but {current} is the current one: "
        "something else changed the index meanwhile, and would be undone. Nothing was published. "
        "Run it again."
    )


def _manifest_path(root: str, version: str) -> str:
    return storage.join(root, "versions", version, manifests.NAME)


def _copy(source: str, target: str) -> None:
    """Copy a file here, whole or not at all."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    filesystem, path = storage.resolve(source)
    staged = f"{target}.{uuid.uuid4().hex}.part"  # a name that no other process copies to
    try:
        fs.copy_files(path, staged, filesystem, fs.LocalFileSystem())
        os.replace(staged, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is in place, or no copy was begun
            os.remove(staged)


def _push(source: str, target: str) -> None:
    filesystem, path = storage.resolve(target)
    if filesystem.get_file_info(path).size != os.path.getsize(source):
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        fs.copy_files(source, path, fs.LocalFileSystem(), filesystem)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
