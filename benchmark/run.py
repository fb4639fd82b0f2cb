"""Runs scripts on environments through their command lines, keeps a small file of each result, ends with a report.

    python -m benchmark.run
    python -m benchmark.run --suite mujoco --seeds 1 2 3 --peers
    python -m benchmark.run --scripts ppo trpo-dual sb3-ppo --envs CartPole-v1 --jobs 1 --dry-run
    RAY_ADDRESS=auto python -m benchmark.run --executor ray

Finished runs are skipped, killed ones go on from their checkpoint: the same command can be given again at any time. A
run that fails is reported and does not stop the others. The peers (stable-baselines3) are run only where --peers or
their names ask for them: they take several times as long as the scripts, and do not change with them.

Ray spreads the runs over the cores of RAY_ADDRESS's cluster (with RAY_AUTH_MODE=token if that asks for a token), or of
this machine. Its machines need this folder under the same path. --dry-run prints the command lines that are left, for
any other scheduler; when these have run, the same command without it collects what they wrote.
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmark import suite

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


@dataclass(frozen=True)
class Args:
    """Which runs, and where."""

    scripts: tuple[str, ...] = suite.SCRIPTS  # names without .py, variants, and peers such as sb3-ppo
    suite: Literal["classic", "mujoco"] = "classic"  # a set of environments
    envs: tuple[str, ...] = ()  # Gymnasium environments in its place
    peers: bool = False  # add all peers
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run each
    steps: int = 0  # environment steps of each run in place of the suite's, for a trial; needs --results
    jobs: int = os.cpu_count() or 1  # processes side by side, one thread each
    executor: Literal["local", "ray"] = "local"  # where they run
    runs: str = "runs/benchmark"  # run directories and logs: <env>/<script>/seed<seed>
    results: str = "benchmark/results"  # results, one file a run, and the report
    dry_run: bool = False  # only print the command lines of what is not finished

    def __post_init__(self) -> None:
        known = (*suite.SCRIPTS, *suite.VARIANTS, *suite.PEERS)
        for script in self.scripts:
            if script not in known:
                raise ValueError(f"--scripts: there is no {script}; there are {', '.join(known)}")
        if self.jobs < 1 or self.steps < 0:
            raise ValueError("--jobs must be at least 1, --steps not negative")
        if self.steps and (ROOT / self.results) == RESULTS:
            raise ValueError("--steps is for trials, whose results need a folder of their own: --results")

    def list_jobs(self) -> list["Job"]:
        """Every (script, environment) gets its first seed before any its second."""
        scripts = dict.fromkeys((*self.scripts, *(suite.PEERS if self.peers else ())))
        envs = self.envs or suite.SUITES[self.suite]
        jobs = [Job(self, script, env, seed) for seed in self.seeds for env in envs for script in scripts]
        return [job for job in jobs if suite.applies(job.script, job.env)]


class Job(NamedTuple):
    """One run."""

    args: Args
    script: str
    env: str
    seed: int

    def __str__(self) -> str:
        return f"{self.script} {self.env} seed {self.seed}"

    @property
    def target(self) -> Path:
        """The file of its results."""
        return ROOT / self.args.results / self.env / self.script / f"seed{self.seed}.json"

    @property
    def directory(self) -> Path:
        """The run directory; its log lies beside it."""
        return ROOT / self.args.runs / self.env / self.script / f"seed{self.seed}"

    @property
    def steps(self) -> int:
        """Environment steps."""
        return self.args.steps or suite.budget(self.script, self.env)

    @property
    def command(self) -> list[str]:
        """Its command line, run directory aside."""
        return suite.command(self.script, self.env, self.seed, self.args.steps)

    @property
    def line(self) -> list[str]:
        """Its whole command line; a peer cannot resume."""
        resume = [] if self.script in suite.PEERS else ["--resume"]
        return [*self.command, "--run-dir", os.path.relpath(self.directory, ROOT), *resume]


class Outcome(NamedTuple):
    """What became of a run."""

    job: Job
    failed: bool
    text: str


# What explains a return, where a script logs it
DIAGNOSTICS = ("approx_kl", "kl", "accepted_fraction", "multiplier", "entropy", "explained_variance", "grad_norm")


def binned(points: list, end: int) -> dict[int, float]:
    """The mean of a curve in each hundredth of the steps, under the step where that ends; empty ones are left out."""
    bins: dict[int, list[float]] = {}
    for point in points:
        bins.setdefault(min(99, int(100 * point.step / end)), []).append(point.value)
    return {round((k + 1) * end / 100): float(f"{sum(v) / len(v):.4g}") for k, v in sorted(bins.items())}


def result_of(job: Job, seconds: float) -> dict[str, Any]:
    """The final evaluation, the evaluations on the way, the curves in 100 bins, versions and seconds."""
    events = EventAccumulator(str(job.directory), size_guidance={"scalars": 0}).Reload()
    evaluations = {event.step: round(event.value, 3) for event in events.Scalars("eval/episodic_return")}
    end, there = max(evaluations), events.Tags()["scalars"]
    tags = [f"losses/{name}" for name in DIAGNOSTICS if f"losses/{name}" in there]
    returns = "charts/episodic_return"  # missing if no episode ended in so short a run
    packages = ["torch", "gymnasium", "numpy", *(["mujoco"] if job.env in suite.MUJOCO else [])]
    packages += ["stable-baselines3", "sb3-contrib"] if job.script in suite.PEERS else []
    return {
        "command": shlex.join(["python", *job.command]),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
        "steps_per_second": round(events.Scalars("charts/SPS")[-1].value),
        "final_return": evaluations[end],
        "max_return": max(evaluations.values()),
        "evaluations": evaluations,
        "training_returns": binned(events.Scalars(returns) if returns in there else [], end),
        "diagnostics": {tag: binned(events.Scalars(tag), end) for tag in tags},
    }


def seconds_before(directory: Path) -> float:
    """What a run that was killed had taken: from the first event to the last of each part of it."""
    parts = [[event.wall_time for event in EventFileLoader(str(path)).Load()] for path in directory.glob("events.*")]
    return sum(times[-1] - times[0] for times in parts if times)


# The processes of this sweep; none is started once it is to stop
RUNNING: set[subprocess.Popen] = set()
LOCK, STOP = threading.Lock(), threading.Event()


def run(job: Job) -> Outcome:
    """One run, from where it was left; its result goes to its target."""
    job.directory.mkdir(parents=True, exist_ok=True)
    with job.directory.with_suffix(".log").open("ab+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the process inherits it: one that outlived its sweep is waited for
        if job.target.exists():
            return Outcome(job, False, "there already")
        if job.script in suite.PEERS:
            shutil.rmtree(job.directory)
        begin, before, start = log.seek(0, os.SEEK_END), seconds_before(job.directory), time.time()
        with LOCK:
            if STOP.is_set():
                return Outcome(job, True, "not started")
            # In a session of its own, a Ctrl-C in the terminal does not reach it: the sweep tells it to stop, once
            process = subprocess.Popen(
                [sys.executable, *job.line], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
            RUNNING.add(process)
        try:
            status = process.wait()
        except BaseException:  # Ray cancels by KeyboardInterrupt
            process.terminate()
            process.wait()
            raise
        finally:
            RUNNING.discard(process)
        log.seek(begin)
        lines = log.read().decode(errors="replace").splitlines()
    try:
        if status:
            how = f"was ended by signal {-status}" if status < 0 else f"exited with {status}"
            raise RuntimeError(f"it {how}")
        result = result_of(job, before + time.time() - start)
    except Exception as error:  # whatever it is, the other runs go on
        tail = "".join(f"\n    {line}" for line in lines[-8:])
        return Outcome(job, True, f"FAILED: {error}; the last lines of {job.directory.with_suffix('.log')}:{tail}")
    job.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, job.target)
    return Outcome(job, False, f"{result['final_return']:.1f} in {result['seconds']:.0f} s")


def run_locally(jobs: list[Job], workers: int) -> Iterator[list[Outcome]]:
    """Runs so many at a time; yields what has finished, at least once a second. Closed early, it stops the runs."""
    with ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(run, job) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                yield [future.result() for future in done]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if pending:
                with LOCK:
                    STOP.set()
                    for process in RUNNING:
                        process.terminate()  # a script writes a checkpoint


def run_on_ray(jobs: list[Job], workers: int) -> Iterator[list[Outcome]]:
    """The same on the cluster of RAY_ADDRESS, one core a run; without one, on `workers` cores of this machine."""
    import ray

    where = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    except ConnectionError as error:
        print(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    remote = ray.remote(num_cpus=1, max_retries=0)(run)
    pending = {remote.remote(job): job for job in jobs}
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=1)
            outcomes = []
            for ref in done:
                job = pending.pop(ref)
                try:
                    outcomes.append(ray.get(ref))
                except ray.exceptions.RayError as error:  # its machine is gone, say
                    outcomes.append(Outcome(job, True, f"FAILED: {str(error).splitlines()[0]}"))
            yield outcomes
    finally:
        for ref in pending:
            ray.cancel(ref)
        ray.wait(list(pending), num_returns=len(pending), timeout=60) if pending else None
        ray.shutdown()


def expected_seconds(jobs: list[Job]) -> dict[Job, float]:
    """How long each may take, by the committed results: of its script and environment, else of its script, else all."""
    rates: dict[tuple[str, ...], list[float]] = {}
    for path in RESULTS.glob("*/*/seed*.json"):
        result, (env, script) = json.loads(path.read_text()), path.parts[-3:-1]
        for key in ((script, env), (script,), ()):
            rates.setdefault(key, []).append(result["seconds"] / max(map(int, result["evaluations"])))
    rates.setdefault((), [1e-4])
    keys = {job: next(key for key in ((job.script, job.env), (job.script,), ()) if key in rates) for job in jobs}
    return {job: job.steps * statistics.median(rates[key]) for job, key in keys.items()}


def fraction_done(job: Job) -> float:
    """How far a run has come, by the last progress line of its log."""
    path = job.directory.with_suffix(".log")
    percent = re.findall(r"(\d+)%  step", path.read_text(errors="replace")) if path.exists() else []
    return int(percent[-1]) / 100 if percent else 0.0


def stop(signum: int, _: Any) -> NoReturn:
    """Ends the sweep: what is running is told to stop, and its checkpoint waited for."""
    print("\nstopping the runs; the same command goes on with them", file=sys.stderr)
    raise SystemExit(128 + signum)


def main(args: Args) -> None:
    """Runs what is missing, shows how far it is, and writes the report; exits with 1 if a run failed."""
    from benchmark import report

    jobs = args.list_jobs()
    todo = [job for job in jobs if not job.target.exists()]
    if args.dry_run:
        print("\n".join(shlex.join(["python", *job.line]) for job in todo))
        return
    for package in ("tqdm", "matplotlib", "rliable", *(["ray"] if args.executor == "ray" else [])):
        if not importlib.util.find_spec(package):
            print(f"{package} is missing: pip install -r benchmark/requirements.txt", file=sys.stderr)
            raise SystemExit(2)
    from tqdm import tqdm

    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before")
    for job in set(jobs) - set(todo):
        if json.loads(job.target.read_text())["command"] != shlex.join(["python", *job.command]):
            print(f"{job}: its result is of another command; to make it again, delete {job.target}")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    failures, left, weights = [], set(todo), expected_seconds(todo)
    total, execute = sum(weights.values()), run_on_ray if args.executor == "ray" else run_locally
    look = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    often = {"smoothing": 0, "miniters": 0, "mininterval": 1 if sys.stderr.isatty() else 60}
    initial = sum(weights[job] * fraction_done(job) for job in todo)
    with (
        closing(execute(todo, args.jobs)) as outcomes,
        tqdm(total=total, initial=initial, bar_format=look, **often) as bar,
    ):
        for done in outcomes:
            for outcome in done:
                bar.write(f"{outcome.job}: {outcome.text}")
                left.discard(outcome.job)
                failures += [outcome] if outcome.failed else []
            bar.set_postfix_str(f"{len(todo) - len(left)}/{len(todo)} runs", refresh=False)
            gone = total - sum(weights[job] * (1 - fraction_done(job)) for job in left) - bar.n
            bar.update(gone if gone > 1e-6 else 0)
    report.main(report.Args(results=args.results, runs=args.runs))
    if failures:
        print(f"{len(failures)} of {len(todo)} runs failed: {', '.join(str(outcome.job) for outcome in failures)}")
        raise SystemExit(1)


if __name__ == "__main__":
    from benchmark import run as module  # by this name Ray's workers can import it

    module.main(tyro.cli(module.Args, description=__doc__))
