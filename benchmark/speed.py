"""Environment steps a second, end to end, ours beside its peers at identical hyperparameters, and the bare environment.

    python -m benchmark.speed --script ppo --env-id HalfCheetah-v5
    python -m benchmark.speed --script ppo --env-id CartPole-v1 --growth
    python -m benchmark.speed --script ppo --env-id CartPole-v1 --race 475 --steps 100000
    python -m benchmark.speed --script a2c --env-id HalfCheetah-v5 --processes --steps 100000
    python -m benchmark.speed --script ddpg --contenders eager two_threads compiled --steps 4000

Each contender is a process of its own with one thread (two_threads: PyTorch has two); in a round they run one after the
other, so that a machine whose speed drifts slows all of them. What comes before the end
of the first iteration with an update (imports, warm-up, compilation) is left out. Both clocks are reported: wall time,
and CPU time of the process, which other processes disturb less. CleanRL's scripts need an older Gymnasium, hence an
interpreter of their own: a folder with a checkout of CleanRL in `cleanrl` and a virtual environment in `.venv`
(torch==2.13.0 gymnasium==0.29.1 mujoco==2.3.3 numpy==1.26.4 imageio==2.38.1 tyro tensorboard), which --cleanrl names.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from benchmark import peers, suite

ROOT = Path(__file__).resolve().parent.parent

# The same hyperparameters under the names of ours, of stable-baselines3 and of CleanRL
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "HalfCheetah-v5"): {
        "ours": {
            "num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4,
            "ent_coef": 0.0, "normalize_obs": True, "normalize_rewards": True,
        },
        "sb3": {
            "num_envs": 1, "normalize": True, "n_steps": 2048, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4,
            "gamma": 0.99, "gae_lambda": 0.95,
        },
        "cleanrl": "ppo_continuous_action.py --env-id HalfCheetah-v4",  # its defaults are the rest
    },
    ("ppo", "CartPole-v1"): {
        "ours": {
            "num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4,
        },
        "sb3": {
            "num_envs": 4, "n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4,
            "ent_coef": 0.01, "gamma": 0.99, "gae_lambda": 0.95,
        },
        "cleanrl": "ppo.py --env-id CartPole-v1",
    },
    ("a2c", "HalfCheetah-v5"): {
        "ours": {
            "num_envs": 8, "num_steps": 5, "learning_rate": 7e-4, "gae_lambda": 1.0, "normalize_obs": True,
            "normalize_rewards": True,
        },
        "sb3": {"num_envs": 8, "normalize": True},  # its defaults are the rest: 5 steps, RMSprop, 7e-4, λ = 1
    },
    ("a2c", "CartPole-v1"): {
        "ours": {
            "num_envs": 8, "num_steps": 5, "learning_rate": 7e-4, "gae_lambda": 1.0, "normalize_rewards": False,
        },
        "sb3": {"num_envs": 8},
    },
    ("trpo", "HalfCheetah-v5"): {
        "ours": {
            "num_envs": 1, "num_steps": 2048, "num_minibatches": 16, "critic_epochs": 10, "critic_learning_rate": 1e-3,
            "cg_iterations": 15, "damping": 0.1, "max_kl": 0.01, "normalize_obs": True, "normalize_rewards": True,
        },
        "sb3": {"num_envs": 1, "normalize": True},  # its defaults are the same
    },
    ("ddpg", "HalfCheetah-v5"): {
        "ours": {
            "hidden_size": 256, "batch_size": 256, "tau": 0.005, "learning_starts": 1000, "normalize_obs": False,
            "normalize_rewards": False,
        },
        "sb3": {
            "num_envs": 1, "learning_starts": 1000, "tau": 0.005, "batch_size": 256, "learning_rate": 1e-3,
            "policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1,
        },
    },
}  # fmt: skip

# Runs a script of CleanRL, with a stamp wherever it logs its own speed
CLEANRL = """
import json, os, runpy, sys, tempfile, time, torch
sys.argv = sys.argv[1:]
from torch.utils.tensorboard import SummaryWriter
torch.set_num_threads(1)
stamps, original = [], SummaryWriter.add_scalar
def add_scalar(self, tag, value, step=None, *more, **named):
    if tag == "charts/SPS":
        stamps.append((step, time.perf_counter(), time.process_time()))
    original(self, tag, value, step, *more, **named)
SummaryWriter.add_scalar = add_scalar
os.chdir(tempfile.mkdtemp())
runpy.run_path(sys.argv[0], run_name="__main__")
print()
print(json.dumps(stamps))
"""


@dataclass(frozen=True)
class Args:
    """What is timed."""

    script: str = "ppo"  # name without .py
    env_id: str = "HalfCheetah-v5"  # Gymnasium environment
    rounds: int = 3  # each contender runs once a round
    steps: int = 20_480  # environment steps that are timed in one run
    contenders: tuple[str, ...] = ("eager", "compiled", "sb3", "bare", "vector")  # also cleanrl, two_threads
    cleanrl: str = ""  # folder with CleanRL and its virtual environment
    out: str = ""  # JSON file for the figures; with --growth a PNG of the same name is drawn beside it
    processes: bool = False  # instead: one process, two under torchrun, and two workers of --asynchronous
    growth: bool = False  # instead: ours over 1 to 64 environments, widths 64 to 512, and memory over 10M steps
    race: float = 0.0  # instead: seconds to an evaluated return of this, ours as in the suite, sb3 as in its zoo
    first_seed: int = 1  # of --race, one seed a round
    worker: str = ""  # internal: run this contender and print what it measured
    flags: str = "{}"  # internal: flags of ours that replace those of the setting, as JSON

    @property
    def setting(self) -> dict[str, Any]:
        """The hyperparameters, or none: the defaults of ours."""
        return SETTINGS.get((self.script, self.env_id), {"ours": {}})


def stamp(step: int) -> tuple[int, float, float]:
    """Step, wall clock, CPU clock."""
    return step, time.perf_counter(), time.process_time()


def timed(function: Callable, clock: dict[str, float], name: str) -> Callable:
    """The function, with the seconds that it takes added to clock[name]."""

    def call(*args: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **named)
        clock[name] += time.perf_counter() - start
        return result

    return call


def run_ours(args: Args, compiled: bool, split: bool = False) -> tuple[list, dict[str, float]]:
    """Stamps and memory in MiB after each iteration from the first update on; with `split`, where the seconds went."""
    import psutil

    script = importlib.import_module(args.script)
    flags = args.setting["ours"] | json.loads(args.flags)
    stamps, end_iteration, clock = [], script.Run.end_iteration, defaultdict(float)

    def end_and_stamp(self: Any, *more: Any) -> None:
        end_iteration(self, *more)
        if not self.pending and "losses/grad_norm" in self.metrics:  # a point of the curves was just logged
            stamps.append((*stamp(self.step), psutil.Process().memory_info().rss / 2**20))
        if len(stamps) < 2:
            clock.clear()

    script.Run.end_iteration = end_and_stamp
    if split:
        init, in_numpy = script.Envs.__init__, script.Agent.in_numpy

        def timed_init(self: Any, *more: Any, **named: Any) -> None:
            init(self, *more, **named)
            for env in self.envs:
                env.step, env.reset = (timed(function, clock, "environment") for function in (env.step, env.reset))

        script.Envs.__init__ = timed_init
        script.Envs.step = timed(script.Envs.step, clock, "environment and bookkeeping")
        script.Agent.in_numpy = lambda agent, **named: timed(in_numpy(agent, **named), clock, "acting")
    with tempfile.TemporaryDirectory() as directory:
        known = vars(script.Args(**flags))
        defaults = {"checkpoint_every": 0, "eval_episodes": 0, "run_dir": directory}
        defaults |= {"compile": True} if compiled else {}
        first = known["num_envs"] * known.get("num_steps", 1)
        first = known.get("learning_starts", 0) + known.get("log_interval", first)
        script.train(script.Args(env_id=args.env_id, total_timesteps=args.steps + first, **defaults, **flags))
    return stamps, dict(clock)


def run_sb3(args: Args) -> list:
    """Stamps at the start of each rollout of stable-baselines3 that comes after an update."""
    from stable_baselines3.common.callbacks import BaseCallback

    stamps = []

    class Stamps(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps > setting.get("learning_starts", 0):
                stamps.append(stamp(self.num_timesteps))

        def _on_step(self) -> bool:
            return True

    setting = args.setting["sb3"]
    model = peers.make(args.script, args.env_id, seed=1, **setting)
    first = setting.get("learning_starts", 0) + 2 * setting["num_envs"] * setting.get("n_steps", 1)
    model.learn(args.steps + first, callback=Stamps())
    return stamps[1:]


def run_bare(args: Args, vector: bool) -> list:
    """Stamps around bare environment steps with random actions: the limit of any learner."""
    import gymnasium as gym

    num_envs = args.setting["ours"].get("num_envs", 1)
    if vector:
        envs = gym.make_vec(args.env_id, num_envs, vectorization_mode="sync")
        envs.reset(seed=0)
        actions = [envs.action_space.sample() for _ in range(64)]
        begin = stamp(0)
        for t in range(args.steps // num_envs):
            envs.step(actions[t % 64])
        return [begin, stamp(args.steps // num_envs * num_envs)]
    env = gym.make(args.env_id, disable_env_checker=True)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(64)]
    begin = stamp(0)
    for t in range(args.steps):
        _, _, terminated, truncated, _ = env.step(actions[t % 64])
        if terminated or truncated:
            env.reset()
    return [begin, stamp(args.steps)]


def race_ours(args: Args, seed: int) -> dict[str, float]:
    """Steps and seconds until our script, with the flags of the suite, is evaluated at the goal or better."""
    script = importlib.import_module(args.script)
    clock, evaluate = peers.RaceClock(args.race), script.Run.evaluate

    def timed_evaluate(self: Any) -> None:
        clock.step = self.step
        with clock.paused():
            evaluate(self)
        clock.check(self.metrics["eval/episodic_return"])

    script.Run.evaluate = timed_evaluate
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(peers.GoalReached):
        line = f"--env-id {args.env_id} --total-timesteps {args.steps} --run-dir {directory} --seed {seed} "
        line += f"--eval-every {args.steps // 100} --eval-episodes 10 {suite.FLAGS.get((args.script, args.env_id), '')}"
        script.train(tyro.cli(script.Args, args=line.split()))
    return clock.result


def work(args: Args) -> None:
    """Runs one contender in this process; its last line of output is what it measured."""
    import torch
    import torch._dynamo  # else the first optimizer imports it, in the middle of what is timed

    torch.set_num_threads(1)
    seed = json.loads(args.flags).get("seed", 1)
    result = {
        "eager": lambda: run_ours(args, compiled=False)[0],
        "compiled": lambda: run_ours(args, compiled=True)[0],
        "two_threads": lambda: run_ours(dataclasses.replace(args, flags='{"num_threads": 2}'), compiled=False)[0],
        "split": lambda: run_ours(args, compiled=False, split=True),
        "split_compiled": lambda: run_ours(args, compiled=True, split=True),
        "sb3": lambda: run_sb3(args),
        "bare": lambda: run_bare(args, vector=False),
        "vector": lambda: run_bare(args, vector=True),
        "race_ours": lambda: race_ours(args, seed),
        "race_sb3": lambda: peers.race(args.script, args.env_id, seed, args.steps, args.race),
    }[args.worker]()
    print("\n" + json.dumps(result))


def measure(args: Args, worker: str, **changed: Any) -> Any:
    """What one contender measures, in a process of its own."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    if worker == "cleanrl":
        python, (script, *words) = Path(args.cleanrl, ".venv/bin/python"), args.setting["cleanrl"].split()
        path = Path(args.cleanrl, "cleanrl", "cleanrl", script).absolute()
        line = [str(python.absolute()), "-c", CLEANRL, str(path), *words]
        line += ["--total-timesteps", str(args.steps + 2048), "--no-cuda"]
    else:
        line = [sys.executable, "-m", "benchmark.speed", "--script", args.script, "--env-id", args.env_id]
        line += ["--steps", str(args.steps), "--race", str(args.race)]
        line += ["--worker", worker, "--flags", json.dumps(changed)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_of(stamps: list) -> tuple[float, float]:
    """Steps a second between the first stamp and the last, on the wall and on the CPU clock."""
    (step0, wall0, cpu0, *_), (step1, wall1, cpu1, *_) = stamps[0], stamps[-1]
    return (step1 - step0) / (wall1 - wall0), (step1 - step0) / (cpu1 - cpu0)


def compare(args: Args) -> dict:
    """Interleaves the contenders, prints a table of medians with their spread, and where our seconds go."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in args.contenders}
    for _ in range(args.rounds):
        for name in args.contenders:
            speeds[name].append(speed_of(measure(args, name)))
    table: dict[str, Any] = {}
    print(f"{args.script} {args.env_id}: environment steps a second, median of {args.rounds} (lowest to highest)")
    for name, rows in speeds.items():
        wall, cpu = zip(*rows, strict=True)
        table[name] = {"wall": [round(x) for x in wall], "cpu": [round(x) for x in cpu]}
        text = f"{name:9s} {statistics.median(wall):9,.0f} wall ({min(wall):,.0f} to {max(wall):,.0f})"
        text += f" {statistics.median(cpu):9,.0f} cpu ({min(cpu):,.0f} to {max(cpu):,.0f})"
        for other in {"sb3", "cleanrl", "bare"} & set(speeds) - {name}:
            ratios = [statistics.median(a[k] / b[k] for a, b in zip(rows, speeds[other], strict=True)) for k in (0, 1)]
            table[name][f"over_{other}"] = [round(ratio, 2) for ratio in ratios]
            text += f"  {ratios[1]:.2f} x {other}"
        print(text)
    for name, worker in (("eager", "split"), ("compiled", "split_compiled")):
        if name in speeds:
            stamps, clock = measure(args, worker)
            total = stamps[-1][1] - stamps[0][1]
            shares = {"environment": clock["environment"], "acting": clock["acting"]}
            shares["bookkeeping"] = clock["environment and bookkeeping"] - clock["environment"]
            shares["update and the rest"] = total - sum(shares.values())
            table[name]["shares"] = {part: round(seconds / total, 3) for part, seconds in shares.items()}
            print(name, ", ".join(f"{part} {share:.0%}" for part, share in table[name]["shares"].items()))
    return table


def race(args: Args) -> dict:
    """Steps and seconds until the first evaluated return of at least the goal; ours and sb3 in turn, a seed a round."""
    table: dict[str, list[dict]] = {"ours": [], "sb3": []}
    for seed in range(args.first_seed, args.first_seed + args.rounds):
        for name, rows in table.items():
            rows.append(measure(args, f"race_{name}", seed=seed))
            print(f"{name} seed {seed}: {rows[-1]}", flush=True)
    means = {name: statistics.mean(row["seconds"] for row in rows) for name, rows in table.items()}
    print(f"mean seconds, imports aside: {means}, ratio {means['sb3'] / means['ours']:.1f}")
    return table


def spread(args: Args) -> dict:
    """Steps a second by the script's own wall clock, as it logs them: over processes in place of one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script, words = str(ROOT / f"{args.script}.py"), ["--env-id", args.env_id, "--eval-episodes", "0"]
    for name, value in (args.setting["ours"] | {"total_timesteps": args.steps, "device": "cpu"}).items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    half = ["--asynchronous", "--num-workers", "2", "--num-envs", str(args.setting["ours"]["num_envs"] // 2)]
    commands = {
        "one process": [script, *words],
        "torchrun, 2 processes": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *words],
        "asynchronous, 2 workers": [script, *words, *half],  # which have half of the environments each
    }
    table: dict[str, list[int]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, line in commands.items():
            with tempfile.TemporaryDirectory() as directory:
                line = [sys.executable, *line, "--run-dir", directory]
                subprocess.run(line, capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                events = EventAccumulator(directory).Reload()
                table[name].append(round(events.Scalars("charts/SPS")[-1].value))
    for name, speeds in table.items():
        print(f"{name:24s} {statistics.median(speeds):9,.0f} steps a second ({min(speeds):,} to {max(speeds):,})")
    return table


def grow(args: Args) -> dict:
    """Steps a second over environments and over width (best of the rounds, CPU clock), and memory over steps."""
    ours = args.setting["ours"]
    batch = ours["num_envs"] * ours["num_steps"]
    figures: dict[str, dict] = {"num_envs": {}, "hidden_size": {}, "memory": {}}
    for mode in ("eager", "compiled"):
        for n in (1, 2, 4, 8, 16, 32, 64):  # of the same batch
            flags = {"num_envs": n, "num_steps": max(1, batch // n)}
            runs = [speed_of(measure(args, mode, **flags))[1] for _ in range(args.rounds)]
            figures["num_envs"].setdefault(mode, {})[n] = round(max(runs))
        for width in (64, 128, 256, 512):
            runs = [speed_of(measure(args, mode, hidden_size=width))[1] for _ in range(args.rounds)]
            figures["hidden_size"].setdefault(mode, {})[width] = round(max(runs))
    light = {"num_envs": 16, "num_steps": 512, "num_minibatches": 1, "update_epochs": 1}
    stamps = measure(dataclasses.replace(args, steps=10_000_000, env_id="CartPole-v1"), "eager", **light)
    figures["memory"] = {step: round(rss, 1) for step, _, _, rss in stamps[:: len(stamps) // 200]}
    return figures


def draw(figures: dict, title: str, path: Path) -> None:
    """Three panels: speed over environments, speed over width, memory over steps."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, key, label in zip(axes, ("num_envs", "hidden_size"), ("environments", "hidden size"), strict=False):
        for mode, marker in (("eager", "o"), ("compiled", "s")):
            xs, ys = zip(*((int(x), y) for x, y in figures[key][mode].items()), strict=True)
            axis.plot(xs, ys, marker=marker, label=mode)
        axis.set(xscale="log", xlabel=label, ylabel="environment steps / CPU second", ylim=(0, None), xticks=xs)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels(xs)
        axis.legend()
    xs, ys = zip(*((int(x) / 1e6, y) for x, y in figures["memory"].items()), strict=True)
    axes[2].plot(xs, ys, color="black")
    axes[2].set(xlabel="environment steps (millions), CartPole-v1", ylabel="resident memory (MiB)", ylim=(0, None))
    plt.suptitle(title)
    plt.savefig(path, dpi=120)


def main(args: Args) -> None:
    """Measures, prints and, if asked, writes the figures with the versions."""
    if args.worker:
        return work(args)
    mode = grow if args.growth else race if args.race else spread if args.processes else compare
    figures = mode(args)
    if args.out:
        packages = ("torch", "gymnasium", "numpy", "mujoco", "stable-baselines3")
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        flags = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("cleanrl", "out")}
        pair = (args.script, args.env_id)
        own = {"ours": suite.FLAGS.get(pair, ""), "sb3": peers.ZOO.get(pair, {})}  # what each runs a race with
        head = {"args": flags, "setting": own if args.race else args.setting, "versions": versions}
        Path(args.out).write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n")
        if args.growth:
            draw(figures, f"{args.script}.py, {args.env_id}", Path(args.out).with_suffix(".png"))
    return None


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
