"""A directory of files that never change, and CURRENT, which names the version that readers open.

Everything is written aside, hashed, made durable and renamed into place; a version's manifest lists
each of its files with size and hash, and CURRENT is replaced last. So an interrupted publication
leaves the old version readable, and a reader keeps the one that it opened. Readers memory-map the
files, so that an index in an object store is worked on in a local copy (`remote`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

FORMAT = 2
"""Version of the layout; a directory of another one is refused."""

SMALL = 16 * 2**20
"""Bytes up to which a file is hashed at each opening; of a larger one only the size is checked."""

MANIFEST = "manifest.json"

CURRENT = "CURRENT"

_LOCK = "LOCK"

Files = dict[str, dict[str, Any]]
"""Path below the root -> {"bytes": size, "sha256": hex}."""


def place(root: str, aside: str, name: str) -> Files:
    """Move a finished file or directory to `root/name`, a name of its content; gives its files.

    What stands there under that name already is kept if these files are whole, else put right.
    Either way they are of this moment, by which `update.vacuum` spares what a manifest will list.
    """
    target = os.path.join(root, name)
    files = files_of(aside, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.exists(target):
        for path in walk(target):
            os.utime(path)
        if files.items() <= files_of(target, name).items():
            return files
        os.replace(target, f"{aside}.damaged")
    for path in walk(aside):
        os.utime(path)
        _sync(path)
    os.replace(aside, target)
    _sync(os.path.dirname(target))
    return files


def place_file(root: str, aside: str, kind: str) -> tuple[str, Files]:
    """Move a finished file below `root/kind`, under a name of its content; gives name and files."""
    (entry,) = files_of(aside, kind).values()
    name = f"{kind}/{entry['sha256'][:16]}{os.path.splitext(aside)[1]}"
    return name, place(root, aside, name)


def commit(root: str, info: Mapping[str, Any], beside: Mapping[str, bytes]) -> dict[str, Any]:
    """Make a version of `info` (which holds "files") the current one; gives its manifest.

    `info` of a change names the version that it changes as its "parent"; that of a build, which
    follows whatever is current, names none. `beside`: small files that are kept with the manifest.

    Raises:
        ValueError: the parent is not the current version any more. Nothing was published.
        FileNotFoundError: a file was removed meanwhile (of an older version, whose shards a build
            takes again). Nothing was published.
    """
    with alone(root):
        now = current(root)
        if info.get("parent", now) != now:
            raise ValueError(
                f"index {root}: this is a change of version {info['parent']}, but {now} is the "
                "current one: something else changed the index meanwhile, and would be undone. "
                "Nothing was published. Run it again."
            )
        for name in info["files"]:
            if not os.path.exists(os.path.join(root, name)):
                raise FileNotFoundError(
                    f"index {root}: {name} was removed while this version was made, by vacuum "
                    "perhaps. Nothing was published. Run it again."
                )
        return _commit(root, {**info, "parent": now}, beside)


def _commit(root: str, info: Mapping[str, Any], beside: Mapping[str, bytes]) -> dict[str, Any]:
    folder = os.path.join(root, "versions")
    os.makedirs(folder, exist_ok=True)
    number = 1 + max((int(name[1:]) for name in os.listdir(folder)), default=0)
    version = f"v{number:06d}"
    os.mkdir(os.path.join(folder, version))
    for name, data in beside.items():
        write(os.path.join(folder, version, name), data)
    full = {
        **info,
        "format": FORMAT,
        "version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": info["files"]
        | {
            path: entry
            for name in beside
            for path, entry in files_of(
                os.path.join(folder, version, name), f"versions/{version}/{name}"
            ).items()
        },
    }
    full["sha256"] = _digest(full)
    text = json.dumps(full, indent=2, sort_keys=True) + "\n"
    write(os.path.join(folder, version, MANIFEST), text.encode())
    write(os.path.join(root, CURRENT), f"{version}\n".encode())
    return full


def names(root: str) -> list[str]:
    """Names of the published versions, oldest first."""
    folder = os.path.join(root, "versions")
    there = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(n for n in there if os.path.exists(os.path.join(folder, n, MANIFEST)))


def current(root: str) -> str | None:
    """Name of the current version; None where nothing was published yet."""
    path = os.path.join(root, CURRENT)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def read(root: str, version: str = "") -> dict[str, Any]:
    """The manifest of `version`, by default of the current one.

    Raises:
        FileNotFoundError: nothing published there, or no such version.
        ValueError: another format, or a manifest that was changed.
    """
    name = version or current(root)
    path = os.path.join(root, "versions", name or "", MANIFEST)
    if name is None or not os.path.exists(path):
        raise FileNotFoundError(
            f"index {root}: expected version {name or 'named in CURRENT'}, found "
            f"{names(root) or 'no index'}. Build it: jobs/build_index.py --output {root}"
        )
    with open(path, encoding="utf-8") as file:
        info = json.load(file)
    if info.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {info.get('format')}. Build the index again "
            "with this version of cvmatch, or read it with the one that wrote it."
        )
    if info["sha256"] != (digest := _digest(info)):
        raise ValueError(
            f"{path}: expected sha256 {info['sha256']}, got {digest}: the manifest was changed. "
            f"Build the index again: jobs/build_index.py --output {root}"
        )
    return info


def check(root: str, files: Files, deep: bool = False) -> None:
    """Check the size of each file, and the hash of each small one; `deep`: of all.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or changed; says what was expected.
    """
    for name, wanted in files.items():
        path = os.path.join(root, name)
        if not os.path.exists(path):
            raise FileNotFoundError(f"index {root}: {name} is missing. Copy or build it again.")
        got: dict[str, Any] = {"bytes": os.path.getsize(path)}
        if got["bytes"] == wanted["bytes"] and (deep or wanted["bytes"] <= SMALL):
            got["sha256"] = _hash(path)
        if any(got[field] != wanted[field] for field in got):
            raise ValueError(
                f"index {root}: {name} is damaged: expected {wanted}, got {got}. Copy it again, or "
                f"build the index again: jobs/build_index.py --output {root}"
            )


def files_of(path: str, name: str) -> Files:
    """Size and hash of a file, or of each file below a directory, by `name` and path below it."""
    found = {}
    for file in walk(path):
        below = os.path.relpath(file, path)
        key = name if below == "." else f"{name}/{below}"
        found[key] = {"bytes": os.path.getsize(file), "sha256": _hash(file)}
    return found


def write(path: str, data: bytes) -> None:
    """Write a file so that it is there whole, after a power cut too, or not at all."""
    aside = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(aside, "wb") as file:
        file.write(data)
    _sync(aside)
    os.replace(aside, path)
    _sync(os.path.dirname(path))


def walk(path: str) -> list[str]:
    """The file at a path, or all below it, sorted."""
    if os.path.isfile(path):
        return [path]
    return sorted(os.path.join(d, name) for d, _, names in os.walk(path) for name in names)


@contextlib.contextmanager
def alone(root: str) -> Iterator[None]:
    """While no other process publishes there. The lock of one that is killed is gone with it."""
    with open(os.path.join(root, _LOCK), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(info: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in info.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
