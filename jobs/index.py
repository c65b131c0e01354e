"""Look after an index: `jobs/index.py info | verify | add | delete | compact | vacuum` [flags]."""

import json
import sys

from cvmatch.config import parse
from cvmatch.index import gallery, settings, update, verify
from cvmatch.runtime import progress

COMMANDS = {
    "info": (settings.Info, verify.about),
    "verify": (settings.Verify, verify.verify),
    "add": (settings.AddTiles, update.add),
    "delete": (settings.DeleteTiles, update.delete),
    "compact": (settings.Compact, lambda at: update.compact(at, gallery.spread(at.output))),
    "vacuum": (settings.Vacuum, update.vacuum),
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
