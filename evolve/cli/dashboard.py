"""`evolve dashboard`: a search in the browser, while it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from evolve.cli.options import FolderArgument
from evolve.cli.stderr import EXIT_PAUSED
from evolve.errors import PausedError
from evolve.merge_progress import say


def dashboard(
    folder: FolderArgument,
    port: Annotated[int, typer.Option(help="on this machine; 0 takes a free one")] = 8080,
) -> int:
    """Show a search in the browser, while it runs, on this machine only; Ctrl-C ends it."""
    from evolve.dashboard import HOST, server

    with server(folder, port) as serving:
        say(f"http://{HOST}:{serving.server_port}/dashboard (Ctrl-C ends it)")
        try:
            serving.serve_forever()
        except PausedError:
            return EXIT_PAUSED
    return 0
