"""Times environment steps a second: of the environment alone, with acting, with the update; and of peers.

    python -m benchmark.speed --script ppo --env-id HalfCheetah-v5
    python -m benchmark.speed --script ddpg --contenders bare acting eager --flags="--num-threads 2"

Each contender is a process of its own; in a round they run one after the other, so that a machine whose speed
drifts slows all of them. What comes before the end of the first iteration with an update (imports, warm-up,
compilation) is left out. Both clocks are shown: wall time, and the CPU time of the process, which other
processes disturb less. CleanRL's scripts need an older Gymnasium: --cleanrl names a checkout with
a virtual environment in .venv (torch==2.13.0 gymnasium==0.29.1 mujoco==2.3.3 numpy==1.26.4 imageio==2.38.1 tyro
tensorboard).
"""

import importlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch._dynamo  # else the first optimizer imports it, in the middle of what is timed
import tyro

from benchmark import suite

# The same hyperparameters as flags of ours and for stable-baselines3, whose defaults are the rest
SETTINGS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("ppo", "HalfCheetah-v5"): (
        "--num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --learning-rate 3e-4 "
        "--ent-coef 0 --normalize-obs --normalize-rewards",
        {"num_envs": 1, "normalize": True, "n_steps": 2048, "batch_size": 64, "n_epochs": 10},
    ),
    ("ppo", "CartPole-v1"): (
        "--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4",
        {"num_envs": 4, "n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4},
    ),
    ("a2c", "HalfCheetah-v5"): (
        "--num-envs 8 --num-steps 5 --learning-rate 7e-4 --gae-lambda 1 --normalize-obs --normalize-rewards",
        {"num_envs": 8, "normalize": True},
    ),
    ("a2c", "CartPole-v1"): (
        "--num-envs 8 --num-steps 5 --learning-rate 7e-4 --gae-lambda 1 --no-normalize-rewards",
        {"num_envs": 8},
    ),
    ("trpo", "HalfCheetah-v5"): (
        "--num-envs 1 --num-steps 2048 --num-minibatches 16 --critic-epochs 10 --critic-learning-rate 1e-3 "
        "--cg-iterations 15 --damping 0.1 --max-kl 0.01 --normalize-obs --normalize-rewards",
        {"num_envs": 1, "normalize": True},
    ),
    ("ddpg", "HalfCheetah-v5"): (
        "--hidden-size 256 --batch-size 256 --tau 0.005 --learning-starts 1000 --no-normalize-obs "
        "--no-normalize-rewards",
        {"learning_starts": 1000, "batch_size": 256, "policy_kwargs": {"net_arch": [256, 256]}},
    ),
}
CLEANRL = {  # the rest of its hyperparameters are its defaults
    ("ppo", "HalfCheetah-v5"): "ppo_continuous_action --env-id HalfCheetah-v4",
    ("ppo", "CartPole-v1"): "ppo --env-id CartPole-v1",
    ("ddpg", "HalfCheetah-v5"): (
        "ddpg_continuous_action --env-id HalfCheetah-v4 --learning-starts 1000 --policy-frequency 1"
    ),
}
STAMPING = """  # runs a script with a stamp wherever it logs its own speed
import json, os, runpy, sys, tempfile, time, torch
from torch.utils.tensorboard import SummaryWriter
torch.set_num_threads(1)
stamps, original = [], SummaryWriter.add_scalar
def add_scalar(self, tag, value, step, *more):
    if tag == "charts/SPS":
        stamps.append((step, time.perf_counter(), time.process_time()))
    original(self, tag, value, step, *more)
SummaryWriter.add_scalar = add_scalar
del sys.argv[0]
sys.path.insert(0, os.path.dirname(os.path.dirname(sys.argv[0])))
os.chdir(tempfile.mkdtemp())
runpy.run_path(sys.argv[0], run_name="__main__")
print("\\n" + json.dumps(stamps))
"""


@dataclass(frozen=True)
class Args:
    """What is timed."""

    script: str = "ppo"  # name without .py
    env_id: str = "HalfCheetah-v5"  # Gymnasium environment
    contenders: tuple[str, ...] = ("bare", "acting", "eager", "compiled", "sb3", "cleanrl")  # those there are
    flags: str = ""  # more flags of the script
    rounds: int = 3  # each contender runs once a round
    steps: int = 20_480  # environment steps that are timed in one run, at least
    cleanrl: str = ""  # folder of CleanRL, if it is to be timed
    out: str = ""  # JSON file for the figures

    def __post_init__(self) -> None:
        if self.script not in suite.SCRIPTS:
            raise ValueError(f"--script: there is no {self.script}; there are {', '.join(suite.SCRIPTS)}")
        if unknown := set(self.contenders) - {*CONTENDERS}:
            raise ValueError(f"--contenders: there is no {min(unknown)}; there are {', '.join(CONTENDERS)}")
        try:
            gym.spec(self.env_id)
        except (gym.error.Error, ImportError) as error:
            raise ValueError(f"--env-id {self.env_id}: {error}") from None
        if self.rounds < 1 or self.steps < 1:
            raise ValueError("--rounds and --steps must be at least 1")

    @property
    def module(self) -> Any:
        """The script."""
        return importlib.import_module(self.script)

    def parse(self, *more: str) -> Any:
        """The flags of ours: of the setting, else of the suite."""
        ours, _ = SETTINGS.get((self.script, self.env_id), (suite.flags(self.script, self.env_id), None))
        words = f"--env-id {self.env_id} {ours} {self.flags}".split()
        return tyro.cli(self.module.Args, args=[*words, *more])


Stamps = list[tuple[int, float, float]]


def stamp(step: int) -> tuple[int, float, float]:
    """Step, wall clock, CPU clock."""
    return step, time.perf_counter(), time.process_time()


class Enough(Exception):
    """Ends a run of which enough has been timed."""


def time_environment(args: Args) -> Stamps:
    """The bare environment with random actions: the limit of any learner."""
    with gym.make(args.env_id, disable_env_checker=True) as env:
        env.reset(seed=1)
        actions = [env.action_space.sample() for _ in range(64)]
        begin = stamp(0)
        for t in range(args.steps):
            _, _, terminated, truncated, _ = env.step(actions[t % 64])
            if terminated or truncated:
                env.reset()
        return [begin, stamp(args.steps)]


def time_acting(args: Args) -> Stamps:
    """The first policy of the script in its environments: nothing is stored, nothing learnt."""
    flags = args.parse()
    with ExitStack() as stack:
        envs = args.module.Envs(stack, flags, flags.num_envs)
        agent = args.module.Agent(envs, flags)
        envs.reset(1, 0, 0)
        draw = getattr(agent, "noise", lambda *shape: np.zeros((*shape, 1)))  # ddpg.py: noise is no part of π
        act, begin = agent.in_numpy(), stamp(0)
        while envs.steps < args.steps:
            for noise in draw(64, flags.num_envs):
                envs.step(act(envs.obs, noise))
        return [begin, stamp(envs.steps)]


def time_script(args: Args, compiled: bool = False) -> Stamps:
    """The script, wherever it logs after an update."""
    run, stamps = args.module.Run, []
    end_iteration = run.end_iteration

    def end_and_stamp(self: Any, *given: Any) -> None:
        end_iteration(self, *given)
        if not self.pending and "losses/grad_norm" in self.metrics:
            stamps.append(stamp(self.step))
            if self.step >= stamps[0][0] + args.steps:
                raise Enough

    run.end_iteration = end_and_stamp
    endless = ["--total-timesteps", str(2**31 - 1), "--checkpoint-every", "0", *["--compile"] * compiled]
    with tempfile.TemporaryDirectory() as directory, suppress(Enough):
        args.module.train(args.parse(*endless, "--run-dir", directory))
    return stamps


def time_sb3(args: Args) -> Stamps:
    """stable-baselines3, at the start of each rollout that comes after an update."""
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmark import peers

    stamps, (_, setting) = [], SETTINGS[args.script, args.env_id]

    class Watch(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps > setting.get("learning_starts", 0):
                stamps.append(stamp(self.num_timesteps))

        def _on_step(self) -> bool:
            return not stamps or stamps[-1][0] < stamps[0][0] + args.steps

    peers.make(args.script, args.env_id, 1, device=args.parse().device, **setting).learn(2**31, callback=Watch())
    return stamps


def time_cleanrl(args: Args) -> Stamps:
    """A script of CleanRL in its own virtual environment."""
    name, *words = CLEANRL[args.script, args.env_id].split()
    folder = Path(args.cleanrl).absolute()
    line = [folder / ".venv/bin/python", "-c", STAMPING, folder / f"cleanrl/{name}.py", *words, "--no-cuda"]
    line += ["--total-timesteps", str(args.steps + 4096)]
    return json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


CONTENDERS = {  # column of the table, and what is timed
    "bare": ("environment alone", time_environment),
    "acting": ("+ acting", time_acting),
    "eager": ("+ update", time_script),
    "compiled": ("+ update, compiled", partial(time_script, compiled=True)),
    "sb3": ("stable-baselines3", time_sb3),
    "cleanrl": ("CleanRL", time_cleanrl),
}


def speeds(name: str, args: Args) -> tuple[float, float]:
    """Steps a second of a contender on the wall and on the CPU clock, in this process."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        stamps = CONTENDERS[name][1](args)
    (step0, wall0, cpu0), (step1, wall1, cpu1) = stamps[0], stamps[-1]
    return (step1 - step0) / (wall1 - wall0), (step1 - step0) / (cpu1 - cpu0)


def main(args: Args) -> None:
    """Interleaves the contenders, prints the medians, and, if asked, writes all figures with the versions."""
    setting = SETTINGS.get((args.script, args.env_id))
    there = {"compiled": hasattr(args.module.Args, "compile"), "sb3": setting}
    there["cleanrl"] = args.cleanrl and (args.script, args.env_id) in CLEANRL
    rows: dict[str, list[tuple[float, float]]] = {x: [] for x in args.contenders if there.get(x, True)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for _ in range(args.rounds):
            for name in rows:
                rows[name].append(pool.submit(speeds, name, args).result())
    print(f"| {args.script}.py, {args.env_id} | {' | '.join(CONTENDERS[name][0] for name in rows)} |")
    print("| --- " * (len(rows) + 1) + "|")
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    for k, clock in enumerate(("wall", "cpu")):
        cells = []
        for name in rows:
            figures[name][clock] = [round(row[k]) for row in rows[name]]
            cells.append(f"{statistics.median(figures[name][clock]):,.0f}")
            if "sb3" in rows and name != "sb3":
                ratio = statistics.median(x[k] / y[k] for x, y in zip(rows[name], rows["sb3"], strict=True))
                figures[name].setdefault("over_sb3", []).append(round(ratio, 2))
                cells[-1] += f" ({ratio:.2f} ×)"
        print(f"| steps a second ({clock} clock) | {' | '.join(cells)} |")
    if args.out:
        packages = ("torch", "gymnasium", "numpy", "mujoco", "stable-baselines3")
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        head = {"args": asdict(args) | {"cleanrl": "", "out": ""}, "setting": setting, "versions": versions}
        Path(args.out).write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
