"""The command line: commands, exit codes, and what is printed; no logic."""

import sys
from pathlib import Path

from leankv.cli import bundles, hub, models, rates, reports, stores, sweeps, tasks
from leankv.cli.app import PANEL_OF, app

__all__ = ["app", "bundles", "hub", "main", "models", "rates", "reports", "stores", "sweeps", "tasks"]

app.registered_commands.sort(key=lambda command: list(PANEL_OF).index(command.name or ""))


def main() -> None:
    """Entry point of the `leankv` command."""
    sys.path.insert(0, str(Path.cwd()))  # modules of the user's own are found where the command is called
    app()
