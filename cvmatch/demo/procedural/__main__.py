"""`python -m cvmatch.demo.procedural --output data/demo --preset demo`: write an embedded CVUSA."""

import json

from cvmatch.config import parse
from cvmatch.demo.procedural.write import make_world
from cvmatch.demo.settings import MakeWorld

if __name__ == "__main__":
    print(json.dumps(make_world(parse(MakeWorld))))  # noqa: T201 - a job's answer
