"""An S3 server that refuses while a file says so: `python refusing_store.py HOST PORT FILE`.

The file holds `ok`, `503` (every request is refused) or a share such as `0.05` (of the requests).
"""

import random
import sys
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

_BODY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class RefusingStore:
    """A WSGI application: moto's S3, or its refusals."""

    def __init__(self, mode: Path) -> None:
        self.mode = mode
        self.store = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, answer):
        mode = self.mode.read_text().strip()
        if mode == "ok" or (mode != "503" and random.random() >= float(mode)):
            return self.store(environ, answer)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer("503 Slow Down", [("Content-Type", "application/xml")])
        return [_BODY]


if __name__ == "__main__":
    host, port, mode = sys.argv[1:]
    run_simple(host, int(port), RefusingStore(Path(mode)), threaded=True)
