"""Look after an index: `jobs/index.py info | verify | add | delete | compact | collect` [flags]."""

import dataclasses
import json
import sys

from cvmatch import engine, progress
from cvmatch.config import parse
from cvmatch.index import build, change, verify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Print the manifest of an index, but for its files."""

    index: str = "data/index"
    """Directory of the index."""
    version: str = ""
    """Version; empty: the current one."""


def _info(config: Info) -> dict:
    return verify.about(config.index, config.version)


def _compact(config: change.Compact) -> dict:
    engine.start()
    return change.compact(config, build.spread(config.output))


_COMMANDS = {
    "info": (Info, _info),
    "verify": (verify.Verify, verify.verify),
    "add": (change.AddTiles, change.add),
    "delete": (change.DeleteTiles, change.delete),
    "compact": (change.Compact, _compact),
    "collect": (change.Collect, change.collect),
}

if __name__ == "__main__":
    command, *flags = sys.argv[1:] or [""]
    if command not in _COMMANDS:
        sys.exit(f"jobs/index.py: expected one of {', '.join(_COMMANDS)}, got {command!r}.")
    progress.to_console()
    kind, function = _COMMANDS[command]
    found = function(parse(kind, flags))
    print(json.dumps({name: value for name, value in found.items() if name != "files"}))
