"""Proves what every script promises to its user, for all scripts at once.

Processes are forked from a server that has imported everything: they start at once, and send themselves
signals at an exact moment. `train` and `cli` run a script inside of pytest.
"""

import importlib
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from decimal import Decimal
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple, flatten
from pretend_cuda import pretend_cuda
from sync import ROOT, parts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils._pytree import tree_flatten

# Metrics that a method has no use for, a flag with a bad value, at most so many waits for a GPU an iteration
Script = namedtuple("Script", "lacks bad waits")
NO_V = "value_loss explained_variance approx_kl clipfrac"
TABLE = {
    "reinforce": Script("q_loss clipfrac", "--baseline=no", 10),
    "actor_critic": Script("q_loss clipfrac approx_kl", "--advantage=no", 10),
    "a2c": Script("q_loss clipfrac approx_kl", "--optimizer=no", 4),
    "off_policy_ac": Script(NO_V, "--actor-update=no", 3),
    "ddpg": Script(NO_V + " entropy", "--tau=nan", 3),
    "npg": Script("q_loss clipfrac", "--num-minibatches=7", 4),
    "trpo": Script("q_loss clipfrac", "--num-minibatches=7", 6),
    "ppo": Script("q_loss", "--num-minibatches=7", 7),
}
SCRIPTS = list(TABLE)
METRICS = [
    "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate",
    *(f"losses/{x}" for x in ("policy_loss", "value_loss", "q_loss", "entropy", "approx_kl", "clipfrac")),
    "losses/grad_norm", "losses/explained_variance", "eval/episodic_return", "eval/episodic_length",
]  # fmt: skip
COMMON = {
    "env_id", "seed", "total_timesteps", "num_envs", "device", "num_threads", "compile", "run_dir", "resume",
    "checkpoint_every", "eval_every", "eval_episodes", "max_episode_steps",
}  # fmt: skip
# A run of about two iterations of at most 128 steps; of these flags a script has some
TINY = {
    "baseline": "value",  # of reinforce, which then has a critic
    "env_id": "Toy-v0", "num_envs": 2, "total_timesteps": 256, "eval_episodes": 0, "device": "cpu",
    "num_steps": 64, "update_epochs": 2, "critic_epochs": 2, "num_minibatches": 2, "cloning_steps": 2,
    "log_interval": 100, "learning_starts": 16, "batch_size": 32,
}  # fmt: skip


class Toy(gym.Env):
    """Episodes end in each way; it shows one array. `flaw` changes what step() returns after a while."""

    clock, made = 0, []  # of all together

    def __init__(self, length=0, endless_from=99, reward=None, obs=None, action=None, flaw=None, start=1):
        self.observation_space = obs or Box(-np.inf, np.inf, (3,))
        self.action_space = action or Box(np.float32([-1, 0]), np.float32([1, 4]))
        self.length = math.inf if len(Toy.made) >= endless_from else length
        self.array = np.zeros(3, np.float32)
        self.look = obs.sample if obs else self.same_array
        self.reward, self.flaw, self.start, self.closed = reward, flaw, start, 0
        self.seeds, self.ended, self.record = [], [], []
        Toy.made.append(self)

    def same_array(self):
        self.array[:] = self.np_random.normal(4, 3, 3) + random.random() + np.random.rand() + torch.rand(()).item()
        return self.array

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds += [] if seed is None else [seed]
        self.time, self.total, self.discounted = 0, 0.0, 0.0
        self.end = self.length or int(self.np_random.integers(10, 30))
        self.obs = self.look()
        return self.obs * (self.start if Toy.clock > 150 else 1), {}

    def step(self, action):
        inside = self.action_space.contains(np.asarray(action)) and np.abs(action).max() < 1e6
        assert (inside, action.dtype) == (True, self.action_space.dtype), action
        Toy.clock, self.time = Toy.clock + 1, self.time + 1
        reward = self.reward or -float(np.abs(action - np.ravel(self.obs)[0] / 4).sum())
        self.obs, self.total = self.look(), self.total + float(np.asarray(reward).item())
        done = self.time == self.end
        self.discounted = 0.9 * self.discounted + float(np.asarray(reward).item())
        self.ended += [(Toy.clock, self.total, self.time)] * done
        result = self.obs, reward, done and self.end % 3 != 1, done and self.end % 3 != 2, {}
        self.record.append((action, np.array(self.obs), self.discounted, *result[1:4]))
        return self.flaw(*result) if self.flaw and Toy.clock > 150 else result

    def close(self):
        self.closed += 1


BOX, TWO, TOP = Box(-1, 1, (3,)), Discrete(2), float(np.finfo(np.float32).max)
SUPPORTED = {
    "OneHot-v0": (Discrete(3, start=5), TWO), "Image-v0": (Box(0, 255, (4, 4), np.uint8), TWO),
    "Start-v0": (BOX, Discrete(3, start=-1)), "Matrix-v0": (Box(-1, 1, (2, 3)), Box(-2, 3, (2, 2))),
    "Scalar-v0": (Box(-1, 1, ()), Box(-2, 1, ())), "Huge-v0": (BOX, Box(-TOP, TOP, (2,))),
    "Half-v0": (Box(-1, 1, (3,), np.float16), Box(-2, 1, (2,), np.float16)),
    "Double-v0": (Box(-1, 1, (3,), float), Box(-2, 1, (2,), float)),
    "Free-v0": (BOX, Box(-np.inf, np.inf, (2,))), "Free64-v0": (BOX, Box(-1.7e308, 1.7e308, (2,), float)),
    "Mixed-v0": (BOX, Box(np.float32([-1, 0, -np.inf, -np.inf]), np.float32([2, np.inf, TOP, 0.25]))),
}  # fmt: skip
UNSUPPORTED = {
    "Dict-v0": (Dict(a=BOX), TWO), "Tuple-v0": (Tuple((BOX, TWO)), TWO), "Bits-v0": (MultiBinary(3), TWO),
    "MultiDiscrete-v0": (BOX, MultiDiscrete([2, 3])), "IntegerBox-v0": (BOX, Box(0, 5, (2,), int)),
}  # fmt: skip
REWARDS = [1, True, np.float64(1), np.int8(1), np.array(1.0), np.array([[1]], np.float16), Decimal(1)]

KINDS = {
    "Toy-v0": {}, "Toy1-v0": {"length": 1}, "Toy20-v0": {"length": 20}, "One-v0": {"obs": Box(1, 1, (3,))},
    "Endless-v0": {"endless_from": 0}, "EndlessEvaluation-v0": {"endless_from": 2},
    "EndlessOne-v0": {"endless_from": 0, "obs": Box(1, 1, (3,))},
    "Stop-v0": {"flaw": lambda *result: (Toy.clock > 151 or os.kill(os.getpid(), signal.SIGTERM), result)[1]},
    "Half3000-v0": {"reward": np.float16(1), "length": 3000},
    "Single300-v0": {"reward": np.float32(0.1), "length": 3000},
    "Exit-v0": {"flaw": lambda *_: sys.exit()},
    "Interrupted-v0": {"flaw": lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1 / 0},  # its process, too
    "NaN-v0": {"flaw": lambda obs, *more: (obs * math.nan, *more)},
    "Restart-v0": {"start": math.nan},
    "Inf-v0": {"flaw": lambda obs, reward, *more: (obs, -math.inf, *more)},
    "Loss-v0": {"flaw": lambda obs, reward, *more: (obs, 1e30, *more)},
    "Narrow-v0": {"flaw": lambda obs, *more: (obs[:1], *more)}, "Four-v0": {"flaw": lambda *all: all[:4]},
    "Seventh-v0": {"flaw": lambda obs, *more: (np.int64(7), *more), "obs": Discrete(3)},
    "List-v0": {"flaw": lambda obs, *more: (obs.tolist(), *more)},
    **{f"Reward{i}-v0": {"reward": reward, "length": 20} for i, reward in enumerate(REWARDS)},
    **{env_id: {"obs": obs, "action": act} for env_id, (obs, act) in (SUPPORTED | UNSUPPORTED).items()},
}  # fmt: skip
for env_id, kwargs in KINDS.items():
    gym.register(env_id, Toy, kwargs=kwargs)
gym.register("Single-v0", lambda: Toy() if not Toy.made else 1 / 0)
gym.register("Moves-v0", lambda: os.chdir("/") or Toy())
SECONDS = itertools.count()
every = pytest.fixture(params=SCRIPTS, name="name")(lambda request: request.param)  # test_...(name)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A test starts in an empty folder; after it handlers are as before, and environments closed once."""
    monkeypatch.chdir(tmp_path)
    Toy.clock, Toy.made = 0, []
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert {env.closed for env in Toy.made} <= {1}


def flags_of(name, normalize=None, **flags):
    """Those of a tiny run and those asked for; `normalize` means all flags that have it in their names."""
    known = {field.name for field in fields(importlib.import_module(name).Args)}
    flags |= {} if normalize is None else {flag: normalize for flag in known if "normalize" in flag}
    return {flag: value for flag, value in (TINY | {"run_dir": "run"} | flags).items() if flag in known}


def typed(flags):
    pairs = [(flag.replace("_", "-"), value) for flag, value in flags.items()]
    return [f"--{'no-' * (not x)}{flag}" if isinstance(x, bool) else f"--{flag}={x}" for flag, x in pairs]


def train(name, run_dir="run", **flags):
    module = importlib.import_module(name)
    return module.train(module.Args(**flags_of(name, run_dir=run_dir, **flags)))


def cli(name, *words):
    """Status, stdout and stderr of `python name.py words`, here, for a terminal without Greek letters."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True) for _ in range(2))
    with mock.patch.object(sys, "argv", [name, *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code
    return status, *(stream.buffer.getvalue().decode("cp1252") for stream in (out, err))


def refused(name, *told, words=(), status=2, **flags):
    """The command ends with the status and one sentence, in which everything is that must be told."""
    code, out, err = cli(name, *typed(flags_of(name, **flags)), *words)
    if "For full helptext" in err:  # tyro's frame, around what is wrong with a flag
        err = f"{name}: {' '.join(err.split())}\n"
    assert (code, err.count("\n"), err.split()[0], out * (status == 2)) == (status, 1, f"{name}:", ""), err
    assert [part for part in told if part not in err] == [], err
    return err


def in_child(name, folder, out, strikes, second, words):
    os.chdir(folder)
    for fd, path in ((1, out), (2, "err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    write, flush, pending, clock = RecordWriter.write, RecordWriter.flush, [], time.time
    RecordWriter.write = lambda _, data: pending.append(data)  # a kill loses what was not flushed, always
    RecordWriter.flush = lambda self: [*(write(self, pending.pop(0)) for _ in pending[:]), flush(self)][-1]
    time.time = lambda: clock() + second  # TensorBoard sorts the files by the second
    for strike in strikes:
        owner, attribute = {"step": Toy, "save": torch, "replace": os}[strike[1]], strike[1]

        def struck(*args, call=getattr(owner, attribute), now=strike, calls=[]):  # noqa: B006, B008
            if calls.append(0) or len(calls) == now[0]:
                if now[1] == "save":  # in the middle of it
                    call(args[0], buffer := io.BytesIO())
                    args[1].write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                    args[1].flush()
                os.kill(os.getpid(), now[2])
            return call(*args)

        setattr(owner, attribute, struck)
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


def process(name, *strikes, out="out", **flags):
    """Exit status (minus the signal, for one that was killed) and stderr of a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    args = name, Path.cwd(), out, strikes, next(SECONDS), typed(flags_of(name, **flags))
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{Path(__file__).parent}"):
        child = context.Process(target=in_child, args=args)
        child.start()
    child.join(60)
    child.kill()
    child.join()
    return child.exitcode, Path("err").read_text()


def run(*command, **environ):
    more = {"capture_output": True, "text": True, "timeout": 120, "check": False, "env": os.environ | environ}
    result = subprocess.run(list(map(str, command)), **more)
    return result.returncode, result.stdout, result.stderr


def state(run_dir="run"):
    return {**torch.load(f"{run_dir}/checkpoint.pt", weights_only=True), "args": {}}  # without the flags


def same(a, b):
    (a, a_shape), (b, b_shape) = tree_flatten(a), tree_flatten(b)
    equal = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=False))
    return a_shape == b_shape and list(map(type, a)) == list(map(type, b)) and all(equal)


def curves(run_dir="run"):
    """The points (step, value) of each curve that TensorBoard shows; those of the speed without a value."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: [(x.step, x.value * (tag != "charts/SPS")) for x in found] for tag, found in points.items()}


def contents():
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


@pytest.mark.parametrize(("env_id", "num_envs"), [("Toy-v0", 2), ("Toy1-v0", 1)])
def test_killed_and_resumed_runs_equal_undisturbed_ones(name, env_id, num_envs):
    """Bit for bit, whatever they were doing. TensorBoard shows each point once; Toy1 has one every step."""
    somewhere, steps = time.time_ns() % 250 + 1, []
    flags = {"env_id": env_id, "num_envs": num_envs, "total_timesteps": 640, "checkpoint_every": 128}
    flags |= {"constraint": "dual"} if env_id == "Toy1-v0" else {}  # of trpo, whose multiplier is saved
    flags |= {"eval_every": 300, "eval_episodes": 1, "resume": True, "normalize": True}
    assert process(name, run_dir="whole", **flags) == (0, "")
    for kill in ((100, "step"), (2, "save"), (2, "save"), (1, "replace"), (somewhere, "step")):
        assert process(name, (*kill, signal.SIGKILL), **flags) == (-signal.SIGKILL, "")
        steps.append(state()["step"] if Path("run/checkpoint.pt").exists() else 0)
    assert 0 == steps[0] < steps[1] < steps[2] == steps[3] <= steps[4]
    assert process(name, **flags) == (0, "")
    assert same(state("whole"), state()), somewhere
    assert curves("whole") == (points := curves()), somewhere
    assert {path.name[:13] for path in Path("run").iterdir()} == {"checkpoint.pt", "events.out.tf"}
    if env_id == "Toy1-v0":
        assert [step for step, _ in points["charts/episodic_return"]] == [*range(1, state()["step"] + 1)]
        assert all(len(dict(curve)) == len(curve) for curve in points.values())


def test_signals_stop_after_the_iteration_and_a_second_one_at_once(name):
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        flags = {"total_timesteps": 640, "checkpoint_every": 0, "resume": True, "run_dir": f"a run {status}"}
        code, _ = process(name, (301, "step", signum), (302, "step", signum), **flags)
        assert (code in (-signum, status), Path(flags["run_dir"], "checkpoint.pt").exists()) == (True, False)
        code, err = process(name, (301, "step", signum), **flags)
        step = state(flags["run_dir"])["step"]
        assert (code, err.count("\n"), 200 < step < 450, str(step) in err) == (status, 1, True, True)
        assert f"--run-dir 'a run {status}' --resume" in err
    assert process(name, **flags) == (0, "")


def test_endless_episodes_are_cut_or_listen_to_signals(name, capsys, monkeypatch):
    flags = {"env_id": "EndlessEvaluation-v0", "total_timesteps": 128, "eval_episodes": 2}
    more = {"eval_every": 128, "total_timesteps": 999}
    assert process(name, (500, "step", signal.SIGTERM), **flags | more)[0] == 143
    assert (state()["step"] < 300, "eval/episodic_return" in curves()) == (True, False)
    assert process(name, (500, "step", signal.SIGKILL), run_dir="final", **flags)[0] == -signal.SIGKILL
    assert state("final")["step"] >= 128  # saved before the evaluation at the end
    monkeypatch.setattr(importlib.import_module(name), "LONGEST", 1000)
    train(name, "cut", **flags)
    assert "--max-episode-steps" in capsys.readouterr().out
    assert curves("cut")["eval/episodic_length"][-1][1] == 1000
    if name == "reinforce":  # has to see the end; each step has noise of its own
        with pytest.raises(SystemExit, match=r"(?m)^2$"):
            train(name, "never", env_id="EndlessOne-v0")
        assert len({str(action) for action, *_ in Toy.made[-1].record}) > 500
    train(name, "limited", env_id="Endless-v0", max_episode_steps=25, eval_episodes=1)
    assert {x for tag in ("charts", "eval") for _, x in curves("limited")[f"{tag}/episodic_length"]} == {25}
    flags = {"env_id": "Endless-v0", "total_timesteps": 10**6, "run_dir": "endless"}
    stopped = process(name, (400, "step", signal.SIGTERM), **flags)[0]
    assert (stopped, Path("endless/checkpoint.pt").exists()) == (143, True)


def test_resume_wants_the_same_flags_and_a_whole_plain_checkpoint(name):
    train(name)
    before, others = contents(), {"seed": 9, "env_id": "Toy1-v0", "gamma": 0.5, "hidden_size": 9}
    others |= {flag: 512 for flag in COMMON if flag.endswith(("_every", "_episodes", "timesteps", "_steps"))}
    for flag, value in others.items():
        refused(name, flag, resume=True, **{flag: value})
    assert contents() == before
    train(name, resume=True, num_threads=2)
    assert torch.get_num_threads() == 2
    malice = type("Malice", (), {"__reduce__": lambda self: (os.mkdir, ("executed",))})()
    path = Path("run/checkpoint.pt")
    saved, good = torch.load(path, weights_only=True), path.read_bytes()
    assert {type(x) for x in tree_flatten(saved)[0]} <= {torch.Tensor, str, int, float, bool, type(None)}
    assert saved["args"] == saved["args"] | flags_of(name, resume=True, num_threads=2)
    agentless = {key: x for key, x in saved.items() if key != "agent"}
    other = saved | {"args": saved["args"] | {"flag_of_another_script": 1}}
    for bad in (b"", b"text\n", good[: len(good) // 2], pickle.dumps(malice), malice, agentless, other):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        before = contents()
        refused(name, "run", resume=True)
        assert contents() == before  # so nothing was executed


def test_a_full_disk_leaves_the_last_checkpoint(name, monkeypatch):
    with pytest.raises(SystemExit):
        train(name, env_id="Stop-v0", total_timesteps=512)
    saved = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises((OSError, SystemExit)):
        train(name, env_id="Stop-v0", total_timesteps=512, resume=True)
    assert saved == Path("run/checkpoint.pt").read_bytes()


def test_bad_input_is_refused_in_one_sentence(name):
    Path("file").write_text("text")
    Path("full/something").mkdir(parents=True)
    before, envs = contents(), ["CartPol-v1", "no_such:A-v0", *UNSUPPORTED, *["Start-v0"] * (name == "ddpg")]
    bad = [("env_id", each) for each in envs] + [("device", each) for each in ("tpu", "cuda:99", "cuda:x")]
    for flag, value in bad + [("run_dir", each) for each in ("file", "file/below", "full", "x" * 300)]:
        refused(name, value, *["off_policy_ac.py"] * (value == "Start-v0"), **{flag: value})
    with mock.patch.object(os, "access", return_value=False):
        refused(name, "PermissionError", run_dir="full")
    for word in (TABLE[name].bad, "--typo=1", "--gamma=nan", "--seed=1.5"):
        refused(name, word.split("=")[0], words=[word])
    args = importlib.import_module(name).Args
    for field in fields(args):
        least = 1 - field.name.startswith(("seed", "max_episode", "checkpoint", "eval"))
        numbers = {int: [-1, least - 1], float: [math.nan, math.inf, -1.0, np.float64(0.5)]}.get(field.type, [])
        beyond = {"gamma": [1.001], "gae_lambda": [1.001], "hidden_size": [10_001], "max_grad_norm": [0.0]}
        numbers += beyond.get(field.name, [])
        for number in numbers:
            if field.name != "log_std_init" or number != -1.0:
                with pytest.raises(ValueError, match=field.name.replace("_", "-")):
                    args(**{field.name: number})
    if name == "ppo":  # it is slow, and the text is the same in all
        environ = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": f"{Path.cwd()}-cache"}
        status, _, err = run(sys.executable, ROOT / f"{name}.py", "--compile", "--device=cpu", **environ)
        assert (status, err.count("\n"), "--compile" in err) == (2, 1, True)
    assert contents() == before


@pytest.mark.parametrize("flaw", ["NaN", "Restart", "Inf", "Loss", "Narrow", "Seventh"])
def test_a_bad_observation_reward_or_loss_ends_the_run(name, flaw):
    told = {"NaN": ["obs"], "Restart": [], "Inf": ["reward"], "Loss": ["losses/"], "Narrow": ["Narrow-v0", "(1,)"]}
    flags = {"checkpoint_every": 64, "total_timesteps": 2000, "normalize": False, "env_id": f"{flaw}-v0"}
    if flaw == "Restart" and name in ("ddpg", "off_policy_ac"):  # nobody asks the policy, nothing is learnt
        flags |= {"learning_starts": 1000, "normalize": True}
    err = refused(name, *told.get(flaw, ["observation 7 for Discrete(3)"]), status=1, **flags)
    assert flaw in ("Narrow", "Seventh") or 151 <= int(re.search(r"step ([\d,]+)", err)[1]) <= Toy.clock
    assert 64 <= state()["step"] <= 152
    assert all(x.isfinite().all() for x in tree_flatten(state())[0] if isinstance(x, torch.Tensor))


def test_environments_are_made_when_needed_and_closed_whatever_they_do(name, tmp_path):
    train(name, env_id="Single-v0", num_envs=1)
    with pytest.raises(ZeroDivisionError):
        train(name, "two", env_id="Single-v0")
    with pytest.raises(ValueError, match="unpack"):
        train(name, "crashed", env_id="Four-v0")
    train(name, "evaluated", eval_every=128, eval_episodes=1)
    assert [env.closed for env in Toy.made] == [1] * len(Toy.made)
    status, err = process(name, env_id="Four-v0", run_dir="process")
    assert (status, "Four-v0" in err.splitlines()[-1]) == (1, True)
    Toy.clock = 0
    with pytest.raises(SystemExit, match=r"(?m)^130$"):
        train(name, "interrupted", env_id="Interrupted-v0", total_timesteps=512)
    assert state("interrupted")["step"] >= 100
    refused(name, "Exit-v0", status=1, env_id="Exit-v0", run_dir="exit", total_timesteps=512)
    train(name, "here", env_id="Moves-v0")
    os.chdir(tmp_path)
    assert {path.name[:13] for path in Path("here").iterdir()} == {"checkpoint.pt", "events.out.tf"}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the float16 toy's observations
@pytest.mark.parametrize("env_id", [*SUPPORTED, "Toy-v0", "List-v0"])
def test_supported_spaces_run(name, env_id, monkeypatch):
    """What is stored is what the environments did; a policy's unit is half the width between two bounds."""
    envs_class = importlib.import_module(name).Envs

    def step(envs, actions, running=None, step=envs_class.step):
        stored, obs = envs.obs, envs.obs.copy()
        results = step(envs, actions, running)
        assert np.array_equal(stored, obs)
        for i in range(len(envs.envs)) if running is None else running.nonzero()[0]:
            toy, (reward, next_obs, *ends, discounted) = envs.envs[i].unwrapped, (x[i] for x in results)
            action, after, total, paid, terminated, truncated = toy.record[-1]
            assert np.array_equal(envs.obs[i], flatten(toy.observation_space, toy.obs).astype(np.float32))
            assert np.array_equal(next_obs, flatten(toy.observation_space, after).astype(np.float32))
            assert (ends, envs.obs.dtype) == ([terminated, terminated or truncated], np.float32)
            assert (reward, discounted) == pytest.approx((np.float32(paid), total), rel=1e-5, abs=1e-5)
            space, unit = toy.action_space, np.reshape(actions[i], toy.action_space.shape)
            if isinstance(space, Box):
                low, high = (np.where(abs(x) < 1e30, x, np.nan) for x in (space.low, space.high))
                width = np.where(np.isfinite(high - low), high - low, 2)  # one bound is ±1, too
                middle = np.nan_to_num(np.where(np.isfinite(low), low + width / 2, high - width / 2))
                mapped = middle + width / 2 * unit
                assert action == pytest.approx(mapped.clip(space.low, space.high), rel=1e-2, abs=1e-2)
            else:
                assert action == unit + space.start
        return results

    monkeypatch.setattr(envs_class, "step", step)
    if name != "ddpg" or not isinstance(gym.spec(env_id).kwargs.get("action"), Discrete):
        train(name, env_id=env_id, total_timesteps=200, eval_episodes=1, gamma=0.9)
        assert math.isfinite(curves()["eval/episodic_return"][-1][1])


def test_rewards_of_any_type_are_summed_in_double_precision(name):
    for i, reward in enumerate(REWARDS):
        train(name, f"reward{i}", env_id=f"Reward{i}-v0", eval_episodes=1, total_timesteps=100)
        points = curves(f"reward{i}")
        assert {x for tag in ("charts", "eval") for _, x in points[f"{tag}/episodic_return"]} == {20}, reward
    flags = {"num_envs": 1, "num_steps": 250, "learning_starts": 10**6, "total_timesteps": 3000}
    for env_id in ("Half3000-v0", "Single300-v0"):
        train(name, env_id, env_id=env_id, **flags)
        (point,) = curves(env_id)["charts/episodic_return"]
        assert point == (3000, pytest.approx(int(re.search(r"\d+", env_id)[0]), rel=1e-7))


def test_evaluation_is_right_and_changes_nothing(name):
    flags = {"total_timesteps": 400, "checkpoint_every": 256, "normalize": True}
    train(name, "off", **flags)
    training, Toy.made = Toy.made, []
    train(name, "on", eval_every=100, eval_episodes=3, **flags)
    assert same(state("off"), state("on"))
    points, evaluations = curves("on"), [env.ended[:3] for env in Toy.made[2:]]
    assert {tag: curve for tag, curve in points.items() if not tag.startswith("eval/")} == curves("off")
    found = [[x for _, x in points[f"eval/episodic_{tag}"]] for tag in ("return", "length")]
    truth = np.transpose([np.mean(each, 0)[1:] for each in evaluations])
    assert np.array(found) == pytest.approx(truth, rel=1e-5)
    seeds, eval_seeds = ([seed for env in envs for seed in env.seeds] for envs in (training, Toy.made[2:]))
    assert (len(evaluations) >= 3, len(set(eval_seeds)), max(seeds + eval_seeds) < 2**31) == (True, 1, True)
    assert len(set(seeds) - set(eval_seeds)) == len(seeds) >= 4
    train(name, "greedy", env_id="One-v0", eval_episodes=2)
    assert len({str(action) for action, *_ in Toy.made[-1].record}) == 1  # from one observation


@pytest.mark.parametrize("env_id", ["Toy-v0", "Stop-v0"])
def test_curves_have_a_point_for_each_episode_also_after_a_signal(name, env_id):
    with suppress(SystemExit):
        train(name, env_id=env_id, total_timesteps=400)
    train(name, env_id=env_id, total_timesteps=400, resume=True)
    points, ended = curves(), sorted(episode for env in Toy.made for episode in env.ended)
    if name != "reinforce" or env_id == "Toy-v0":  # it takes up whole batches of episodes
        for column, tag in enumerate(("return", "length"), 1):
            found = points.pop(f"charts/episodic_{tag}")
            assert all(step - at in (0, 1) for (step, _), (at, *_) in zip(found, ended, strict=True))
            assert [x for _, x in found] == pytest.approx([episode[column] for episode in ended], rel=1e-6)
        assert state()["step"] == Toy.clock


def test_a_script_runs_alone_in_an_empty_folder_and_into_a_pipe_that_closes(name):
    shutil.copy(ROOT / f"{name}.py", ".")
    env_id = "Pendulum-v1" if name == "ddpg" else "CartPole-v1"
    flags = {"env_id": env_id, "run_dir": "", "eval_every": 200, "eval_episodes": 2, "total_timesteps": 600}
    words = " ".join(typed(flags := flags_of(name, **flags)))
    shell = f"'{sys.executable}' -W error {name}.py {words} | head -n 1; exit ${{PIPESTATUS[0]}}"
    status, out, err = run("bash", "-c", shell)
    assert (status, err, out.count("\n"), set(os.listdir())) == (0, "", 1, {f"{name}.py", "runs"})
    (run_dir,) = Path("runs", env_id, name).iterdir()
    assert re.match(r"seed1__\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run_dir.name)
    tags, lacks = set(curves(run_dir)), TABLE[name].lacks.split()
    assert tags & set(METRICS) == {tag for tag in METRICS if tag.split("/")[1] not in lacks}
    assert {tag.split("/")[0] for tag in tags} == {"charts", "losses", "eval"}
    (text,) = EventAccumulator(str(run_dir)).Reload().Tensors("flags/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert all(re.search(rf"{flag}\W+{value}", shown) for flag, value in flags.items())


def test_terminals_threads_and_default_folders(name, monkeypatch):
    assert process(name, eval_episodes=2, run_dir="a run") == (0, "")
    lines, value = Path("out").read_text().splitlines(), curves("a run")["eval/episodic_return"][-1][1]
    assert any(re.search(r"100%.* step [\d,]+ .*steps/s.* left .*return -?\d", line) for line in lines)
    assert f"evaluated return {value:.1f}" in lines[-2]
    assert lines[-1] == "tensorboard --logdir 'a run'"
    assert process(name, eval_episodes=1, out="/dev/full", run_dir="full")[0] == 0
    assert "eval/episodic_return" in curves("full")
    with mock.patch.object(sys, "stdout", None):  # closed
        train(name)
    gone = mock.Mock(write=mock.Mock(side_effect=BrokenPipeError))
    with mock.patch.object(sys, "stderr", gone), pytest.raises(SystemExit, match=r"(?m)^2$"):
        train(name)  # where there is a run
    words = typed(flags_of(name, run_dir="cell"))
    with mock.patch.object(sys, "argv", [name, *words]), redirect_stdout(io.StringIO()) as cell:
        exec((ROOT / f"{name}.py").read_text("utf-8"), {"__name__": "__main__"})  # as in a notebook
    assert "notebook on Toy-v0" in cell.getvalue()
    status, out, _ = cli(name, "--help")
    assert (status, [flag for flag in ("--env-id", "--seed", "--resume") if flag not in out]) == (0, [])
    monkeypatch.setattr(time, "strftime", lambda text, *_, show=time.strftime: show(text, time.gmtime(0)))
    with ThreadPool(1) as pool:  # two runs in one second, the first in a thread
        assert "eval/episodic_return" in pool.apply(train, (name, ""), {"eval_episodes": 1})
    train(name, "")
    assert len(list(Path("runs").rglob("checkpoint.pt"))) == 2


def test_importing_a_script_has_no_side_effect():
    code = """if True:
        import os, random, signal, sys, gymnasium, numpy, torch, torch.utils.tensorboard, tyro
        def look():
            draws = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
            states = dict(os.environ), os.listdir(), torch.get_num_threads(), torch.cuda.is_initialized()
            return draws, states, [str(signal.getsignal(x)) for x in signal.valid_signals()]
        for name in sys.argv[1:]:
            before = look()
            __import__(name)
            assert look() == before, name"""
    assert run(sys.executable, "-B", "-W", "error", "-c", code, *SCRIPTS, PYTHONPATH=str(ROOT)) == (0, "", "")


def test_on_a_pretended_gpu_the_run_is_the_same_and_waits_rarely(name, monkeypatch):
    make, waits = torch.tensor, []
    flags = {"env_id": "Toy20-v0", "device": "auto", "normalize": True, "learning_starts": 200}
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **more: make(data, **more).to(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(name, "cpu", eval_episodes=1, **flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for total in (256, 384):
        with pretend_cuda() as gpu:
            train(name, f"gpu{total}", total_timesteps=total, eval_episodes=1, **flags)
        assert gpu.draws == []  # all noise comes from the CPU's generator
        waits.append((len(gpu.waits), state(f"gpu{total}")["iteration"]))
    assert (same(state("cpu"), state("gpu256")), curves("cpu")) == (True, curves("gpu256"))
    assert 0 < waits[1][0] - waits[0][0] <= TABLE[name].waits * (waits[1][1] - waits[0][1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["reinforce", "actor_critic", "a2c", "ppo"])
def test_a_compiled_run_is_the_eager_one(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for compile in (False, True):
        train(name, str(compile), compile=compile)
    torch.testing.assert_close(*(state(x)["agent"] for x in ("False", "True")), rtol=1e-4, atol=1e-5)


LEARNERS = [
    ("reinforce", 20_000, 100, {}), ("actor_critic", 15_000, 60, {}), ("a2c", 20_000, 60, {}),
    ("npg", 12_000, 150, {}), ("trpo", 12_000, 150, {}), ("trpo", 12_000, 150, {"constraint": "dual"}),
    ("ppo", 10_000, 100, {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "least", "flags"), LEARNERS)
def test_learns_cartpole(name, steps, least, flags):
    """No learning gives 20, a wrong sign 9; test_ddpg.py has the other two."""
    module = importlib.import_module(name)
    args = module.Args(total_timesteps=steps, device="cpu", run_dir="run", **flags)
    assert module.train(args)["eval/episodic_return"] > least


def test_flags_are_read_and_metadata_pin_what_is_imported():
    lines, alike = (ROOT / "requirements.txt").read_text("utf-8"), {}
    pins = re.findall(r"^(?!pytest)(\S+==\S+)", lines, re.MULTILINE)
    standard = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"  # PEP 723
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text("utf-8")
        known = {field.name for field in fields(importlib.import_module(name).Args)}
        assert known - COMMON <= set(re.findall(r"(?:args|self)\.(\w+)", text))
        assert COMMON - known <= ({"compile"} if name in ("npg", "trpo") else set())
        for flag in known & COMMON - {"num_envs"}:  # which are episodes to some
            kind, told = re.search(rf"^    {flag}: (\w+) = .*?  # (.*)", text, re.MULTILINE).groups()
            assert alike.setdefault(flag, (kind, told)) == (kind, told), (name, flag)
        imported = set(re.findall(r"^(?:import|from) (\w+)", text.split('"""', 2)[2], re.MULTILINE))
        assert imported <= {"torch", "gymnasium", "numpy", "tyro", "tensorboard"} | sys.stdlib_module_names
        (block,) = re.finditer(standard, text)
        metadata = tomllib.loads("".join(line[2:] for line in block["content"].splitlines(keepends=True)))
        assert (block["type"], metadata["dependencies"]) == ("script", pins)


def test_below_the_rule_all_scripts_are_the_same_and_sync_mends_what_is_not():
    assert run(sys.executable, ROOT / "tests/sync.py", "--check") == (0, "", "")
    Path("tests").mkdir()
    tool, text = shutil.copy(ROOT / "tests/sync.py", "tests"), (ROOT / f"{SCRIPTS[0]}.py").read_text("utf-8")
    Path("a.py").write_text(text, "utf-8")
    Path("b.py").write_text(text.replace(old := parts(text)["Envs"], old[:-1] + "  # other\n"), "utf-8")
    results = [run(sys.executable, tool, *words)[0] for words in (["--check"], ["Envs", "--from", "a.py"])]
    assert (results, Path("b.py").read_text("utf-8")) == ([1, 0], text)
