"""Test helpers are imported by name from this folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tier as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    left_out = [i for i in items if "slow" in i.keywords]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if "slow" not in i.keywords]
