"""Proves that a2c.py takes the step that it says: as PPO restricted, over processes, and asynchronously.

What it shares with ppo.py (advantages, networks, rollouts) has the same text there, and is proved in test_ppo.py.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

import a2c
import ppo

ROOT = Path(__file__).resolve().parent.parent
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["categorical", "gaussian"])


class Fragile(gym.Env):
    """Ends its process, or raises, at its 1500th step; workers find it as test_a2c:Raises-v0 and test_a2c:Dies-v0."""

    def __init__(self, how: str) -> None:
        self.how, self.steps = how, 0
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        if self.steps == 1500:
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the environment broke")
        return np.zeros(2, np.float32), 1.0, self.steps % 10 == 0, False, {}


for how in ("Raises", "Dies"):
    gym.register(f"{how}-v0", "test_a2c:Fragile", kwargs={"how": how.lower()})


def random_case(space: gym.Space) -> tuple[a2c.Agent, list[Tensor], dict[str, Any]]:
    """An agent with parameters far from 0, a rollout of 5 steps in 3 environments, in float64, and flags."""
    torch.manual_seed(0)
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (3,)), action_space=space)
    agent = a2c.Agent(env, 6, 0.0).double()
    for param in agent.parameters():
        param.data = 0.7 * torch.randn(param.shape, dtype=torch.float64)
    obs, next_obs = torch.randn(2, 5, 3, 3).double()
    actions = torch.randint(3, (5, 3)) if space is DISCRETE else torch.randn(5, 3, 2).double()
    dones = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]).bool()
    terminated = dones & torch.tensor([True, False, True])  # the second environment runs into time limits
    rollout = [obs, next_obs, actions, 2 * torch.randn(5, 3).double() + 1, terminated, dones]
    flags = {"gamma": 0.9, "gae_lambda": 0.8, "vf_coef": 0.3, "ent_coef": 0.2, "normalize_advantages": False}
    return agent, rollout, flags


def state(run_dir: Path, *parts: str) -> list[Tensor]:
    """The tensors of these parts of the checkpoint, in order."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return [x for x in torch.utils._pytree.tree_leaves([saved[part] for part in parts]) if isinstance(x, Tensor)]


def train(module: Any, run_dir: Path, **flags: Any) -> dict[str, float]:
    short = {"eval_episodes": 0, "checkpoint_every": 0, "device": "cpu", "num_envs": 4, "num_steps": 8}
    return module.train(module.Args(**short | {"run_dir": str(run_dir)} | flags))


# -- the loss ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("normalize_advantages", [False, True])
def test_loss_sample_by_sample(space: gym.Space, normalize_advantages: bool):
    agent, (obs, next_obs, actions, rewards, terminated, dones), flags = random_case(space)
    flags |= {"normalize_advantages": normalize_advantages}
    loss, metrics = a2c.a2c_loss(agent, obs, next_obs, actions, rewards, terminated, dones, **flags)
    with torch.no_grad():
        values, next_values = (agent.critic.net(x)[..., 0] for x in (obs, next_obs))
    advantages = torch.zeros(5, 3).double()
    for i in range(3):
        later = 0.0
        for t in reversed(range(5)):
            td_error = rewards[t, i] - values[t, i] + (0.0 if terminated[t, i] else 0.9 * next_values[t, i])
            later = advantages[t, i] = td_error + (0.0 if dones[t, i] else 0.9 * 0.8 * later)
    returns, weights = advantages + values, advantages
    if normalize_advantages:
        weights = (advantages - advantages.numpy().mean()) / advantages.numpy().std()
    out = agent.actor.net(obs)
    pi = Categorical(logits=out) if space is DISCRETE else None
    pi = pi or MultivariateNormal(out, torch.diag(agent.actor.log_std.exp().square()))
    policy_loss = -sum((weights * pi.log_prob(actions)).flatten()) / 15
    value_loss = sum((v - g) ** 2 for v, g in zip(agent.critic.net(obs).flatten(), returns.flatten(), strict=True)) / 15
    expected = policy_loss + 0.3 * value_loss - 0.2 * pi.entropy().mean()
    params = list(agent.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(x, params) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7 if normalize_advantages else 1e-12)
    torch.testing.assert_close(metrics["policy_loss"], policy_loss, rtol=0, atol=1e-7)
    torch.testing.assert_close(metrics["value_loss"], value_loss)
    torch.testing.assert_close(metrics["entropy"], pi.entropy().mean())
    explained = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
    torch.testing.assert_close(metrics["explained_variance"].item(), explained, rtol=0, atol=1e-7)


def test_each_part_of_the_loss_trains_its_own_network():
    """That advantages and returns are constants is in the gradients of the test before."""
    agent, rollout, flags = random_case(BOX)
    names, params = zip(*agent.named_parameters(), strict=True)
    for vf_coef, trained in ((0.0, "actor"), (1e9, "critic")):
        loss, _ = a2c.a2c_loss(agent, *rollout, **flags | {"vf_coef": vf_coef, "ent_coef": 0.0})
        for name, grad in zip(names, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            share = float(grad.abs().sum()) / max(vf_coef, 1.0)
            assert (share > 1e-6) == name.startswith(trained), name


# -- PPO with one epoch, one minibatch and no clipping -----------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_is_ppo_with_one_step_a_rollout(env_id: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Step for step over ten updates, normalisation of observations and rewards, annealing and all."""
    flags = {
        "env_id": env_id, "num_steps": 128, "total_timesteps": 5120, "learning_rate": 1e-3, "gae_lambda": 0.9,
        "ent_coef": 0.01, "normalize_advantages": False, "normalize_obs": True, "normalize_rewards": True,
    }  # fmt: skip
    ours = train(a2c, tmp_path / "a2c", optimizer=optimizer, **flags)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the order in a minibatch of all does not matter: no draw
    if optimizer == "rmsprop":
        monkeypatch.setattr(torch.optim, "Adam", lambda params, fused, **more: torch.optim.RMSprop(params, **more))
    theirs = train(ppo, tmp_path / "ppo", update_epochs=1, num_minibatches=1, clip_coef=1e9, **flags)
    for a, b in zip(*(state(tmp_path / name, "agent", "return_norm") for name in ("a2c", "ppo")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for tag in ("losses/value_loss", "losses/entropy", "losses/grad_norm", "charts/learning_rate"):
        assert ours[tag] == pytest.approx(theirs[tag], rel=1e-3)
    moved = state(tmp_path / "a2c", "agent")[-1] - a2c.Agent(a2c.make_envs(env_id, 1)[0], 64, 0.0).critic.net[4].bias
    assert moved.abs().max() > 1e-3


def test_short_rollouts_share_a_point_in_the_log(tmp_path: Path):
    """4 environments x 8 steps: 16 updates are an iteration; its metrics are means, its episodes where they ended."""
    points = []

    class Spy(a2c.Run):
        def end_iteration(self, steps: int, ended: list, metrics: dict[str, float]) -> None:
            points.append((self.step, steps, ended))
            super().end_iteration(steps, ended, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a2c, "Run", Spy)
        train(a2c, tmp_path / "run", total_timesteps=2048)
    assert [(step, steps) for step, steps, _ in points] == [(k, 512) for k in (0, 512, 1024, 1536)]
    ended = [step + offset for step, _, episodes in points for offset, _, _ in episodes]
    assert all(a < b for a, b in pairwise(ended))
    lengths = sum(length for _, _, episodes in points for _, _, length in episodes)
    assert 1024 < lengths <= 2048
    assert state(tmp_path / "run", "optimizer")[0].item() in (64, 0)


def test_a_graph_updates_the_statistics():
    """PyTorch 2.13 forgets what a graph writes into a float64 without dimensions: there must be none."""
    torch.manual_seed(0)
    eager, compiled = a2c.RunningNorm(1), a2c.RunningNorm(1)
    update = torch.compile(compiled.update, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(5, 3)
        eager.update(x)
        update(x)
    assert eager.count == 30
    for name, buffer in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], buffer, msg=name)


# -- several processes -------------------------------------------------------------------------------------------------

FAILS_ON_RANK_1 = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import a2c
collect = a2c.Collector.collect
def broken(self, agent, num_steps, step):
    if os.environ["RANK"] == "1" and step >= 256:
        raise RuntimeError("rank 1 broke")
    return collect(self, agent, num_steps, step)
a2c.Collector.collect = broken
a2c.train(a2c.Args(run_dir=sys.argv[3], total_timesteps=100_000))
"""

STOPS_RANK_1 = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import a2c
collect = a2c.Collector.collect
def struck(self, agent, num_steps, step):
    if os.environ["RANK"] == "1" and step == int(os.environ["STRIKE"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return collect(self, agent, num_steps, step)
a2c.Collector.collect = struck
a2c.train(a2c.tyro.cli(a2c.Args))
"""


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that two processes have in common with one: all but those of the clock."""
    found = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(found.Tags()["scalars"]) - {"charts/SPS"}
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in tags}


def command(*words: str, processes: int = 0, timeout: int = 240) -> subprocess.CompletedProcess:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environ |= {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    line = [sys.executable, *run, *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=environ)


@pytest.mark.parametrize(("script", "steps"), [("a2c", 5120), ("ppo", 1024)])
def test_two_processes_with_half_of_the_environments_are_one_with_all(
    script: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same statistics, curves, and, but for the order of sums, parameters. PPO: before its shuffles draw apart.

    A2C: although all episodes restart after the second iteration, and both processes were stopped after the fourth.
    """
    more = "" if script == "a2c" else "--update-epochs 1 --num-minibatches 1 --no-normalize-advantages"
    line = f"{script}.py --env-id Pendulum-v1 --num-envs 4 --num-steps 256 --total-timesteps {steps} --eval-episodes 1 "
    line += f"--normalize-obs --normalize-rewards --learning-rate 1e-4 --device cpu {more}"
    line += " --checkpoint-every 2048 --resume"
    if script == "a2c":
        (tmp_path / "driver.py").write_text(STOPS_RANK_1)
        words = (str(tmp_path / "driver.py"), *line.split()[1:], "--run-dir", str(tmp_path / "two"))
        monkeypatch.setenv("STRIKE", "3072")
        assert command(*words, processes=2).returncode != 0
        assert torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["step"] == 4096
    for name, processes in (("one", 0), ("two", 2)):
        done = command(*line.split(), "--run-dir", str(tmp_path / name), processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("evaluated return") == 1  # one process speaks for all
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == steps
    for part in ("agent", "return_norm"):
        for name, x in one[part].items():
            torch.testing.assert_close(x, two[part][name], rtol=1e-4, atol=1e-5, msg=name)
    assert one["agent"]["obs_norm.count"] == two["agent"]["obs_norm.count"] == steps
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert one.keys() == two.keys()
    for tag in one.keys() - ({"losses/explained_variance"} if script == "a2c" else set()):
        points = one[tag]
        np.testing.assert_allclose(two[tag], points, rtol=1e-3, atol=1e-3, err_msg=tag)


def test_a_signal_to_the_second_process_stops_both_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "driver.py").write_text(STOPS_RANK_1)
    monkeypatch.setenv("STRIKE", "0")
    words = str(tmp_path / "driver.py"), "--num-envs", "4", "--num-steps", "256", "--run-dir", str(tmp_path / "run")
    assert command(*words, "--device", "cpu", "--checkpoint-every", "0", processes=2).returncode != 0
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1024


def test_a_process_that_fails_ends_all(tmp_path: Path):
    (tmp_path / "driver.py").write_text(FAILS_ON_RANK_1)
    paths = str(ROOT), str(Path(__file__).parent), str(tmp_path / "run")
    done = command(str(tmp_path / "driver.py"), *paths, processes=2, timeout=120)
    assert done.returncode != 0
    assert "rank 1 broke" in done.stderr


def test_environments_must_be_divisible_among_processes(tmp_path: Path):
    done = command("a2c.py", "--num-envs", "3", "--run-dir", str(tmp_path / "run"), processes=2)
    assert done.returncode != 0
    assert "--num-envs 3 cannot be divided among 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


# -- asynchronous ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_one_worker_is_the_synchronous_run(optimizer: str, tmp_path: Path):
    """Bit for bit: parameters, statistics of optimiser, observations and rewards."""
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 1280, "normalize_obs": True, "normalize_rewards": True}
    flags |= {"optimizer": optimizer}
    train(a2c, tmp_path / "synchronous", **flags)
    train(a2c, tmp_path / "asynchronous", asynchronous=True, num_workers=1, **flags)
    parts = "agent", "optimizer", "return_norm"
    one, other = (state(tmp_path / name, *parts) for name in ("synchronous", "asynchronous"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_workers_share_parameters_and_optimizer(optimizer: str, tmp_path: Path):
    """Not one update of three workers is lost: the shared count of steps, and the shared moments, have all of them."""
    flags = {"optimizer": optimizer, "total_timesteps": 3000, "asynchronous": True, "num_workers": 3, "num_envs": 1}
    train(a2c, tmp_path / "run", normalize_obs=True, **flags)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 3000 <= saved["step"] < 3000 + 3 * 512
    assert saved["optimizer"]["state"][0]["step"] == saved["step"] / 8
    assert saved["agent"]["obs_norm.count"] == saved["step"]


@pytest.mark.parametrize("env_id", ["Raises-v0", "Dies-v0"])
def test_a_worker_that_fails_ends_the_run(env_id: str, tmp_path: Path):
    run_dir, start = tmp_path / "run", time.perf_counter()
    words = f"--env-id test_a2c:{env_id} --asynchronous --num-workers 2 --num-envs 1 --checkpoint-every 128 --run-dir"
    done = command("a2c.py", *words.split(), str(run_dir), timeout=120)
    assert done.returncode == 1
    assert "a worker ended with status" in done.stderr
    assert ("the environment broke" in done.stderr) == (env_id == "Raises-v0")
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["step"] >= 128
    assert time.perf_counter() - start < 100


def test_asynchronous_run_is_stopped_and_resumed(tmp_path: Path):
    """Ctrl-C goes to all processes of a terminal: the workers leave it to the main one, which saves, and ends them."""
    words = f"a2c.py --asynchronous --num-envs 1 --total-timesteps 6000 --run-dir {tmp_path / 'run'} --resume".split()
    line = [sys.executable, *words, "--eval-episodes", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, start_new_session=True, **pipes) as child:
        while "steps/s" not in child.stdout.readline():
            pass
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.count("\n") == 1
    assert "--resume" in err
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)  # is there a worker left?
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process of the run is left")
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 6000
    done = command(*line[1:])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"from step {step:,}" in done.stdout
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 6000
    again = command(*line[1:])  # a finished run has nothing left to do
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]


# -- learning ----------------------------------------------------------------------------------------------------------


def test_learns_cartpole(tmp_path: Path):
    result = train(a2c, tmp_path / "run", num_envs=8, num_steps=5, total_timesteps=30_000, eval_episodes=10)
    assert result["eval/episodic_return"] > 100  # about 10 to 30 without learning
