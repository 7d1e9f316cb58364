"""Time to a proved optimum on ten problems, to a Pareto front, to a second proof, and to a count; reported and never asserted.
Run with

python -m pytest tests/benchmarks --benchmark-enable --benchmark-only --slow

Without `--slow` four of the ten and the count, no front and no second proof. On a machine that others share,
`--benchmark-timer=time.process_time` reports the CPU time of what runs in the benchmark's own process.
"""

from __future__ import annotations

import pytest

from planner import planfile
from planner.engines.problems import job_problems
from planner.planning.make import make_plan
from planner.planning.pareto import pareto
from planner.planning.request import Request, prepare
from planner.planning.spaceview import space_view
from planner.search.solve import search
from planner.search.space import declared_space
from planner.specs import files
from planner.specs.job import Job
from planner.verify.case import case_of
from planner.verify.checks import verify

PROBLEMS = {
    "gpt3-175b, 1,024 A100": ("gpt3-175b", "a100-80gb-sxm", 1024, 2048, 1536),
    "llama3-405b, 16,384 H100, 8k": ("llama3-405b", "h100-sxm", 16384, 8192, 2048),
    "llama3-405b, 16,384 H100, 128k": ("llama3-405b", "h100-sxm", 16384, 131072, 128),
    "megatron-1t, 3,072 A100": ("megatron-1t", "a100-80gb-sxm", 3072, 2048, 3072),
    "deepseek-v3, 2,048 H800": ("deepseek-v3", "h800-sxm", 2048, 4096, 15360),
    "qwen3-235b-a22b, 256 H100": ("qwen3-235b-a22b", "h100-sxm", 256, 4096, 1024),
    "mixtral-8x7b, 64 H100": ("mixtral-8x7b", "h100-sxm", 64, 4096, 512),
    "gemma3-27b, 256 H100, 32k": ("gemma3-27b", "h100-sxm", 256, 32768, 256),
    "vit-llm-72b, 512 H100": ("vit-llm-72b", "h100-sxm", 512, 8192, 1024),
    "llama3-8b, 8 H100": ("llama3-8b", "h100-sxm", 8, 8192, 128),
}
"""Model, profile, devices, sequence (tokens), global batch (sequences); engine megatron. Batches are those of the published
runs where there are some: 3.2 M tokens (GPT-3), 16 M (Llama 3 405B at both lengths), 6.3 M (1T), 63 M (DeepSeek-V3)."""


def request(name: str) -> Request:
    model, hardware, gpus, seq_len, batch = PROBLEMS[name]
    job = Job(seq_len=seq_len, global_batch=batch, precision="bf16")
    return Request(model, hardware, job, gpus=gpus, engine="megatron")


QUICK = ("gpt3-175b, 1,024 A100", "llama3-405b, 16,384 H100, 8k", "mixtral-8x7b, 64 H100", "llama3-8b, 8 H100")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS])
def test_proved_optimum(benchmark, name):
    setting = prepare(request(name))
    assert job_problems(setting.task, setting.engine) == []
    space = declared_space(setting.task, setting.engine, {}, [])
    outcome = benchmark.pedantic(lambda: search(setting.task, setting.engine, space, k=1), rounds=3, warmup_rounds=1)
    assert (outcome.status, outcome.counts.open) == ("optimal", 0)
    benchmark.extra_info["rows"] = outcome.counts.enumerated
    benchmark.extra_info["solved exactly"] = outcome.counts.exact
    benchmark.extra_info["step time, s"] = outcome.candidates[0].step_ns / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt3-175b, 1,024 A100"])
def test_pareto_front_of_16_points(benchmark, name):
    front = benchmark.pedantic(lambda: pareto(request(name), "memory", 16), rounds=3)
    assert len(front.points) > 4
    assert all(p.plan.certificate.status == "optimal" for p in front.points)
    benchmark.extra_info["points"] = len(front.points)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek-v3, 2,048 H800"])
def test_verification(benchmark, name, tmp_path):
    """What `planner explain --verify` does with a plan file, but for starting Python."""
    path = tmp_path / "plan.json"
    planfile.write(make_plan(request(name)), path)

    def verified():
        plan, stated = planfile.unchecked(files.parse_document(path))
        return verify(case_of(plan, stated, str(path)))

    report = benchmark.pedantic(verified, rounds=3)
    assert report.passed, report.reason
    benchmark.extra_info["checks"] = len(report.checks)


CALCULON_SPACE = 6_985_920
"""Configurations that Calculon tries for GPT-3 175B on 1,024 GPUs and a global batch of 1,024, all with even splits (Isaev et
al. 2023, SC23; counted by its own `llm-optimal-execution`)."""


@pytest.mark.parametrize("name", ["gpt3-175b, 1,024 A100"])
def test_count_of_a_space(benchmark, name):
    """Every row asked all rules, and all splits and recompute mixes of those that obey counted."""
    asked = request(name)
    view = benchmark.pedantic(lambda: space_view(asked), rounds=3, warmup_rounds=1)
    assert view.kept < view.enumerated < CALCULON_SPACE < view.layouts
    benchmark.extra_info["rows"] = view.enumerated
    benchmark.extra_info["rows that obey the rules"] = view.kept
    benchmark.extra_info["layouts that they stand for"] = f"{view.layouts:.2e}"
    benchmark.extra_info["Calculon's configurations"] = CALCULON_SPACE
