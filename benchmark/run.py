"""Runs scripts on environments through their command lines, keeps a small file of each result, and reports.

    python -m benchmark.run
    python -m benchmark.run --suite mujoco --seeds 1 2 3 --peers
    python -m benchmark.run --scripts ppo trpo-dual sb3-ppo --envs CartPole-v1 --jobs 1 --dry-run
    RAY_ADDRESS=auto python -m benchmark.run --executor ray

Finished runs are skipped, killed ones go on from their checkpoint: the same command can be given again at any
time. A run that fails is reported and does not stop the others. The peers (stable-baselines3) run only where
--peers or their names ask for them: they take several times as long, and do not change with the scripts.

Ray spreads the runs over the cores of RAY_ADDRESS's cluster (with RAY_AUTH_MODE=token if that asks for one),
or of this machine. Its machines need this folder under the same path. --dry-run prints the command lines that
are left, for any other scheduler; afterwards the same command without it collects what they wrote.
"""

import fcntl
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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from benchmark import RESULTS, ROOT, report, suite

# What explains a return, where a script logs it
DIAGNOSTICS = (
    "approx_kl", "kl", "accepted_fraction", "multiplier", "entropy", "explained_variance", "grad_norm",
)  # fmt: skip
STOP = threading.Event()  # set when the sweep is to end


@dataclass(frozen=True)
class Args:
    """Which runs, and where."""

    scripts: tuple[str, ...] = suite.SCRIPTS  # names without .py, variants, and peers such as sb3-ppo
    suite: Literal["classic", "mujoco", "others"] = "classic"  # a set of environments
    envs: tuple[str, ...] = ()  # Gymnasium environments in its place
    peers: bool = False  # add stable-baselines3 with the flags of its zoo
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # one run each
    steps: int = 0  # environment steps of each run in place of the suite's, for a trial; needs --results, --runs
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
        if self.steps and (ROOT / self.results == RESULTS or self.runs == Args.runs):
            raise ValueError("--steps is for trials, which need folders of their own: --results and --runs")

    def list_jobs(self) -> list["Job"]:
        """Every (script, environment) gets its first seed before any its second."""
        scripts = dict.fromkeys((*self.scripts, *(suite.ZOO if self.peers else ())))
        envs = self.envs or suite.SUITES[self.suite]
        triples = [(script, env, seed) for seed in self.seeds for env in envs for script in scripts]
        return [Job(self, *triple) for triple in triples if suite.applies(*triple[:2])]


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
        """The run directory; what it prints goes into a log beside it."""
        return ROOT / self.args.runs / self.env / self.script / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """Its command line, run directory aside."""
        return ["python", *suite.command(self.script, self.env, self.seed, self.args.steps)]

    @property
    def line(self) -> list[str]:
        """Its whole command line; a peer cannot resume."""
        resume = [] if self.script in suite.PEERS else ["--resume"]
        return [*self.command, "--run-dir", os.path.relpath(self.directory, ROOT), *resume]

    def fraction_done(self) -> float:
        """How far it has come, by the last progress line of its log."""
        log = self.directory.with_suffix(".log")
        percent = re.findall(r"(\d+)%  step", log.read_text(errors="replace")) if log.exists() else []
        return int(percent[-1]) / 100 if percent else 0.0

    def expected_seconds(self) -> float:
        """By the committed results of its script and environment, else of its script, else of all."""
        steps, rate = self.args.steps or suite.budget(self.script, self.env), 1e-4
        for pattern in (f"{self.env}/{self.script}", f"*/{self.script}", "*/*"):
            results = [json.loads(path.read_text()) for path in RESULTS.glob(f"{pattern}/seed*.json")]
            if results:
                rate = statistics.median(x["seconds"] / max(map(int, x["evaluations"])) for x in results)
                break
        return steps * rate


def binned(points: list, end: int) -> dict[int, float]:
    """The mean of a curve in each hundredth of the steps, under the step where that ends."""
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
    packages = ["torch", "gymnasium", "numpy", *(["mujoco"] if job.env in (*suite.MUJOCO, "Pusher-v5") else [])]
    packages += ["stable-baselines3", "sb3-contrib"] if job.script in suite.PEERS else []
    return {
        "command": shlex.join(job.command),
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
    """What a run that was killed had taken: each file of events has its start in its name."""
    return sum(path.stat().st_mtime - int(path.name.split(".")[3]) for path in directory.glob("events.*"))


def run(job: Job) -> str:
    """Runs the job from where it was left, and writes its result to its target; returns what to say of it."""
    job.directory.mkdir(parents=True, exist_ok=True)
    path = job.directory.with_suffix(".log")
    with path.open("ab+") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the process inherits it: one that outlived its sweep is waited for
        if job.target.exists():
            return "there already"
        if job.script in suite.PEERS:
            shutil.rmtree(job.directory)
        begin, before, start = log.seek(0, os.SEEK_END), seconds_before(job.directory), time.time()
        # In a session of its own, it does not hear a Ctrl-C in the terminal: the sweep tells it to stop, once
        line = [sys.executable, *job.line[1:]]
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            while process.poll() is None and not STOP.wait(0.1):
                pass
        finally:  # Ray cancels by KeyboardInterrupt
            process.terminate()  # a script writes a checkpoint
            status = process.wait()
        log.seek(begin)
        lines = log.read().decode(errors="replace").splitlines()
    if status:
        tail = "".join(f"\n    {line}" for line in lines[-8:])
        raise RuntimeError(f"it exited with {status}; the last lines of {path}:{tail}")
    result = result_of(job, before + time.time() - start)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, job.target)
    return f"{result['final_return']:.1f} in {result['seconds']:.0f} s"


@contextmanager
def locally(jobs: list[Job], workers: int) -> Iterator[list[Future]]:
    """Runs so many jobs at a time; an exception stops those that are not finished."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield [pool.submit(run, job) for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            STOP.set()
            raise


@contextmanager
def on_ray(jobs: list[Job], workers: int) -> Iterator[list[Future]]:
    """The same on the cluster of RAY_ADDRESS, one core a job; without one, on this machine."""
    import ray

    local = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    where = {} if "RAY_ADDRESS" in os.environ else local
    try:
        ray.init(**where, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    except ConnectionError as error:
        print(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    remote = ray.remote(num_cpus=1, max_retries=0)(run)
    refs = [remote.remote(job) for job in jobs]
    try:
        yield [ref.future() for ref in refs]
    finally:
        for ref in refs:
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=60)
        ray.shutdown()


def sweep(jobs: list[Job], args: Args) -> list[Job]:
    """Runs the jobs, and shows how far it is and how long it will take; returns those that failed."""
    expected = {job: job.expected_seconds() for job in jobs}
    failures, total = [], sum(expected.values())
    look = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    often = {"smoothing": 0, "miniters": 0, "mininterval": 1 if sys.stderr.isatty() else 60}
    initial = sum(expected[job] * job.fraction_done() for job in jobs)
    execute = on_ray if args.executor == "ray" else locally
    with (
        execute(jobs, args.jobs) as futures,
        tqdm(total=total, initial=initial, bar_format=look, **often) as bar,
    ):
        running = dict(zip(futures, jobs, strict=True))
        while running:
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    text = future.result()
                except Exception as error:  # whatever it is, the other runs go on
                    failures.append(job)
                    text = f"FAILED: {getattr(error, 'cause', error)}"
                bar.write(f"{job}: {text}")
            left = sum(expected[job] * (1 - job.fraction_done()) for job in running.values())
            bar.set_postfix_str(f"{len(jobs) - len(running)}/{len(jobs)} runs", refresh=False)
            bar.update(max(0, total - left - bar.n))
    return failures


def stop(signum: int, _: Any) -> None:
    """Ends the sweep: it tells the runs to stop, and waits for their checkpoints."""
    print("\nstopping the runs; the same command goes on with them", file=sys.stderr)
    raise SystemExit(128 + signum)


def main(args: Args) -> None:
    """Runs what is missing and writes the report; exits with 1 if a run failed."""
    jobs = args.list_jobs()
    todo = [job for job in jobs if not job.target.exists()]
    if args.dry_run:
        print("\n".join(shlex.join(job.line) for job in todo))
        return
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished before")
    for job in set(jobs) - set(todo):
        if json.loads(job.target.read_text())["command"] != shlex.join(job.command):
            print(f"{job}: its result is of another command; to make it again, delete {job.target} and {job.directory}")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    failures = sweep(todo, args)
    report.main(report.Args(results=args.results, runs=args.runs))
    if failures:
        print(f"{len(failures)} of {len(todo)} runs failed: {', '.join(map(str, failures))}")
        raise SystemExit(1)


if __name__ == "__main__":
    from benchmark import run as module  # by this name Ray's workers can import it

    module.main(tyro.cli(module.Args, description=__doc__))
