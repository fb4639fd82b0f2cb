"""Runs scripts on environments through their command lines, and keeps one small file of results a run.

    python -m benchmark.run --scripts ppo --envs CartPole-v1 --seeds 1 2 3 4 5 --jobs 2

Finished runs are skipped, killed ones go on from their checkpoint: the same command can be given again at any time.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmark import suite

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS = ROOT / "runs" / "benchmark", ROOT / "benchmark" / "results"


@dataclass(frozen=True)
class Args:
    """Which runs."""

    scripts: tuple[str, ...] = suite.SCRIPTS  # names without .py
    envs: tuple[str, ...] = suite.CLASSIC  # Gymnasium environments
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run each
    jobs: int = 2  # processes side by side, one thread each
    dry_run: bool = False  # print the commands only


# What explains a return, where a script logs it
DIAGNOSTICS = ("approx_kl", "kl", "accepted_fraction", "multiplier", "entropy", "explained_variance", "grad_norm")


def binned(points: list, end: int) -> dict[int, float]:
    """The mean of a curve in each hundredth of the steps, under the step where that ends; empty ones are left out."""
    bins: dict[int, list[float]] = {}
    for point in points:
        bins.setdefault(min(99, int(100 * point.step / end)), []).append(point.value)
    return {round((k + 1) * end / 100): float(f"{sum(v) / len(v):.4g}") for k, v in sorted(bins.items())}


def result_of(directory: Path, command: list[str], seconds: float) -> dict:
    """The final evaluation, the evaluations on the way, the curves in 100 bins, versions and seconds."""
    import torch  # only for its weights_only loader

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    saved = torch.load(directory / "checkpoint.pt", weights_only=True)
    evaluations = {event.step: round(event.value, 3) for event in events.Scalars("eval/episodic_return")}
    tags = [f"losses/{name}" for name in DIAGNOSTICS if f"losses/{name}" in events.Tags()["scalars"]]
    return {
        "command": shlex.join(["python", *command]),
        "versions": saved["versions"] | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "steps_per_second": round(events.Scalars("charts/SPS")[-1].value),
        "final_return": list(evaluations.values())[-1],
        "max_return": max(evaluations.values()),
        "evaluations": evaluations,
        "training_returns": binned(events.Scalars("charts/episodic_return"), saved["step"]),
        "diagnostics": {tag: binned(events.Scalars(tag), saved["step"]) for tag in tags},
    }


def run(script: str, env: str, seed: int) -> str:
    """One run, from where it was left; its result goes to benchmark/results/<env>/<script>/seed<seed>.json."""
    target = RESULTS / env / script / f"seed{seed}.json"
    if target.exists():
        return f"{script} {env} seed {seed}: there already"
    directory, command = RUNS / env / script / f"seed{seed}", suite.command(script, env, seed)
    directory.mkdir(parents=True, exist_ok=True)
    log = directory.with_suffix(".log")
    start = time.time()
    with log.open("a") as file:
        line = [sys.executable, *command, "--run-dir", str(directory), "--resume"]
        status = subprocess.run(line, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
    if status:
        return f"{script} {env} seed {seed}: FAILED with {status}, see {log.relative_to(ROOT)}"
    result = result_of(directory, command, time.time() - start)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return f"{script} {env} seed {seed}: {result['final_return']:.1f} in {result['seconds']:.0f} s"


def main(args: Args) -> None:
    """Runs what is missing, `jobs` at a time; every (script, environment) gets its first seed before any its second."""
    todo = [(script, env, seed) for seed in args.seeds for env in args.envs for script in args.scripts]
    if args.dry_run:
        print("\n".join(shlex.join(["python", *suite.command(*job)]) for job in todo))
        return
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as bar:
        for done in as_completed([pool.submit(run, *job) for job in todo]):
            bar.write(done.result())
            bar.update()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
