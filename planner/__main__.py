"""The `planner` program: its signals first, then the imports that take a while."""

from __future__ import annotations

from planner import stopping


def main() -> None:
    """Run the command line."""
    stopping.install()
    from planner.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
