"""The `planner` program: its commands, and how errors leave it."""

from __future__ import annotations

import os
import signal
import sys

import typer

from planner import stopping
from planner._version import __version__
from planner.cli import (
    calibrate,
    check,
    data,
    emit,
    estimate,
    explain,
    hardware,
    measure,
    model,
    plan,
    run,
    schema,
    training,
    validate,
)

app = typer.Typer(
    name="planner",
    help="Which parallel configuration should this training job use on this cluster, and does it fit?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("explain")(explain.explain)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("calibrate")(calibrate.calibrate)
app.command("emit", cls=training.Grouped)(emit.emit)
app.command("run", cls=training.Grouped)(run.run)
app.add_typer(data.app, name="data")
app.command("measure")(measure.measure)
app.command("validate")(validate.validate)
app.add_typer(model.app, name="model")
app.add_typer(hardware.app, name="hardware")
app.command("schema")(schema.schema)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"planner {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and leave."),
) -> None:
    pass


def main() -> None:
    """Run the program; the exit code says what happened (see the README). `planner.__main__` is where it starts."""
    stopping.install()
    try:
        app()
    except BrokenPipeError:
        # The reader went away (planner ... | head): not an error. Keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("planner: interrupted", file=sys.stderr)
        sys.exit(128 + (stopping.received() or signal.SIGINT))


if __name__ == "__main__":
    main()
