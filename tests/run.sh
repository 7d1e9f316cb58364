#!/usr/bin/env bash
# Make an environment with the test extra and run everything: lint, types, import contract, tests.
# bash tests/run.sh          the default tier
# bash tests/run.sh --slow   the slow tier as well
# bash tests/run.sh PATH …   further arguments go to pytest
# PYTHON chooses the interpreter, PLANNER_TEST_VENV the environment's folder, PLANNER_TORCH the torch to install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
venv="${PLANNER_TEST_VENV:-.venv-test}"
export OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }

extras="runtime,test"
case " $* " in *" --slow "*) extras="$extras,corpus" ;; esac # published configurations, 82 MB

say "environment"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${PLANNER_TORCH:-torch==2.13.0}" -e ".[$extras]"
bin="$venv/bin"
"$bin/planner" --version

say "ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .

say "mypy"
"$bin/mypy"

say "import contract"
"$bin/lint-imports"

say "pytest"
case " $*" in
*" "[!-]*) "$bin/python" -m pytest -n auto "$@" ;; # paths of the caller's
*)
    # One worker a core; process groups would crowd each other out: tests of the runtime run alone, one after another.
    "$bin/python" -m pytest -n auto --ignore=tests/runtime "$@"
    "$bin/python" -m pytest tests/runtime "$@"
    ;;
esac
