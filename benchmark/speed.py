"""Environment steps a second, end to end, ours beside its peers at identical hyperparameters, and the bare environment.

    python -m benchmark.speed --setting ppo-HalfCheetah-v5 --rounds 3
    python -m benchmark.speed --setting ppo-CartPole-v1 --growth

Each contender is a process of its own with one thread; in a round they run one after the other, so that a machine whose
speed drifts slows all of them. The first iteration (imports, compilation) is left out. Both clocks are reported: wall
time, and CPU time of the process, which other processes disturb less.
"""

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent

# One hyperparameter set a row: ours, and the same for stable-baselines3 (its names)
SETTINGS = {
    "ppo-HalfCheetah-v5": {
        "script": "ppo",
        "env_id": "HalfCheetah-v5",
        "ours": {
            "num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4,
            "gamma": 0.99, "gae_lambda": 0.95, "normalize_obs": True, "normalize_rewards": True,
        },
        "sb3": {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-4},
    },
    "ppo-CartPole-v1": {
        "script": "ppo",
        "env_id": "CartPole-v1",
        "ours": {
            "num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4,
            "gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.01,
        },
        "sb3": {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """What is timed."""

    setting: str = "ppo-HalfCheetah-v5"  # a key of SETTINGS
    rounds: int = 3  # each contender runs once a round
    steps: int = 20_480  # environment steps that are timed in one run
    contenders: tuple[str, ...] = ("eager", "compiled", "sb3", "bare", "vector")  # which
    out: str = ""  # JSON file for the figures; with --growth a PNG of the same name is drawn beside it
    growth: bool = False  # instead: ours over 1 to 64 environments, widths 64 to 512, and memory over 10M steps
    worker: str = ""  # internal: run this contender and print its stamps
    flags: str = "{}"  # internal: flags of ours that replace those of the setting, as JSON


def stamp(step: int) -> tuple[int, float, float]:
    """Step, wall clock, CPU clock."""
    return step, time.perf_counter(), time.process_time()


def run_ours(setting: dict, steps: int, compiled: bool) -> list:
    """Stamps, and the resident memory in MiB, at the end of each iteration of our script."""
    import importlib

    import psutil

    script = importlib.import_module(setting["script"])
    stamps, end_iteration = [], script.Run.end_iteration

    def end_and_stamp(self, *args):
        end_iteration(self, *args)
        stamps.append((*stamp(self.step), psutil.Process().memory_info().rss / 2**20))

    script.Run.end_iteration = end_and_stamp
    batch = setting["ours"]["num_envs"] * setting["ours"]["num_steps"]
    with tempfile.TemporaryDirectory() as directory:
        flags = {"total_timesteps": steps + batch, "compile": compiled, "checkpoint_every": 0, "eval_episodes": 0}
        script.train(script.Args(env_id=setting["env_id"], run_dir=directory, **flags, **setting["ours"]))
    return stamps


def run_sb3(setting: dict, steps: int) -> list:
    """Stamps at the start of each rollout of stable-baselines3, which comes after an update."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    stamps = []

    class Stamps(BaseCallback):
        def _on_rollout_start(self) -> None:
            stamps.append(stamp(self.num_timesteps))

        def _on_step(self) -> bool:
            return True

    ours = setting["ours"]
    envs = make_vec_env(setting["env_id"], ours["num_envs"])
    if ours.get("normalize_obs"):
        envs = VecNormalize(envs)
    model = PPO("MlpPolicy", envs, gamma=ours["gamma"], gae_lambda=ours["gae_lambda"], device="cpu", **setting["sb3"])
    model.learn(steps + 2 * ours["num_envs"] * ours["num_steps"], callback=Stamps())
    return stamps[1:]


def run_bare(setting: dict, steps: int, vector: bool) -> list:
    """Stamps around bare environment steps with random actions: the limit of any learner."""
    import gymnasium as gym

    num_envs = setting["ours"]["num_envs"]
    if vector:
        envs = gym.make_vec(setting["env_id"], num_envs, vectorization_mode="sync")
        envs.reset(seed=0)
        actions = [envs.action_space.sample() for _ in range(64)]
        begin = stamp(0)
        for t in range(steps // num_envs):
            envs.step(actions[t % 64])
        return [begin, stamp(steps // num_envs * num_envs)]
    env = gym.make(setting["env_id"], disable_env_checker=True)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(64)]
    begin = stamp(0)
    for t in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[t % 64])
        if terminated or truncated:
            env.reset()
    return [begin, stamp(steps)]


def work(args: Args) -> None:
    """Runs one contender in this process; its last line of output is the stamps."""
    setting = SETTINGS[args.setting]
    setting["ours"] |= json.loads(args.flags)
    run = {
        "eager": lambda: run_ours(setting, args.steps, compiled=False),
        "compiled": lambda: run_ours(setting, args.steps, compiled=True),
        "sb3": lambda: run_sb3(setting, args.steps),
        "bare": lambda: run_bare(setting, args.steps, vector=False),
        "vector": lambda: run_bare(setting, args.steps, vector=True),
    }[args.worker]
    stamps = run()
    thinned = stamps[:: max(1, len(stamps) // 200)]
    print("\n" + json.dumps([*thinned, stamps[-1]]))


def measure(args: Args, worker: str, steps: int, flags: dict | None = None) -> list:
    """The stamps of one contender, run in a process of its own."""
    line = [sys.executable, "-m", "benchmark.speed", "--setting", args.setting, "--steps", str(steps)]
    line += ["--worker", worker, "--flags", json.dumps(flags or {})]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{worker} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_of(stamps: list) -> tuple[float, float]:
    """Steps a second between the first stamp and the last, on the wall and on the CPU clock."""
    (step0, wall0, cpu0, *_), (step1, wall1, cpu1, *_) = stamps[0], stamps[-1]
    return (step1 - step0) / (wall1 - wall0), (step1 - step0) / (cpu1 - cpu0)


def grow(args: Args) -> dict:
    """Steps a second over environments and over width (best of the rounds, CPU clock), and memory over steps."""
    ours = SETTINGS[args.setting]["ours"]
    batch = ours["num_envs"] * ours["num_steps"]
    figures: dict[str, dict] = {"num_envs": {}, "hidden_size": {}, "memory": {}}
    for mode in ("eager", "compiled"):
        for n in (1, 2, 4, 8, 16, 32, 64):  # of the same batch
            flags = {"num_envs": n, "num_steps": max(1, batch // n)}
            runs = [speed_of(measure(args, mode, args.steps, flags))[1] for _ in range(args.rounds)]
            figures["num_envs"].setdefault(mode, {})[n] = round(max(runs))
        for width in (64, 128, 256, 512):
            runs = [speed_of(measure(args, mode, args.steps, {"hidden_size": width}))[1] for _ in range(args.rounds)]
            figures["hidden_size"].setdefault(mode, {})[width] = round(max(runs))
    light = {"num_envs": 16, "num_steps": 512, "num_minibatches": 1, "update_epochs": 1}
    stamps = measure(args, "eager", 10_000_000, light)
    figures["memory"] = {step: round(rss, 1) for step, _, _, rss in stamps}
    return figures


def draw(figures: dict, setting: str, path: Path) -> None:
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
    axes[2].set(xlabel="environment steps (millions)", ylabel="resident memory (MiB)", ylim=(0, None))
    plt.suptitle(setting)
    plt.savefig(path, dpi=120)


def save(args: Args, figures: dict) -> None:
    """Prints the figures of --growth, and writes those of either kind with the versions."""
    if args.growth:
        print(json.dumps({key: figures[key] for key in ("num_envs", "hidden_size")}, indent=1))
    if args.out:
        packages = ("torch", "gymnasium", "numpy", "mujoco", "stable-baselines3")
        versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
        head = {"args": dataclasses.asdict(args), "setting": SETTINGS[args.setting], "versions": versions}
        Path(args.out).write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n")
        if args.growth:
            draw(figures, args.setting, Path(args.out).with_suffix(".png"))


def main(args: Args) -> None:
    """Interleaves the contenders, prints a table of medians with their spread, and writes it."""
    if args.worker:
        return work(args)
    if args.growth:
        return save(args, grow(args))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in args.contenders}
    for _ in range(args.rounds):
        for name in args.contenders:
            speeds[name].append(speed_of(measure(args, name, args.steps)))
    table = {}
    print(f"{args.setting}: environment steps a second, median of {args.rounds} rounds (lowest to highest)")
    for name, rows in speeds.items():
        wall, cpu = zip(*rows, strict=True)
        table[name] = {"wall": [round(x) for x in wall], "cpu": [round(x) for x in cpu]}
        ratio = ""
        if "sb3" in speeds:
            pairs = [[a[k] / b[k] for a, b in zip(rows, speeds["sb3"], strict=True)] for k in (0, 1)]
            table[name]["over_sb3"] = [round(statistics.median(p), 2) for p in pairs]
            ratio = "  x sb3: {} wall, {} cpu".format(*table[name]["over_sb3"])
        print(
            f"{name:9s} {statistics.median(wall):9,.0f} wall ({min(wall):,.0f} to {max(wall):,.0f})"
            f" {statistics.median(cpu):9,.0f} cpu ({min(cpu):,.0f} to {max(cpu):,.0f}){ratio}"
        )
    return save(args, table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
