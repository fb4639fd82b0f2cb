"""Proves what every script promises its user: exact resuming, clear refusals, harmless evaluation, curves, one anatomy.

A promise about processes is proved with processes: forked from a server that has imported everything, they start at
once, and send the signals to themselves at an exact moment. `cli` and `train` run a script inside of pytest.
"""
import ast
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pty
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import sync
import torch
from gymnasium import spaces
from gymnasium.wrappers import OrderEnforcing
from pretend_cuda import DeviceMixError, pretend_cuda
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch._inductor.exc import TritonMissing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import FileWriter

ROOT = Path(__file__).resolve().parent.parent


class Script(NamedTuple):
    """What is special about a script."""

    tiny: dict[str, Any]  # flags that make an iteration of about a hundred steps, and each part of it happen twice
    longer: dict[str, Any]  # flags that double the steps of an iteration
    free: tuple[str, ...]  # flags whose doubling does not make the host wait for the device any more often
    lacks: set[str]  # tags of TAGS that its method has no use for
    bad: dict[str, Any]  # flags that exclude each other
    waits_per_step: int = 0  # how often the host waits for the device in one step of all environments
    noise: str = "GaussianActor.noise"  # where the noise of continuous actions comes from
    second_env: str = "CartPole-v1"  # an environment that is not the tests' own


OF_V = {"losses/value_loss", "losses/explained_variance", "losses/approx_kl", "losses/clipfrac"}  # or of a ratio
# The tests' own environments, registered below, take part: a later script needs one more line here
SCRIPTS = {
    "ppo": Script(
        {"num_steps": 64, "update_epochs": 2, "num_minibatches": 2}, {"num_steps": 128},
        ("update_epochs", "num_minibatches"), {"losses/q_loss"}, {"num_minibatches": 7}),
    "a2c": Script(
        {"num_steps": 64, "log_interval": 128}, {"num_steps": 128}, (),
        {"losses/q_loss", "losses/clipfrac", "losses/approx_kl"},
        {"asynchronous": True, "device": "cuda"}),
    "npg": Script(
        {"num_steps": 64, "critic_epochs": 2, "num_minibatches": 2}, {"num_steps": 128},
        ("critic_epochs", "num_minibatches", "cg_iterations"), {"losses/q_loss", "losses/clipfrac"},
        {"num_minibatches": 7}),
    "trpo": Script(
        {"num_steps": 64, "critic_epochs": 2, "num_minibatches": 2}, {"num_steps": 128},
        ("critic_epochs", "num_minibatches", "cg_iterations"), {"losses/q_loss", "losses/clipfrac"},
        {"backtrack_coef": 1.5}),
    "actor_critic": Script(
        {"num_steps": 64, "critic_epochs": 2}, {"num_steps": 128}, ("critic_epochs",),
        {"losses/q_loss", "losses/clipfrac", "losses/approx_kl"},  # one step a rollout: no ratio without a second pass
        {"num_envs": 2, "trace_decay": 0.5}),
    "reinforce": Script(
        {"update_epochs": 2, "critic_epochs": 2, "cloning_steps": 2}, {"env_id": "Toy40-v0"},
        ("update_epochs", "critic_epochs"), {"losses/q_loss", "losses/clipfrac"}, {"num_envs": 1, "baseline": "time"}),
    "off_policy_ac": Script(
        {"log_interval": 128, "learning_starts": 16, "batch_size": 32}, {"log_interval": 256},
        ("batch_size", "num_updates"), OF_V, {"env_id": "CartPole-v1", "actor_update": "reparameterized"},
        waits_per_step=1, noise="SquashedGaussianActor.noise"),
    "ddpg": Script(
        {"log_interval": 128, "learning_starts": 16, "batch_size": 32}, {"log_interval": 256},
        ("batch_size", "num_updates"), OF_V | {"losses/entropy"}, {"env_id": "CartPole-v1"},
        waits_per_step=1, noise="next_noise", second_env="InvertedPendulum-v5"),
}  # fmt: skip
TAGS = {
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate", "losses/policy_loss",
    "losses/value_loss", "losses/q_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
    "losses/explained_variance", "losses/grad_norm", "eval/episodic_return", "eval/episodic_length",
}  # fmt: skip
# Another value for each flag that is not a switch or a choice, of which all values are tried
OTHER = {
    "env_id": "CartPole-v1", "seed": 2, "total_timesteps": 300, "num_envs": 4, "device": "auto", "num_threads": 2,
    "run_dir": "", "checkpoint_every": 60, "eval_every": 100, "eval_episodes": 1, "num_steps": 48,
    "learning_rate": 1e-4, "gamma": 0.5, "gae_lambda": 0.3, "update_epochs": 3, "num_minibatches": 4,
    "clip_coef": 1e-4, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01, "target_kl": 1e-9, "hidden_size": 8,
    "log_std_init": -1.0, "critic_learning_rate": 1e-4, "critic_epochs": 3, "demonstrations": "demonstrations.npz",
    "cloning_steps": 3, "lookahead": 2, "trace_decay": 0.5, "num_workers": 1, "max_kl": 1e-4, "step_size": 0.3,
    "cg_iterations": 3, "damping": 1e-3, "backtrack_coef": 0.3, "max_trials": 1, "dual_step_size": 3.0,
    "log_interval": 256, "learning_starts": 50, "num_updates": 2, "batch_size": 16, "buffer_size": 60,
    "q_learning_rate": 1e-4, "tau": 0.5, "num_samples": 2, "importance_clip": 0.5, "exploration_noise": 0.5,
    "noise_correlation": 0.5,
}  # fmt: skip
# What is set as well where a flag is tried, so that it has an effect, or does not take long
NEEDS = {
    "cloning_steps": {"demonstrations": "demonstrations.npz"}, "compile": {"env_id": "Toy20-v0"},
    "num_threads": {"total_timesteps": 16}, "lookahead": {"advantage": "n_step"}, "vf_coef": {"shared_network": True},
    "trace_decay": {"num_envs": 1, "num_steps": 1}, "asynchronous": {"env_id": "CartPole-v1"},
    "num_workers": {"env_id": "CartPole-v1", "asynchronous": True}, "step_size": {"step_rule": "fixed"},
    "backtrack_coef": {"max_kl": 10.0}, "max_trials": {"max_kl": 10.0}, "dual_step_size": {"constraint": "dual"},
    "learning_rate": {"constraint": "dual"}, "update_epochs": {"constraint": "dual"},
    "importance_clip": {"actor_update": "importance"},
}  # fmt: skip
NEUTRAL = {"compile", "run_dir", "resume", "eval_every", "eval_episodes"}  # of no effect
ZERO_IS_OFF = {"seed", "checkpoint_every", "eval_every", "eval_episodes"}
every_script = pytest.mark.parametrize("name", SCRIPTS)


class Toy(gym.Env):
    """Pays for actions near a function of the observation; half of the episodes terminate, the others are cut off."""

    steps, ended, seeds, flaw, flaw_at = 0, [], [], "", 150  # of all environments together

    def __init__(self, length: int = 0) -> None:
        self.length, self.observation_space = length, spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        Toy.seeds += [] if seed is None else [seed]
        self.time, self.total, self.end = 0, 0.0, self.length or int(self.np_random.integers(10, 30))
        self.obs = np.float32(self.np_random.normal(5, 3, 3))
        return self.obs, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        flawed = Toy.flaw if Toy.steps >= Toy.flaw_at else ""
        assert flawed != "crash"
        assert self.action_space.contains(action) or flawed == "actions"
        Toy.steps, self.time = Toy.steps + 1, self.time + 1
        reward = math.inf if flawed == "rewards" else -float(np.abs(action - self.obs[:2] / 4).sum())
        self.obs = np.float32([math.nan] * 3 if flawed == "obs" else self.np_random.normal(5, 3, 3))
        self.total, done, cut = self.total + reward, self.time == self.end, self.end % 2 == 1
        if done:
            Toy.ended.append((Toy.steps, self.total, self.time))
        return self.obs, reward, done and not cut, done and cut, {}


class Odd(gym.Env):
    """Has the spaces that it is asked for, and minds that the actions are in theirs."""

    def __init__(self, obs: gym.Space, action: gym.Space) -> None:
        self.observation_space, self.action_space = obs, action

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.observation_space.sample(), 1.0, bool(self.np_random.random() < 0.1), False, {}


BOX, TWO = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
SUPPORTED = {
    "OneHot-v0": (spaces.Discrete(3, start=5), TWO), "Image-v0": (spaces.Box(0, 255, (4, 4), np.uint8), TWO),
    "Start-v0": (BOX, spaces.Discrete(3, start=-1)), "Matrix-v0": (BOX, spaces.Box(-2, 3, (2, 2))),
    "Unbounded-v0": (BOX, spaces.Box(-np.inf, np.inf, (2,))),
}  # fmt: skip
UNSUPPORTED = {
    "DictObs-v0": (spaces.Dict(a=BOX), TWO), "TupleObs-v0": (spaces.Tuple((BOX, TWO)), TWO),
    "MultiObs-v0": (spaces.MultiBinary(3), TWO), "MultiDiscrete-v0": (BOX, spaces.MultiDiscrete([2, 3])),
    "IntegerBox-v0": (BOX, spaces.Box(0, 5, (2,), np.int64)), "DictAction-v0": (BOX, spaces.Dict(a=TWO)),
}  # fmt: skip
for env_id, length in (("Toy-v0", 0), ("Toy1-v0", 1), ("Toy20-v0", 20), ("Toy40-v0", 40)):
    gym.register(env_id, Toy, kwargs={"length": length})
for env_id, pair in (SUPPORTED | UNSUPPORTED).items():
    gym.register(env_id, Odd, kwargs={"obs": pair[0], "action": pair[1]})

# -- running the scripts -----------------------------------------------------------------------------------------------


def flags_of(name: str, **flags: Any) -> dict[str, Any]:
    short = {"env_id": "Toy-v0", "num_envs": 2, "total_timesteps": 256, "eval_episodes": 0, "device": "cpu"}
    return short | SCRIPTS[name].tiny | flags


def needs_of(name: str, flag: str) -> dict[str, Any]:
    known = {field.name for field in fields(importlib.import_module(name).Args)}
    return {key: value for key, value in NEEDS.get(flag, {}).items() if key in known}


def normalizing(name: str) -> dict[str, bool]:
    return {field.name: True for field in fields(importlib.import_module(name).Args) if "normalize" in field.name}


def words(flags: dict[str, Any]) -> list[str]:
    """The flags as they are typed."""
    pairs = [(key.replace("_", "-"), value) for key, value in flags.items()]
    typed = [[f"--{'' if x else 'no-'}{key}"] if isinstance(x, bool) else [f"--{key}", str(x)] for key, x in pairs]
    return list(itertools.chain(*typed))


def train(name: str, run_dir: Path | str, **flags: Any) -> dict[str, float]:
    module = importlib.import_module(name)
    return module.train(module.Args(**flags_of(name, run_dir=str(run_dir), **flags)))


def cli(name: str, **flags: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of `python name.py flags`, run in this process."""
    out, err, argv = io.StringIO(), io.StringIO(), [f"{name}.py", *words(flags)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def refused(name: str, *parts: str, **flags: Any) -> None:
    """The command leaves with status 2 and one sentence that has all the parts."""
    status, out, err = cli(name, **flags)
    assert (status, out) == (2, "")
    if "For full helptext" in err:  # tyro's frame, around what is wrong with a flag
        err = f"{name}: {' '.join(err.split())}\n"
    assert err.startswith(f"{name}: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


MOMENTS = {
    "step": (OrderEnforcing, "step"), "log": (FileWriter, "add_summary"), "save": (torch, "save"),
    "fsync": (os, "fsync"), "replace": (os, "replace"), "replaced": (os, "replace"),
}  # fmt: skip


def strike(moment: str, count: int, signum: int) -> None:
    """Makes this process send itself a signal at the count-th moment: before it, in the middle of a save, or after."""
    owner, attribute = MOMENTS[moment]
    original, calls = getattr(owner, attribute), itertools.count(1)

    def struck(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == count
        if now and moment == "save":
            buffer, target = io.BytesIO(), args[1]
            original(args[0], buffer)
            with target if hasattr(target, "write") else open(target, "wb") as file:
                file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                file.flush()
                os.kill(os.getpid(), signum)
        if now and moment != "replaced":
            os.kill(os.getpid(), signum)
        result = original(*args, **kwargs)
        if now and moment == "replaced":
            os.kill(os.getpid(), signum)
        return result

    setattr(owner, attribute, struck)


def buffer_events() -> None:
    """An event that was not flushed is lost if this process is killed, always and not only sometimes."""
    write, flush, pending = RecordWriter.write, RecordWriter.flush, []

    def write_and_flush(self: RecordWriter) -> None:
        while pending:
            write(self, pending.pop(0))
        flush(self)

    RecordWriter.write, RecordWriter.flush = lambda _, data: pending.append(data), write_and_flush


def in_child(script: Path, argv: list[str], folder: Path, out: str, moments: tuple, second: int) -> None:
    os.chdir(folder)
    for fd, path in ((1, out), (2, "err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), fd)
    clock, sys.argv = time.time, [script.name, *argv]
    time.time = lambda: clock() + second  # an event file is named after the second, and these runs are much shorter
    buffer_events()
    for moment in moments:
        strike(*moment)
    runpy.run_path(str(script), run_name="__main__")


seconds = itertools.count()


def process(name: str, folder: Path, *moments: tuple, out: str = "out", **flags: Any) -> tuple[int, str]:
    """Exit status (minus the signal for one that was killed) and stderr of the script, run in a process in folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which an optimiser imports at its first step
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))):
        args = (ROOT / f"{name}.py", words(flags_of(name, **flags)), folder, out, moments, next(seconds))
        child = context.Process(target=in_child, args=args)
        child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    return child.exitcode, (folder / "err").read_text()


# -- looking at what they leave ----------------------------------------------------------------------------------------


def state(run_dir: Path) -> dict[str, Any]:
    """The checkpoint without the flags."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return {key: value for key, value in saved.items() if key != "args"}


def same(a: Any, b: Any) -> bool:
    """Whether two nests are equal, tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each curve that TensorBoard shows, the speed aside."""
    found = events(run_dir)
    tags = [tag for tag in found.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in tags}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_plain(x: Any) -> bool:
    if type(x) in (dict, OrderedDict):
        return all(map(is_plain, [*x, *x.values()]))
    return all(map(is_plain, x)) if type(x) in (list, tuple) else type(x) in (Tensor, str, int, float, bool, NoneType)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts in an empty folder, and must leave the signal handlers as they were."""
    monkeypatch.chdir(tmp_path)
    Toy.steps, Toy.flaw, Toy.ended, Toy.seeds = 0, "", [], []
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """finished(name, copy): a copy of the directory of a finished run, which was trained once."""
    folder = tmp_path_factory.mktemp("finished")

    def copy(name: str, target: str) -> Path:
        if not (folder / name).exists():
            train(name, folder / name)
        return Path(shutil.copytree(folder / name, target))

    return copy


# -- killed, stopped and resumed ---------------------------------------------------------------------------------------

KILLS = (("fsync", 1), ("step", 100), ("save", 2), ("replaced", 1), ("replace", 1))


@every_script
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_killed_and_resumed_runs_equal_undisturbed_ones(name: str, env_id: str, tmp_path: Path) -> None:
    env_id = SCRIPTS[name].second_env if env_id == "CartPole-v1" else env_id
    flags = {"env_id": env_id, "total_timesteps": 2400, "checkpoint_every": 700, "eval_every": 500, "eval_episodes": 1}
    flags |= {"run_dir": "run", "resume": True} | (normalizing(name) if env_id == "Pendulum-v1" else {})
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert process(name, tmp_path / "whole", **flags) == (0, "")
    steps = []
    for moment, count in KILLS:
        assert process(name, tmp_path / "killed", (moment, count, signal.SIGKILL), **flags) == (-signal.SIGKILL, "")
        saved = tmp_path / "killed" / "run" / "checkpoint.pt"
        steps.append(torch.load(saved, weights_only=True)["step"] if saved.exists() else 0)
    assert steps[:2] == [0, 0]  # killed before there was a checkpoint
    assert 0 < steps[2] < steps[3] == steps[4] < 2400  # killed in the second save, after it and in the third
    assert process(name, tmp_path / "killed", **flags) == (0, "")
    whole, killed = (tmp_path / folder / "run" for folder in ("whole", "killed"))
    assert same(*(torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, killed)))
    assert curves(whole) == curves(killed)
    for run in (whole, killed):
        assert {path.name.split(".")[0] for path in run.iterdir()} == {"events", "checkpoint"}
        assert not list(run.glob("*.tmp"))


@every_script
def test_a_resumed_run_has_each_point_once(name: str, tmp_path: Path) -> None:
    """Killed in its second save, it has points after the first; also the very next step has one: episodes last one."""
    flags = {"env_id": "Toy1-v0", "num_envs": 1, "checkpoint_every": 64, "run_dir": "run", "resume": True}
    assert process(name, tmp_path, ("save", 2, signal.SIGKILL), **flags) == (-signal.SIGKILL, "")
    assert process(name, tmp_path, **flags) == (0, "")
    for curve in curves(tmp_path / "run").values():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps))


@every_script
def test_signals_stop_after_the_iteration_and_a_second_one_at_once(name: str, tmp_path: Path) -> None:
    flags = {"env_id": "Toy20-v0", "total_timesteps": 640, "checkpoint_every": 0, "resume": True}
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        flags["run_dir"] = f"run{status}"
        code, err = process(name, tmp_path, ("step", 300, signum), ("step", 301, signum), **flags)
        assert code in (-signum, status)
        assert not (tmp_path / flags["run_dir"] / "checkpoint.pt").exists()  # it did not even finish the iteration
        code, err = process(name, tmp_path, ("step", 300, signum), **flags)
        saved = state(tmp_path / flags["run_dir"])
        assert code == status
        assert saved["step"] - saved["step"] / saved["iteration"] < 300 <= saved["step"]
        assert err.count("\n") == 1
        assert all(part in err for part in (f"step {saved['step']}", f"--run-dir {flags['run_dir']}", "--resume"))
        assert process(name, tmp_path, **flags) == (0, "")
        assert state(tmp_path / flags["run_dir"])["step"] >= 640


@every_script
def test_a_signal_during_an_evaluation_leaves_a_checkpoint(name: str, tmp_path: Path) -> None:
    flags = {"env_id": "Toy20-v0", "checkpoint_every": 0, "eval_every": 100, "eval_episodes": 1, "run_dir": "run"}
    status, _ = process(name, tmp_path, ("step", 130, signal.SIGTERM), **flags)
    assert status == 143
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@every_script
def test_resume_wants_the_same_flags(name: str, finished: Callable) -> None:
    finished(name, "run")
    resume, before = flags_of(name, resume=True), contents(Path("run"))
    refused(name, "gamma", "seed", **resume | {"run_dir": "run", "gamma": 0.5, "seed": 9})
    refused(name, "total_timesteps", **resume | {"run_dir": "run", "total_timesteps": 512})
    assert contents(Path("run")) == before
    refused(name, "--run-dir", **resume)
    Path("run").rename("moved")
    free = {"run_dir": "moved", "device": "auto", "num_threads": 2}
    assert cli(name, **resume | free)[::2] == (0, "")
    assert contents(Path("moved"))["checkpoint.pt"] == before["checkpoint.pt"]
    stranger = next(other for other in SCRIPTS if other != name)
    refused(name, stranger, name, **resume | {"run_dir": finished(stranger, "stranger")})


def other_values(name: str) -> dict[str, list]:
    """For each flag the values that the runs of these tests do not have: all of a switch or choice, else one."""
    found = {}
    for field in fields(importlib.import_module(name).Args):
        if field.name == "env_id":
            found[field.name] = [SCRIPTS[name].second_env]
            continue
        others = [not field.default] if field.type is bool else [x for x in get_args(field.type) if x != field.default]
        found[field.name] = others or [OTHER[field.name]]
    return found


@every_script
def test_resume_refuses_every_changed_flag(name: str, finished: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    finished(name, "run")
    rng = np.random.default_rng(0)
    np.savez("demonstrations.npz", obs=rng.normal(5, 3, (300, 3)), actions=rng.uniform(0, 1, (300, 2)))
    before = contents(Path("run"))
    for flag, values in other_values(name).items():
        if flag not in ("device", "num_threads", "run_dir", "resume"):
            changed = needs_of(name, flag) | {flag: values[0]}
            refused(name, f"{flag} (was", **flags_of(name, resume=True, run_dir="run") | changed)
    assert contents(Path("run")) == before


@every_script
def test_a_checkpoint_from_a_gpu_goes_on_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        train(name, "run")
    assert b"cuda:0" in Path("run", "checkpoint.pt").read_bytes()
    train(name, "run", resume=True)


class Malice:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def file_of(x: Any) -> bytes:
    torch.save(x, buffer := io.BytesIO())
    return buffer.getvalue()


def flipped(good: bytes) -> bytes:
    """One bit of the largest parameter is another one."""
    tensors = [x for x in torch.load(io.BytesIO(good), weights_only=True)["agent"].values() if x.is_floating_point()]
    where = good.index(max(tensors, key=Tensor.numel).numpy().tobytes()) + 100
    return good[:where] + bytes([good[where] ^ 16]) + good[where + 1 :]


def without(good: bytes, key: str) -> bytes:
    return file_of({k: x for k, x in torch.load(io.BytesIO(good), weights_only=True).items() if k != key})


def other_flags(good: bytes, change: Callable) -> bytes:
    saved = torch.load(io.BytesIO(good), weights_only=True)
    change(saved["args"])
    return file_of(saved)


DAMAGES = {
    "truncated": lambda good: good[: len(good) // 2], "flipped bit": flipped, "empty": lambda good: b"",
    "text": lambda good: b"This is no checkpoint.\n", "one digit": lambda good: b"0\n",
    "noise": lambda good: random.Random(1).randbytes(len(good)), "a tensor": lambda good: file_of(torch.ones(3)),
    "another dict": lambda good: file_of({"args": {}, "script": "x"}),
    "without agent": partial(without, key="agent"), "without step": partial(without, key="step"),
    "malicious pickle": lambda good: pickle.dumps({"args": Malice()}), "malicious zip": lambda good: file_of(Malice()),
    "a flag less": partial(other_flags, change=lambda args: args.pop("gamma")),
    "a flag more": partial(other_flags, change=lambda args: args.update(omega=1)), "directory": None,
}  # fmt: skip


@every_script
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(name: str, damage: str, finished: Callable) -> None:
    path = finished(name, "run") / "checkpoint.pt"
    good = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes(DAMAGES[damage](good))
    before = contents(Path("run"))
    refused(name, "checkpoint.pt", **flags_of(name, run_dir="run", resume=True))
    assert contents(Path("run")) == before
    assert os.listdir() == ["run"]  # nothing was executed


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = [
    ({"env_id": "CartPol-v1"}, "CartPole"), ({"env_id": "CartPole-v7"}, "v1"), ({"env_id": "no_such:A-v0"}, "no_such"),
    *(({"env_id": each}, each) for each in UNSUPPORTED), ({"num_envs": 0}, "num-envs"), ({"gamma": 1.5}, "gamma"),
    ({"total_timesteps": -1}, "total-timesteps"), ({"learning_rate": math.nan}, "learning-rate"),
    ({"seed": 1.5}, "seed"), ({"compile": "yes"}, "yes"), ({"typo": 1}, "typo"), ({"device": "tpu"}, "tpu"),
    ({"device": "cuda:99"}, "cuda:99"), ({"device": "cuda:x"}, "cuda:x"), ({"resume": True}, "run-dir"),
    ({"run_dir": "file"}, "file"), ({"run_dir": "file/below"}, "file"), ({"run_dir": "x" * 999}, "xxx"),
    ({"run_dir": "file/below", "resume": True}, "file"), ({"run_dir": "full"}, "full"),
    *([] if torch.cuda.is_available() else [({"device": "cuda"}, "cuda")]),
]  # fmt: skip


@every_script
@pytest.mark.parametrize(("bad", "part"), [*BAD, (None, "")], ids=lambda x: str(x)[:50])
def test_bad_input_is_refused_in_one_sentence(name: str, bad: dict | None, part: str) -> None:
    Path("file").write_text("text")
    Path("full").mkdir()
    Path("full", "something").write_text("else")
    before, bad = contents(Path()), SCRIPTS[name].bad if bad is None else bad
    refused(name, part, **flags_of(name, **bad))
    if "run_dir" not in bad and "resume" not in bad:
        refused(name, part, **flags_of(name, run_dir="new", **bad))
    assert contents(Path()) == before
    assert not {"runs", "new"} & set(os.listdir())


@every_script
def test_impossible_numbers_are_refused(name: str) -> None:
    args = importlib.import_module(name).Args
    for field in fields(args):
        numbers = {int: [-1] if field.name in ZERO_IS_OFF else [0, -1], float: [math.nan, math.inf, -1.0]}
        numbers[float] += [1.001] if field.name in ("gamma", "gae_lambda") else []
        for number in numbers.get(field.type, []):
            if (field.name, number) != ("log_std_init", -1.0):
                with pytest.raises(ValueError, match=field.name.replace("_", "-")):
                    args(**{field.name: number})


@every_script
@pytest.mark.parametrize("env_id", SUPPORTED)
def test_supported_spaces_run(name: str, env_id: str) -> None:
    if SCRIPTS[name].second_env != "CartPole-v1" and isinstance(SUPPORTED[env_id][1], spaces.Discrete):
        refused(name, "Discrete", "off_policy_ac.py", **flags_of(name, env_id=env_id, run_dir="run"))
        assert os.listdir() == []
        return
    if env_id == "Unbounded-v0" and SCRIPTS[name].noise != "GaussianActor.noise":  # a tanh policy
        refused(name, "finite bounds", **flags_of(name, env_id=env_id, run_dir="run"))
        return
    train(name, "run", env_id=env_id, total_timesteps=64, eval_episodes=2)
    assert math.isfinite(curves(Path("run"))["eval/episodic_return"][-1][1])


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@every_script
@pytest.mark.parametrize("flaw", ["obs", "rewards", "actions", "loss", "agent"])
def test_not_finite_ends_the_run(name: str, flaw: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module, Toy.flaw = importlib.import_module(name), flaw
    make_update, kept = module.make_update, []
    *owner, attribute = SCRIPTS[name].noise.split(".")
    owner = getattr(module, *owner) if owner else module
    noise = getattr(owner, attribute)

    def spoiled(x: Any) -> Any:
        return x * math.nan if Toy.steps >= Toy.flaw_at else x

    def bad_update(loss: Callable, *args: Any, **kwargs: Any) -> Callable:
        return make_update(lambda *batch: (spoiled(loss(*batch)[0]), loss(*batch)[1]), *args, **kwargs)

    def replace(source: Path, target: Path, replace: Callable = os.replace) -> None:
        replace(source, target)
        kept[:] = [Path(target).read_bytes()]

    def bad_save(run: Any, save: Callable = module.Run.save) -> None:
        (parameter, *_) = run.parts["agent"].parameters()
        parameter.data.copy_(spoiled(parameter.data))
        save(run)

    monkeypatch.setattr(os, "replace", replace)
    if flaw == "actions":
        monkeypatch.setattr(owner, attribute, lambda *args: spoiled(noise(*args)))
    if flaw == "loss":
        monkeypatch.setattr(module, "make_update", bad_update)
    if flaw == "agent":
        monkeypatch.setattr(module.Run, "save", bad_save)
    with pytest.raises(SystemExit) as leave:
        train(name, "run", checkpoint_every=100, total_timesteps=1000)
    err, saved = capsys.readouterr().err, state(Path("run"))
    assert leave.value.code == 1
    assert err.count("\n") == 1
    assert re.search("loss|grad" if flaw == "loss" else flaw, err)
    step = int(re.search(r"step ([\d,]+)", err)[1].replace(",", ""))
    assert 100 <= saved["step"] <= step <= Toy.steps
    assert contents(Path("run"))["checkpoint.pt"] == kept[0]
    tensors = torch.utils._pytree.tree_leaves({key: x for key, x in saved.items() if key != "rng"})
    assert all(x.isfinite().all() for x in tensors if isinstance(x, Tensor))


@every_script
def test_full_disk_leaves_the_last_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)

    def fsync(fd: int) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((OSError, SystemExit)):
        train(name, "run", checkpoint_every=60, total_timesteps=512)
    assert 60 <= state(Path("run"))["step"] <= 128


# -- evaluation --------------------------------------------------------------------------------------------------------


@every_script
def test_evaluation_is_right_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, logged, seeds = importlib.import_module(name), [], set()
    evaluate = module.evaluate

    def everything(agent: torch.nn.Module) -> Any:
        generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
        return deepcopy((agent.state_dict(), [part.training for part in agent.modules()], generators))

    def watched(agent: torch.nn.Module, env: gym.Env, seed: int, episodes: int) -> tuple[float, float]:
        for mode in (False, True):
            agent.train(mode)
            before, others, Toy.ended, Toy.seeds = everything(agent), Toy.seeds, [], []
            result = evaluate(agent, env, seed, episodes)
            seeds.update(Toy.seeds)
            Toy.seeds = others
            assert same(before, everything(agent))
            _, returns, lengths = zip(*Toy.ended, strict=True)
            assert len(returns) == episodes
            assert result == pytest.approx((np.mean(returns), np.mean(lengths)), rel=1e-6)
            logged.append(result)
        return result

    monkeypatch.setattr(module, "evaluate", watched)
    on = {"eval_every": 100, "eval_episodes": 3, "total_timesteps": 400} | normalizing(name)
    train(name, "on", **on)
    assert len(seeds) == 3  # of the three episodes, the same ones at every call
    assert not seeds & set(Toy.seeds)
    train(name, "off", **on | {"eval_every": 0, "eval_episodes": 0})
    points, plain = curves(Path("on")), curves(Path("off"))
    assert same(state(Path("on")), state(Path("off")))
    assert {tag: x for tag, x in points.items() if not tag.startswith("eval/")} == plain
    assert logged[::2] == logged[1::2]  # greedy, and always from the same start
    for column, tag in enumerate(("eval/episodic_return", "eval/episodic_length")):
        assert [value for _, value in points[tag]] == pytest.approx([each[column] for each in logged[::2]], rel=1e-6)
    ends = [step for step, _ in plain["charts/learning_rate"]]
    due = [end for start, end in itertools.pairwise([0, *ends]) if end // 100 > start // 100]
    assert [step for step, _ in points["eval/episodic_return"]] == (due if due[-1] == ends[-1] else [*due, ends[-1]])

    # Another process gets the same policy from the checkpoint, and adds nothing to the curves of a run that is finished
    assert process(name, Path(), run_dir="on", resume=True, **on) == (0, "")
    assert f"evaluated return {points['eval/episodic_return'][-1][1]:.1f} over 3 episodes" in Path("out").read_text()
    assert curves(Path("on")) == points


# -- the run directory -------------------------------------------------------------------------------------------------


@every_script
def test_curves_have_a_point_for_each_episode(name: str) -> None:
    for seed in (1, 2):
        Toy.steps, Toy.ended = 0, []
        train(name, str(seed), seed=seed, total_timesteps=400, checkpoint_every=150)
        points = curves(Path(str(seed)))
        for column, tag in enumerate(("charts/episodic_return", "charts/episodic_length"), 1):
            found = sorted((value, step) for step, value in points.pop(tag))
            truth = sorted((episode[column], episode[0]) for episode in Toy.ended)
            assert [value for value, _ in found] == pytest.approx([value for value, _ in truth], rel=1e-5)
            gaps = [x[1] - y[1] for x, y in zip(found, truth, strict=True)]
            assert max(map(abs, gaps)) < 2  # the environments are stepped together
        steps = [step for step, _ in points["charts/learning_rate"]]
        assert all(a < b for a, b in itertools.pairwise(steps))
        assert steps[-1] == Toy.steps == state(Path(str(seed)))["step"]
        assert all([step for step, _ in curve] == steps for curve in points.values())
    assert max(Counter(Toy.seeds).values()) == 1  # no seed is used twice, nor by two runs


@every_script
@pytest.mark.parametrize("compiled", [False, True])
def test_speed_leaves_out_what_is_no_training(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves on by 1/50 s with each step, and by 1000 s with all else that takes its time.

    A first iteration that compiled has to show its own speed; the second run resumes the first.
    """
    module, pauses = importlib.import_module(name), []

    def slow(function: Callable) -> Callable:
        return lambda *args: [pauses.append(1000), function(*args)][1]

    def compile(function: Callable, **_: Any) -> Callable:
        first = iter([slow(function)])
        return lambda *args: next(first, function)(*args)

    monkeypatch.setattr(module, "evaluate", slow(module.evaluate))
    monkeypatch.setattr(torch, "save", slow(torch.save))
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(time, "perf_counter", lambda: sum(pauses) + Toy.steps / 50)
    flags = {"eval_every": 200, "eval_episodes": 1, "checkpoint_every": 90, "total_timesteps": 600, "resume": True}
    for Toy.flaw in ("crash", ""):
        with suppress(AssertionError):
            train(name, "run", compile=compiled, **flags)
    assert len(pauses) > 6
    speeds = [point.value for point in events(Path("run")).Scalars("charts/SPS")]
    assert sum(speed != pytest.approx(50) for speed in speeds) == 2 * compiled


@every_script
def test_checkpoint_is_plain(name: str, finished: Callable) -> None:
    saved = torch.load(finished(name, "run") / "checkpoint.pt", weights_only=True)
    assert is_plain(saved)
    assert saved["args"] | flags_of(name) == saved["args"]
    assert set(saved["args"]) == {field.name for field in fields(importlib.import_module(name).Args)}
    assert saved["step"] >= 256
    packages = {"torch": torch, "gymnasium": gym, "numpy": np}
    assert saved["versions"] == {package: str(module.__version__) for package, module in packages.items()}


@every_script
def test_a_script_runs_alone_in_an_empty_folder(name: str) -> None:
    shutil.copy(ROOT / f"{name}.py", ".")
    env_id = SCRIPTS[name].second_env
    flags = {"env_id": env_id, "total_timesteps": 600, "eval_every": 200, "eval_episodes": 2, "seed": 3}
    flags = flags_of(name, **flags)
    command = [sys.executable, "-W", "error", f"{name}.py", *words(flags)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(os.listdir()) == {f"{name}.py", "runs"}
    (run,) = Path("runs", env_id, name).iterdir()
    assert re.fullmatch(r"seed3__\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    names = sorted(path.name for path in run.iterdir())
    assert len(names) == 2
    assert names[0] == "checkpoint.pt"
    assert names[1].startswith("events.out.tfevents.")

    lines = result.stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    progress = [line for line in lines if re.search(r"\d+%.* step [\d,]+ .*steps/s.* s left.* return -?\d", line)]
    assert 2 <= len(progress) <= 11
    value = dict(curves(run)["eval/episodic_return"])[state(run)["step"]]
    assert any(f"evaluated return {value:.1f} over 2 episodes" in line for line in lines)
    assert lines[-1] == "tensorboard --logdir runs"

    found = events(run)
    tags = found.Tags()["scalars"]
    assert set(tags) & set(TAGS) == set(TAGS) - SCRIPTS[name].lacks
    assert {tag.split("/")[0] for tag in tags} == {"charts", "losses", "eval"}
    assert all(math.isfinite(point.value) for tag in tags for point in found.Scalars(tag))
    (text,) = found.Tensors("flags/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert all(f"--{key.replace('_', '-')} {value}" in shown for key, value in flags.items())


@every_script
def test_a_terminal_has_one_refreshing_line(name: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    status, err = process(name, tmp_path, out=os.ttyname(theirs), eval_episodes=1)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert (status, err) == (0, "")
    (line,) = (line for line in text.split("\r\n") if "steps/s" in line)
    first, *_, last = refreshed = line.split("\r")
    assert len(refreshed) >= 2
    assert all(re.fullmatch(r" *\d+%.*steps/s.*s left.*return .*\x1b\[K", each) for each in refreshed)
    assert "100%" not in first
    assert "100%" in last


# -- importing, flags and anatomy --------------------------------------------------------------------------------------

IMPORTS = """
import hashlib, json, os, random, signal, sys, threading, warnings
import gymnasium, numpy, torch, torch.utils.tensorboard, tyro

def look():
    handlers = [str(signal.getsignal(each)) for each in signal.valid_signals()]
    draws = [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return {"files": os.listdir(), "environ": dict(os.environ), "handlers": handlers, "cwd": os.getcwd(),
            "draws": hashlib.md5(str(draws).encode()).hexdigest(), "threads": [torch.get_num_threads(),
            threading.active_count()], "cuda": torch.cuda.is_initialized(), "dtype": str(torch.get_default_dtype()),
            "warnings": len(warnings.filters)}

changed, before = {}, look()
for name in sys.argv[1:]:
    __import__(name)
    after = look()
    changed[name], before = [key for key in after if after[key] != before[key]], after
print(json.dumps(changed))
"""


def test_importing_a_script_has_no_side_effect() -> None:
    command = [sys.executable, "-B", "-W", "error", "-c", IMPORTS, *SCRIPTS]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {name: [] for name in SCRIPTS}


@every_script
def test_every_flag_runs_and_has_its_effect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the same graph, without the minute
    rng = np.random.default_rng(0)
    np.savez("demonstrations.npz", obs=rng.normal(5, 3, (300, 3)), actions=rng.uniform(0, 1, (300, 2)))
    counter = itertools.count()

    def result(**flags: Any) -> dict[str, Any]:
        train(name, run := f"run{next(counter)}", **flags)
        return state(Path(run))

    base, wrong = result(), []
    assert same(base, result())  # the same seed, the same run
    for field in fields(importlib.import_module(name).Args):
        others = {not field.default} if field.type is bool else set(get_args(field.type)) - {field.default}
        others = {SCRIPTS[name].second_env} if field.name == "env_id" else others
        for value in others or {OTHER[field.name]}:
            assert value != flags_of(name).get(field.name, field.default) or field.name == "run_dir"
            needs = needs_of(name, field.name)
            changed = {field.name: value} if field.name != "run_dir" else {}  # each run has another one
            new = result(**needs, **changed)  # more threads and a GPU may round differently
            if field.name == "num_threads":
                assert torch.get_num_threads() == value
            elif field.name != "device" and same(result(**needs) if needs else base, new) != (field.name in NEUTRAL):
                wrong.append(f"{field.name}={value}")
    assert wrong == []


@every_script
@pytest.mark.parametrize("error", [RuntimeError("no compiler here"), TritonMissing(None)], ids=["compiler", "triton"])
def test_what_cannot_be_compiled_runs_without(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    train(name, "eager")
    train(name, "compiled", compile=True)
    assert same(state(Path("eager")), state(Path("compiled")))
    assert "--compile" in capsys.readouterr().err


@every_script
def test_every_flag_is_read(name: str) -> None:
    read = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            read |= {node.attr} if owner in ("args", "self") else set()
    assert {field.name for field in fields(importlib.import_module(name).Args)} - read == set()


@every_script
def test_a_script_needs_no_other_file(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
        if isinstance(node, ast.Import):
            imported |= {each.name.split(".")[0] for each in node.names}
    packages = imported - set(sys.stdlib_module_names)
    assert packages <= {"torch", "gymnasium", "numpy", "tyro", "tensorboard"}


@every_script
def test_metadata_has_the_pins_of_requirements(name: str) -> None:
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    first, last = sync.spans(text)["metadata"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("#")[0].strip() for line in lines if not line.startswith("pytest")]
    assert re.findall(r'^#   "(.+)",$', text[first:last], re.MULTILINE) == pins
    assert all("==" in pin for pin in pins)


def test_same_name_same_code() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    assert sync.differences(scripts) == ""
    assert {Path(script).stem for script in scripts} == set(SCRIPTS)  # each script is tested
    for text in scripts.values():
        assert {"plumbing", "metadata"} < set(sync.spans(text))


def test_sync_copies_a_definition_and_prints_what_differs(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    tool = shutil.copy(ROOT / "tests" / "sync.py", "tests")
    head, rule = "# /// script\n# dependencies = []\n# ///\n", "# " + "-" * 117 + "\n"
    text = head + f"@cache\ndef f() -> int:\n    return 1\n\n\n{rule}# Plumbing\n{rule}X = 1\n{rule}"
    Path("a.py").write_text(text)
    Path("b.py").write_text("class B: ...\n" + text.replace("= 1", "= 2").replace("return 1", "return 2") + "Y = 3\n")
    Path("c.py").write_text("class B: ...\n")

    def run(*words: str) -> tuple[int, str, str]:
        result = subprocess.run([sys.executable, tool, *words], capture_output=True, text=True, check=False)
        return result.returncode, result.stdout, result.stderr

    status, out, _ = run("--check")
    assert status == 1
    assert "-    return 1\n+    return 2\n" in out
    assert "-X = 1\n+X = 2\n" in out
    assert run("f", "--from", "a.py") == run("plumbing", "--from", "a.py") == (0, "b.py: changed\n", "")
    assert Path("b.py").read_text() == "class B: ...\n" + text + "Y = 3\n"
    assert Path("c.py").read_text() == "class B: ...\n"
    assert run("--check") == (0, "", "")
    for words in ((), ("f",), ("g", "--from", "a.py"), ("f", "--from", "d.py"), ("--typo",)):
        status, out, err = run(*words)
        assert (status, out, err.count("\n")) == (2, "", 1)
    args = "class Args:\n    x: int = 1  # size\n\n\nX = 1\n"
    assert sync.differences({"a.py": args, "b.py": args.replace("= 1", "= 2")}) == ""
    for other in (args.replace("int", "float"), args.replace("size", "width"), args.replace("  # size", "")):
        assert "-x: int  # size" in sync.differences({"a.py": args, "b.py": other})


# -- statistics of the observations ------------------------------------------------------------------------------------


ON_POLICY = [name for name in SCRIPTS if name not in ("off_policy_ac", "ddpg")]


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, {}) for name in ON_POLICY), ("actor_critic", {"shared_network": True})]
)
def test_statistics_leave_the_policy_as_it_was(name: str, flags: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are settled; and nothing else updates them. (A replayed Q is bound to no old policy.)"""
    module, moved, updates = importlib.import_module(name), [], []
    update, update_obs_norm = module.RunningNorm.update, module.Agent.update_obs_norm

    def counted(norm: Any, x: torch.Tensor) -> None:
        updates.extend([x] * (len(norm.mean) > 1))  # not those of the rewards
        update(norm, x)

    def compared(agent: Any, obs: torch.Tensor) -> None:
        def outputs() -> torch.Tensor:
            seen = agent.obs_norm(obs)
            return torch.cat([agent.actor.net(seen).flatten(), agent.critic.net(seen).flatten()]).detach()

        before = outputs()
        update_obs_norm(agent, obs)
        moved.append(float((outputs() - before).abs().max()))

    monkeypatch.setattr(module.RunningNorm, "update", counted)
    monkeypatch.setattr(module.Agent, "update_obs_norm", compared)
    monkeypatch.setattr(module.Agent, "settled_after", 1)  # by the first iteration
    train(name, "run", env_id="Pendulum-v1", num_envs=4, total_timesteps=2000, normalize_obs=True, **flags)
    assert len(updates) == len(moved) > 2
    assert moved[0] > 1e-2
    assert max(moved[1:]) < 1e-5


# -- speed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"), [("off_policy_ac", {"actor_update": "reparameterized", "num_samples": 1}), ("ddpg", {})]
)
def test_an_update_computes_no_gradient_that_nobody_uses(name: str, flags: dict) -> None:
    """Q(s, a): one product of the hidden layers, and two for its gradient. y: two. Q(s, a') and a': two, and three."""
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if str(op) in ("onednn_float32.linear.default", "aten.addmm.default", "aten.mm.default"):
                products.append([tuple(x.shape) for x in args if isinstance(x, Tensor) and x.dim() == 2])
            return op(*args, **(kwargs or {}))

    flags = flags | {"hidden_size": 256, "batch_size": 256, "num_envs": 1, "log_interval": 12, "learning_starts": 10}
    with Products():
        train(name, "run", env_id="Pendulum-v1", total_timesteps=12, eval_episodes=0, num_updates=1, **flags)
    assert products.count([(256, 256)] * 2) == 3 * 10  # 3 updates


# -- devices -----------------------------------------------------------------------------------------------------------


@every_script
def test_on_a_pretended_gpu_the_run_is_the_same_and_waits_rarely(name: str) -> None:
    flags = {"env_id": "Toy20-v0", "normalize_obs": True}
    train(name, "cpu", **flags, eval_episodes=1)
    Toy.flaw, Toy.steps = "crash", 0
    with pretend_cuda() as gpu:
        with pytest.raises(AssertionError):
            train(name, "crashed", device="cuda", checkpoint_every=100, **flags)
        Toy.flaw, Toy.steps = "", 0
        train(name, "cuda", device="cuda", **flags, eval_episodes=1)
    assert gpu.draws == []  # all noise comes from the CPU's generator
    assert same(state(Path("cpu")), state(Path("cuda")))
    assert curves(Path("cpu")) == curves(Path("cuda"))
    train(name, "boundary", checkpoint_every=100, **flags)
    train(name, "crashed", device="cpu", resume=True, checkpoint_every=100, **flags)  # begun there, ended here
    assert same(state(Path("boundary")), state(Path("crashed")))

    def waits(run: str, **more: Any) -> tuple[int, int]:
        Toy.steps = 0
        with pretend_cuda() as gpu:
            train(name, run, **flags | {"device": "cuda", "total_timesteps": 120} | more)
        return len(gpu.waits), Toy.steps // 2

    args = importlib.import_module(name).Args(**flags_of(name))
    few, short = waits("few")
    for flag in SCRIPTS[name].free:
        assert waits(flag, **{flag: 2 * getattr(args, flag)}) == (few, short)
    more, long = waits("longer", **SCRIPTS[name].longer, total_timesteps=240)
    assert long == 2 * short
    assert more - few == SCRIPTS[name].waits_per_step * (long - short)


@every_script
def test_what_a_cuda_graph_overwrites_is_not_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph writes each result into the memory of the one before; this stands for it on a pretended GPU."""
    options, flags = [], {"env_id": "Toy20-v0"}

    def graph(function: Callable, **given: Any) -> Callable:
        options.append(given["options"]["triton.cudagraphs"])
        memory = []

        def replay(*batch: Tensor) -> Any:
            results, shape = torch.utils._pytree.tree_flatten(function(*batch))
            if not memory or any(old.shape != new.shape for old, new in zip(memory, results, strict=True)):
                memory[:] = [result.clone() for result in results]
            for old, new in zip(memory, results, strict=True):
                old.copy_(new)
            return torch.utils._pytree.tree_unflatten(memory, shape)

        return replay

    train(name, "eager", **flags)
    monkeypatch.setattr(torch, "compile", graph)
    with pretend_cuda():
        train(name, "graphs", device="cuda", compile=True, **flags)
    assert options
    assert all(options)
    assert same(state(Path("eager")), state(Path("graphs")))
    assert curves(Path("eager")) == curves(Path("graphs"))


@every_script
def test_auto_takes_a_gpu_where_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up = importlib.import_module(name).set_up
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert set_up("auto", 1, 0).type == device
    assert set_up("cuda:1", 1, 0) == torch.device("cuda", 1)
    with pytest.raises(SystemExit):
        set_up("cuda:2", 1, 0)


def test_the_pretended_gpu_catches_mistakes() -> None:
    with pretend_cuda() as gpu:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert (there + there.to("cuda:0") * 2 + torch.tensor(1.0)).cpu().tolist() == [4, 4, 4]
        assert (there.device.type, there.cpu().device.type) == ("cuda", "cpu")
        mistakes = [
            lambda: here + there, lambda: there[torch.tensor([0, 1])], lambda: torch.stack([here.sum(), there.sum()]),
            lambda: torch.nn.Linear(3, 2)(there), lambda: torch.nn.Linear(3, 2).to("cuda")(here),
            lambda: there.add_(here), lambda: here * there.sum(),
        ]  # fmt: skip
        for mistake in mistakes:
            with pytest.raises(DeviceMixError):
                mistake()
        with pytest.raises(TypeError):
            there.numpy()
        gpu.waits.clear()
        waits = [
            there[0].item, there.sum().__float__, there.tolist, there.cpu, lambda: there.to("cpu"),
            lambda: bool(there.any()), there.nonzero, lambda: there[there > 0], lambda: here.copy_(there),
        ]  # fmt: skip
        for count, wait in enumerate(waits, 1):
            wait()
            assert len(gpu.waits) == count
        there.copy_(here).mul_(2).sum()
        assert len(gpu.waits) == len(waits)
        assert gpu.draws == []
        torch.randn(3).to("cuda")
        assert gpu.draws == []
        torch.randn(3, device="cuda")
        assert len(gpu.draws) == 1


@every_script
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
def test_on_a_gpu_the_run_starts_alike_and_goes_on_elsewhere(name: str) -> None:
    flags = {"env_id": "Toy20-v0", "normalize_obs": True, "total_timesteps": 40}
    for device in ("cpu", "cuda"):
        train(name, device, device=device, **flags)
    cpu, cuda = (torch.load(f"{run}/checkpoint.pt", map_location="cpu", weights_only=True) for run in ("cpu", "cuda"))
    assert all(torch.allclose(x, cuda["agent"][key], atol=1e-3) for key, x in cpu["agent"].items())
    Toy.flaw, Toy.steps = "crash", 0
    with pytest.raises(AssertionError):
        train(name, "moved", device="cuda", env_id="Toy20-v0", checkpoint_every=100)
    Toy.flaw = ""
    train(name, "moved", device="cpu", env_id="Toy20-v0", checkpoint_every=100, resume=True)
    assert state(Path("moved"))["step"] >= 256
