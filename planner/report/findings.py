"""Findings of `planner check` for people and CI systems: full text, JSON, GitHub annotations, JUnit XML."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from planner.checks.feasibility import CheckResult
from planner.errors import Problem
from planner.report.uncertainty import probability

FORMATS = ("full", "json", "github", "junit")


def render(results: Sequence[CheckResult], output_format: str) -> str:
    """The findings of all files in one of FORMATS."""
    return {"full": _full, "json": _json, "github": _github, "junit": _junit}[output_format](results)


def _full(results: Sequence[CheckResult]) -> str:
    lines = [str(_relative(p)) for r in results for p in r.findings]
    for r in results:
        if not r.findings and r.estimate is not None:
            m = r.estimate.memory
            lines.append(
                f"{_path(r.file)}: feasible, {m.peak_gib:.1f} of {m.limit_gib:.1f} GiB on stage {m.peak_stage} "
                f"(limit: {m.limit_by}), OOM probability {probability(m.oom_probability)}"
            )
    errors = sum(p.severity == "error" for r in results for p in r.findings)
    warnings = sum(p.severity == "warning" for r in results for p in r.findings)
    lines.append(f"{len(results)} file{'s' * (len(results) != 1)}, {_count(errors, 'error')}, {_count(warnings, 'warning')}")
    return "\n".join(lines) + "\n"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _path(path: str) -> str:
    """Relative to the current folder where possible, with forward slashes: what CI systems match on."""
    try:
        return os.path.relpath(path).replace(os.sep, "/") if Path(path).is_absolute() else path
    except ValueError:
        return path


def _relative(problem: Problem) -> Problem:
    from dataclasses import replace

    return problem.at(replace(problem.location, file=_path(problem.location.file)))


def _json(results: Sequence[CheckResult]) -> str:
    data: list[dict[str, Any]] = []
    for r in results:
        memory = r.estimate.memory if r.estimate else None
        data.append(
            {
                "file": _path(r.file),
                "kind": r.kind,
                "feasible": not r.failed,
                "peak_gib": memory.peak_gib if memory else None,
                "peak_interval": memory.interval.model_dump() if memory else None,
                "limit_gib": memory.limit_gib if memory else None,
                "limit_by": memory.limit_by if memory else None,
                "oom_probability": memory.oom_probability if memory else None,
                "step_time_s": r.estimate.step_time_s if r.estimate else None,
                "step_time_interval": r.estimate.interval.model_dump() if r.estimate else None,
                "findings": [asdict(_relative(p)) for p in r.findings],
            }
        )
    return json.dumps({"files": data, "feasible": not any(r.failed for r in results)}, indent=2) + "\n"


def _github(results: Sequence[CheckResult]) -> str:
    """Workflow commands, errors first, since GitHub shows only a few a step."""
    problems = [p for r in results for p in r.findings]
    lines = []
    for p in sorted(problems, key=lambda p: p.severity != "error"):
        place = p.location
        properties = {"title": p.code, "file": _path(place.file), "line": max(place.line, 1), "col": max(place.col, 1)}
        message = "\n".join(t for t in (p.what, f"why: {p.why}" if p.why else "", f"fix: {p.fix}" if p.fix else "") if t)
        shown = ",".join(f"{k}={_escape(str(v), True)}" for k, v in properties.items())
        lines.append(f"::{p.severity} {shown}::{_escape(message, False)}")
    return "".join(line + "\n" for line in lines)


def _escape(text: str, is_property: bool) -> str:
    """GitHub's escapes for workflow commands."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text


def _junit(results: Sequence[CheckResult]) -> str:
    """One suite a file, one case a rule, so that dashboards show what was checked and not only what failed."""
    root = ElementTree.Element("testsuites", name="planner check")
    for r in results:
        by_code: dict[str, list[Problem]] = {}
        for p in r.findings:
            by_code.setdefault(p.code, []).append(p)
        codes = list(dict.fromkeys([*r.rules, *by_code]))
        failures = sum(any(p.severity == "error" for p in by_code.get(c, ())) for c in codes)
        suite = ElementTree.SubElement(root, "testsuite", name=_path(r.file), tests=str(len(codes)), failures=str(failures))
        for code in codes:
            case = ElementTree.SubElement(suite, "testcase", classname=_path(r.file), name=code)
            errors = [p for p in by_code.get(code, ()) if p.severity == "error"]
            if errors:
                failure = ElementTree.SubElement(case, "failure", message=errors[0].what, type=code)
                failure.text = "\n".join(str(_relative(p)) for p in errors)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
