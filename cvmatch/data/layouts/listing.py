"""Files by the paths that a table states, which need not be their true names."""

import posixpath
import re

from cvmatch.data import storage
from cvmatch.data.images import ENDINGS
from cvmatch.data.layouts.rows import MISSING, Reject, Row

_PREFIX = re.compile("^(input|output)", re.IGNORECASE)


class Listing:
    """Finds files below a root by stated path, leniently; lists each directory once."""

    def __init__(self, root: str, renamed: bool = False) -> None:
        """`renamed`: names may differ in extension and prefix, as those of CVUSA's tables do."""
        self._root, self._renamed = root, renamed
        self._folders: dict[str, str | None] = {"": ""}
        self._names: dict[str, dict[str, list[str]]] = {}  # of a folder: lower case -> names

    def find(self, stated: str) -> str | None:
        """Return the file that `stated` means, relative to the root; None where there is none.

        Names may differ in case (`Streetview/`, `.JPG`), and where files were `renamed` in
        extension and in the prefix `input`. A path may be absolute, where it is below the root.

        Raises:
            ValueError: `stated` leaves the root.
        """
        stated = self._relative(stated)
        storage.inside(self._root, stated)
        parts = [part for part in stated.replace("\\", "/").split("/") if part not in ("", ".")]
        folder = self._folder("/".join(parts[:-1]))
        if folder is None:
            return None
        for name in self._list_candidates(parts[-1]):
            if match := self._match(folder, name):
                return posixpath.join(folder, match)
        return None

    def _list_candidates(self, name: str) -> list[str]:
        if not self._renamed:
            return [name]
        stem, suffix = posixpath.splitext(name)
        bare = _PREFIX.sub("", stem)
        stems = dict.fromkeys((stem, bare, f"input{bare}"))
        return [f"{one}{ending}" for one in stems for ending in (suffix, *ENDINGS)]

    def _relative(self, stated: str) -> str:
        path = stated.replace("\\", "/")
        remote = storage.is_remote(self._root)
        root = self._root if remote else storage.resolve(self._root)[1]
        below = path.removeprefix(f"{root.rstrip('/')}/")
        return stated if below == path else below

    def _folder(self, stated: str) -> str | None:
        if stated not in self._folders:
            above, name = posixpath.split(stated)
            parent, match = self._folder(above), None
            if parent is not None:
                match = self._match(parent, name)
            self._folders[stated] = None if match is None else posixpath.join(parent or "", match)
        return self._folders[stated]

    def _match(self, folder: str, name: str) -> str | None:
        """Return the name in a folder that is `name`, or else one that differs in case alone."""
        if folder not in self._names:
            location = storage.inside(self._root, folder) if folder else self._root
            known = self._names.setdefault(folder, {})
            for other in storage.names(location):
                known.setdefault(other.lower(), []).append(other)
        alike = self._names[folder].get(name.lower(), [None])
        return name if name in alike else alike[0]


def find_files(listing: Listing, row: Row) -> list[str | None] | Reject:
    """Return aerial, ground and (or None) class map of a row, or what is wrong with it."""
    if row.pair_id is None:
        return {"pair_id": None, "file": row.aerial, "reason": row.reason}
    files: list[str | None] = []
    needed = ((row.aerial, True), (row.ground, True), (row.classes, row.needs_classes))
    for stated, is_needed in needed:
        try:
            files.append(listing.find(stated) if stated else None)
        except ValueError as error:
            return {"pair_id": row.pair_id, "file": stated, "reason": str(error)}
        if files[-1] is None and stated and is_needed:
            return {"pair_id": row.pair_id, "file": stated, "reason": MISSING}
    return files
