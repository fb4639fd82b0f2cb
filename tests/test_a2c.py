"""Proves that a2c.py takes the step that it says: alone, with workers, and under torchrun.

A3C's environments write down what happens. Its worker runs in this process, where its lock is watched, and in
its own.
"""

import copy
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from second_road import as_seen, close, distribution, lambda_loop, new_agent, watch
from tabular import SPACES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import a2c

NORMALIZE = {"normalize_obs": True, "normalize_advantages": True, "normalize_rewards": True}


def records(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]  # the last may be a half


def pids(path):
    return {pid for pid, *_ in records(path)} - {os.getpid()}


class Recorder(gym.Env):
    """Writes into the file $RECORD who did what; $STRIKE (at which step, how) breaks one process, once."""

    copies, hook, stop = [], None, None  # of this process; called before a step; stops there

    observation_space, action_space = (spaces.Box(-np.inf, np.inf, (n,)) for n in (2, 1))

    def __init__(self):
        self.path, self.taken = os.environ.get("RECORD", os.devnull), 0
        self.copies.append(self)
        if "CHILD" in os.environ:
            self.child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(99,))
            self.child.start()

    def close(self):
        if "CHILD" in os.environ:
            self.child.terminate()
            self.write("close", self.child.join())

    def write(self, *what):
        with open(self.path, "a") as file:
            file.write(json.dumps([os.getpid(), id(self), *what]) + "\n")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.write("reset", seed)
        self.seed, parent = seed or self.seed, multiprocessing.parent_process()
        while seed and self.path != os.devnull and parent and parent.is_alive() and len(pids(self.path)) < 2:
            time.sleep(0.01)  # so that no worker has done all before the other has begun
        self.length, self.total, self.obs = 0, 0.0, self.np_random.normal(size=2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        if self.taken == Recorder.stop:
            raise InterruptedError
        if Recorder.hook:
            Recorder.hook(self)
        assert "CHILD" not in os.environ or self.child.is_alive()
        before, self.length = self.obs, self.length + 1
        push, noise = float(np.tanh(np.sum(action) - 1)), self.np_random.normal(size=2)
        self.obs = (0.6 * before + [push, 0.5] * noise + [1, 2]).astype(np.float32)
        result = self.obs, float(5 * before[0] * push + noise[0]), bool(self.obs[1] > 5.5), self.length == 9
        self.total, self.taken = self.total + result[1], self.taken + 1
        self.write("step", before.tolist(), self.total, any(result[2:]))
        when, how = os.environ.get("STRIKE", "0 none").split()
        if self.taken == int(when) and os.environ.get("RANK", "1") == "1":
            with suppress(FileExistsError), open(self.path + ".struck", "x"):
                if how == "raise":
                    raise RuntimeError("the environment broke")
                if how == "locked":  # dies with the lock that it has when it updates statistics
                    a2c.RunningNorm.update = lambda *_: os.kill(os.getpid(), 9)
                else:
                    os.kill(os.getpid(), int(how))
        return *result, {}


gym.register("Recorder-v0", "test_a2c:Recorder")


def train(run_dir, **flags):
    short = {"eval_episodes": 0, "checkpoint_every": 0, "num_envs": 4, "num_steps": 8, "hidden_size": 16}
    short |= {"env_id": "test_a2c:Recorder-v0", "run_dir": str(run_dir), "device": "cpu"} | flags
    Recorder.copies.clear()
    return a2c.train(a2c.Args(**short))


def saved(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def assert_same(*run_dirs, tolerance=0.0):
    """Parameters, statistics of observations, rewards and the optimizer, and counts."""
    one, two = ({**saved(x), "optimizer": saved(x)["optimizer"]["state"]} for x in run_dirs)
    for part in ("agent", "return_norm", "optimizer", "step", "iteration"):
        torch.testing.assert_close(one[part], two[part], rtol=tolerance, atol=tolerance)


ALL = {"optimizer": "adam", **NORMALIZE}
KINDS = [{"normalize_rewards": False, "anneal_lr": False}, {"max_grad_norm": 1e9, **NORMALIZE}, ALL]


@SPACES
@pytest.mark.parametrize("more", KINDS, ids=lambda more: "-".join(more))
def test_a_run_by_a_second_road(space, more):
    """Loops, separate parameters, backward(); shapes that would broadcast are refused."""
    flags = {"total_timesteps": 320, "num_envs": 4, "num_steps": 8, "gamma": 0.9, "gae_lambda": 0.8, **more}
    flags |= {"env_id": f"Tabular{type(space).__name__}-v0", "device": "cpu", "ent_coef": 0.1}
    args = a2c.Args(**flags)
    agent = new_agent(a2c, space, normalize_obs=args.normalize_obs)
    other = copy.deepcopy(agent)
    optimizers = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    optimizer = optimizers[args.optimizer](other.parameters(), eps=1e-5)
    iterations, clipped = watch(a2c, agent, "a2c_loss", args), 0
    assert len(iterations) == 10
    for k, iteration in enumerate(iterations):
        optimizer.param_groups[0]["lr"] = rate = args.learning_rate * (1 - k / 10 * args.anneal_lr)
        close(iteration.rates, [rate, rate])
        now = as_seen(args, other, iterations, k)
        values, next_values = (other.critic(x)[..., 0] for x in (now.obs, now.next_obs))
        arrays = now.rewards, values, next_values, now.terminated, now.dones
        advantages = torch.from_numpy(lambda_loop(*(x.detach().numpy() for x in arrays), 0.9, 0.8))
        returns = advantages + values.detach()
        explained = 1 - np.var(advantages.numpy()) / np.var(returns.numpy())
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.numpy().std()
        pi, value_loss = distribution(other, now.obs), (values - returns).square().mean()
        policy_loss, entropy = -(pi.log_prob(now.actions) * advantages).mean(), pi.entropy().mean()
        optimizer.zero_grad()
        (policy_loss + 0.5 * value_loss - 0.1 * entropy).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), args.max_grad_norm)
        clipped += norm > args.max_grad_norm
        optimizer.step()
        expected = [x.item() for x in (policy_loss, value_loss, entropy, norm, explained)]
        expected = dict(zip(a2c.METRICS, expected, strict=True))
        assert iteration.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    close(tuple(agent.parameters()), tuple(other.parameters()), 1e-5)
    assert (clipped > 0) == (args.max_grad_norm < 1)
    for wrong in ((advantages[..., None], returns), (advantages, returns[:1]), (advantages.T, returns.T)):
        with pytest.raises(AssertionError):
            a2c.a2c_loss(agent, now.obs, now.actions, *wrong, args)


@pytest.fixture
def here(monkeypatch):
    """Makes the workers run in this process, one after the other, each until it raises InterruptedError."""

    def spawn(function, given, count, join):
        (fakes.lock,) = (x for x in given if hasattr(x, "locked"))
        (fakes.agent,) = (x for x in given if isinstance(x, a2c.Agent))
        (fakes.norm,) = (x for x in given if isinstance(x, a2c.RunningNorm))
        (fakes.optimizer,) = (x for x in given if isinstance(x, torch.optim.Optimizer))
        fakes.prepare()
        handlers = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
        for k in range(count):
            with suppress(InterruptedError), torch.random.fork_rng([]):
                function(k, *given)
        fakes.leave([signal.signal(*each) for each in handlers])
        return SimpleNamespace(processes=[], join=lambda *_, **__: True)

    fakes = SimpleNamespace(prepare=lambda: None, leave=lambda _: None)
    value = lambda _, x: SimpleNamespace(value=x)  # noqa: E731
    context = SimpleNamespace(Lock=threading.Lock, Queue=queue.Queue, Value=value)
    parent = SimpleNamespace(is_alive=lambda: True, join=threading.Event().wait)
    monkeypatch.setattr(a2c.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(a2c.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(a2c.multiprocessing, "spawn", spawn)
    yield fakes
    Recorder.hook = Recorder.stop = None


def test_a_worker_computes_at_its_copy_and_changes_what_is_shared_under_the_lock(here, tmp_path, monkeypatch):
    """In its first rollout others change θ and the statistics: its gradient does not know, its step does."""
    calls, first, update = Counter(), {}, a2c.RunningNorm.update

    def guard(owner, name, shared=lambda *_: True):
        function = getattr(owner, name)

        def spy(*given):
            assert here.lock.locked() or not shared(*given), name
            calls[name] += shared(*given)
            (theta,) = here.optimizer.param_groups[0]["params"]
            before, result = theta.clone(), function(*given)
            if name == "step":
                first.setdefault(disturbed, [theta.grad.clone(), before, theta - before])
            return result

        monkeypatch.setattr(owner, name, spy)

    def prepare():
        update(here.agent.obs_norm, torch.randn(50, 2))
        guard(here.agent, "state_dict")
        guard(here.optimizer, "step")

    def others(env):
        assert not here.lock.locked()
        if disturbed and env.taken == 5 and env is Recorder.copies[7]:
            (theta,) = here.optimizer.param_groups[0]["params"]
            theta.data += torch.linspace(-1, 1, len(theta))
            update(here.agent.obs_norm, torch.full((7, 2), 3.0))

    here.prepare, Recorder.hook = prepare, others
    guard(a2c.RunningNorm, "update", lambda norm, *_: norm is here.norm or norm is here.agent.obs_norm)
    guard(a2c.Run, "save")
    flags = {"asynchronous": True, "num_workers": 1, "total_timesteps": 320, "checkpoint_every": 32}
    for disturbed in (False, True):
        train(tmp_path / str(disturbed), log_interval=1, **flags, **NORMALIZE)
        assert here.agent.obs_norm.count[0] == 50 + 320 + 7 * disturbed
    assert calls == {"state_dict": 2 * (10 + 2), "step": 2 * 10, "update": 2 * 20, "save": 2 * 2}
    for x, y, change in zip(*first.values(), (0, torch.linspace(-1, 1, len(first[True][0])), 0), strict=True):
        torch.testing.assert_close(y, x + change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_one_worker_is_the_synchronous_run(optimizer, tmp_path, here):
    flags = {"optimizer": optimizer, "total_timesteps": 320, **NORMALIZE}
    train(tmp_path / "synchronous", **flags)
    train(tmp_path / "asynchronous", asynchronous=True, num_workers=1, **flags)
    assert_same(tmp_path / "synchronous", tmp_path / "asynchronous")


def test_no_two_workers_seeds_or_resumed_runs_have_the_same_noise(here, tmp_path, monkeypatch):
    """Run 3 is stopped at once: steps that nobody has reported count, too."""
    noise, drawn, seeds = a2c.Agent.noise, [], []
    Recorder.stop = 8
    monkeypatch.setattr(a2c.Agent, "noise", lambda *given: drawn.append(noise(*given)) or drawn[-1])
    for seed, resume, step in ((1, 0, 64), (1, 1, 128), (2, 0, 64), (3, 0, 64), (3, 1, 128)):
        stops = seed == 3 and not resume
        here.leave = lambda _, stops=stops: stops and os.kill(os.getpid(), signal.SIGTERM)
        with suppress(SystemExit):
            train(tmp_path / str(seed), asynchronous=True, num_workers=2, seed=seed, resume=resume > 0)
        assert saved(tmp_path / str(seed))["step"] == step
        assert saved(tmp_path / str(seed))["optimizer"]["state"][0]["step"] == step / 32
        seeds += [env.seed for env in Recorder.copies[4:12]]
    assert len(set(seeds)) == 5 * 2 * 4
    assert np.shape(drawn) == (5 * 2 * 2, 8, 4, 1)  # the second rollout was interrupted
    assert len(np.unique(drawn)) > 0.99 * np.size(drawn)


TWO = {"asynchronous": True, "num_workers": 2, "num_envs": 2, "num_steps": 2, **NORMALIZE}


def start(flags, *words, cwd, **environ):
    flags = {"hidden_size": 16, "env_id": "test_a2c:Recorder-v0", "device": "cpu", "eval_episodes": 0} | flags
    line = [sys.executable, *words, a2c.__file__]
    for name, value in flags.items():
        line += [f"--{name}".replace("_", "-"), *[str(value)] * (value is not True)]
    environ |= {"PYTHONPATH": f"{Path(__file__).parent}:{Path(a2c.__file__).parent}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(line, cwd=cwd, env=os.environ | environ, **pipes)


def assert_gone(record):
    """No process that wrote into this file is there any more, but this one."""
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids(record)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_workers_lose_nothing(tmp_path, monkeypatch):
    """Counts and statistics are those of all that their environments did; each episode is logged once."""
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    train(tmp_path / "run", total_timesteps=800, log_interval=1, anneal_lr=False, **TWO)
    state, found = saved(tmp_path / "run"), [x for x in records(tmp_path / "record") if x[0] != os.getpid()]
    steps, seeds = [x[3:] for x in found if x[2] == "step"], [x[3] for x in found if x[2] == "reset" and x[3]]
    assert len({pid for pid, _, what, *_ in found if what == "step"}) == 2
    assert len(set(seeds)) == len(seeds) == 4
    assert state["step"] == len(steps) in (800, 804)
    assert state["iteration"] == state["optimizer"]["state"][0]["step"] == state["step"] / 4
    assert state["agent"]["obs_norm.count"][0] == state["return_norm"]["count"] == state["step"]
    np.testing.assert_allclose(state["agent"]["obs_norm.mean64"], np.mean([obs for obs, *_ in steps], 0))
    np.testing.assert_allclose(state["agent"]["obs_norm.var"], np.var([obs for obs, *_ in steps], 0))
    curves = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    points = curves.Scalars("charts/episodic_return")
    returns = sorted(total for *_, total, done in steps if done)
    np.testing.assert_allclose(sorted(x.value for x in points), returns, rtol=1e-5)


@pytest.mark.parametrize("how", ["raise", "9", "locked"])
def test_a_worker_that_fails_or_dies_ends_the_run(how, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("STRIKE", f"50 {how}")
    raised = a2c.multiprocessing.ProcessRaisedException, "the environment broke"
    error, words = raised if how == "raise" else (SystemExit, r"(?m)^1$")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the run does not end"))
    signal.alarm(30)
    with pytest.raises(error, match=words):
        train(tmp_path / "run", total_timesteps=10**6, checkpoint_every=100, log_interval=1, **TWO)
    signal.alarm(0)
    assert how == "raise" or "a2c: a worker of A3C ended" in capsys.readouterr().err
    assert_gone(tmp_path / "record")
    assert saved(tmp_path / "run")["step"] >= 100  # what was saved before is there


def test_sigterm_leaves_a_checkpoint_and_no_process(tmp_path, here):
    """And the run goes on from there."""
    record, flags = tmp_path / "record", TWO | {"total_timesteps": 10**6, "checkpoint_every": 0}
    flags |= {"run_dir": str(tmp_path / "run"), "resume": True}
    with start(flags, cwd=tmp_path, RECORD=str(record), CHILD="yes") as child:
        while not record.exists() or len(records(record)) < 400:
            assert child.poll() is None
            time.sleep(0.02)
        os.killpg(child.pid, signal.SIGTERM)  # as Ctrl-C: to the workers and their environments' processes, too
        _, err = child.communicate(timeout=30)
    assert sum(what == "close" for _, _, what, *_ in records(record)) == 3 * 2
    state = saved(tmp_path / "run")
    assert child.returncode == 143
    assert err.startswith(f"a2c: stopped at step {state['step']:,}; add --run-dir {tmp_path}")
    assert err.count("\n") == 1
    assert_gone(record)
    counts = 4 * state["optimizer"]["state"][0]["step"], state["agent"]["obs_norm.count"][0]
    assert 0 < state["step"] == counts[0] == counts[1]
    assert state["step"] <= state["return_norm"]["count"] <= state["step"] + 2 * 4
    Recorder.stop = 2  # both workers have done one rollout more
    here.prepare = lambda: torch.testing.assert_close(dict(here.agent.state_dict()), dict(state["agent"]))
    train(**flags)
    assert saved(flags["run_dir"])["step"] == state["step"] + 2 * 4


def test_workers_end_with_their_parent(tmp_path):
    """SIGKILL leaves it no time to tell them."""
    record, flags = tmp_path / "record", TWO | {"total_timesteps": 10**6, "run_dir": str(tmp_path / "run")}
    with start(flags, cwd=tmp_path, RECORD=str(record)) as child:
        while not record.exists() or len(records(record)) < 100:
            assert child.poll() is None
            time.sleep(0.02)
        child.kill()
    assert_gone(record)


def test_torchrun_is_the_single_process(tmp_path):
    """To rounding, although all stopped in the third of eight iterations: the second process got a signal."""
    flags = {"num_envs": 4, "num_steps": 8, "total_timesteps": 256, "checkpoint_every": 96, "log_interval": 1}
    flags |= ALL | {"max_grad_norm": 100}  # so that a wrong length shows
    environ = {"RECORD": str(tmp_path / "record"), "STRIKE": "20 15", "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    with start(flags, *torchrun, cwd=tmp_path, **environ) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode != 0
    assert out.count("from step 0") == 1
    (run_dir,) = (tmp_path / "runs/test_a2c:Recorder-v0/a2c").iterdir()
    assert f"a2c: stopped at step 96; add --run-dir {run_dir.relative_to(tmp_path)}" in err
    assert err.count("a2c: stopped") == 1
    assert saved(run_dir)["step"] == 96
    with start(flags | {"run_dir": run_dir, "resume": True}, *torchrun, cwd=tmp_path, **environ) as child:
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert out.count("from step 96") == out.count("step 256") == 1
    train(tmp_path / "single", **flags)
    assert_same(tmp_path / "single", run_dir, tolerance=1e-5)
    assert_gone(tmp_path / "record")
    assert {path.parent for path in tmp_path.rglob("checkpoint.pt")} == {tmp_path / "single", run_dir}


@pytest.mark.parametrize("flags", [{"num_envs": 3}, {"asynchronous": True, "device": "auto"}])
def test_torchrun_refuses_what_it_cannot_share(flags, tmp_path, monkeypatch, capsys):
    """With a GPU, PyTorch's default backend would know no tensors of the CPU, where --device cpu has all."""
    fakes = {"is_torchelastic_launched": True, "get_rank": 0, "get_world_size": 2}
    for name, value in fakes.items():
        monkeypatch.setattr(a2c.dist, name, lambda value=value: value)
    monkeypatch.setattr(a2c.dist, "init_process_group", (backends := []).append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"^2$"):
        train(tmp_path / "run", **flags)
    assert "torchrun needs a --num-envs that 2 divides" in capsys.readouterr().err
    assert backends == ["cpu:gloo,cuda:nccl" if "device" in flags else "gloo"]
    assert not (tmp_path / "run").exists()


def test_a_single_advantage_cannot_be_normalised():
    with pytest.raises(ValueError, match="--normalize-advantages"):
        a2c.Args(num_steps=1, num_envs=1, normalize_advantages=True)
