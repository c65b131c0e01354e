"""Look after an index: `jobs/index.py info | verify | add | delete | compact | collect` [flags]."""

import json
import sys

from cvmatch import progress
from cvmatch.config import parse
from cvmatch.index import change, gallery, verify

COMMANDS = {
    "info": (verify.Info, verify.about),
    "verify": (verify.Verify, verify.verify),
    "add": (change.AddTiles, change.add),
    "delete": (change.DeleteTiles, change.delete),
    "compact": (change.Compact, lambda at: change.compact(at, gallery.spread(at.output))),
    "collect": (change.Collect, change.collect),
}

if __name__ == "__main__":
    command, *flags = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(f"{__doc__}\nFlags of one: jobs/index.py COMMAND --help")
        sys.exit(0)
    if command not in COMMANDS:
        sys.exit(f"jobs/index.py: expected one of {', '.join(COMMANDS)}, got {command!r}.")
    progress.to_console()
    kind, function = COMMANDS[command]
    found = function(parse(kind, flags))
    print(json.dumps({name: value for name, value in found.items() if name != "files"}))
