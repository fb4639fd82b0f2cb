"""Proves that ddpg.py follows the deterministic policy gradient, explores as it says, and trains in the paper's order.

The gradient is compared with that of the exact objective, on a linear-quadratic problem that is solved by hand and on
a tabular one. Buffer, critic, stepper and `frozen` are those of off_policy_ac.py, word for word, and proved there.
"""

import math
import tempfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import ddpg

GAMMA = 0.9
ASYMMETRIC = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def new_agent(obs_dim: int, space: gym.Space, hidden_size: int = 5) -> ddpg.DDPGAgent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (obs_dim,)), action_space=space)
    return ddpg.DDPGAgent(env, hidden_size)


def random_agent(obs_dim: int, space: gym.Space) -> ddpg.DDPGAgent:
    agent = new_agent(obs_dim, space).double()
    for param in agent.parameters():
        param.data = 0.5 * torch.randn_like(param)
    return agent


# -- the deterministic policy gradient ---------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Q^μ(s, a) = −(q s² + c a²) − γ P (A s + B a)², where −P s² is the value of a = −k s."""

    A, B, q, c = 0.9, 0.5, 1.0, 0.3

    def __init__(self, k: float) -> None:
        super().__init__()
        self.P = (self.q + self.c * k**2) / (1 - GAMMA * (self.A - self.B * k) ** 2)

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        cost = self.q * s**2 + self.c * a**2 + GAMMA * self.P * (self.A * s + self.B * a) ** 2
        return -cost.squeeze(-1)


@pytest.mark.parametrize("k", [0.0, 0.4, 1.3, 2.0])
def test_theorem_on_a_linear_quadratic_problem(k: float):
    """s' = A s + B a, a = −k s: J = −P(k) s_0², whose slope is Σ_t γ^t ∇_k μ(s_t) ∇_a Q(s_t, a) at a = μ(s_t)."""
    actor = nn.Linear(1, 1, bias=False).double()
    actor.weight.data.fill_(-k)
    agent = SimpleNamespace(obs_norm=lambda x: x, actor=actor, critic=Quadratic(k))
    x = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    A, B, q, c = Quadratic.A, Quadratic.B, Quadratic.q, Quadratic.c
    J = -((q + c * x**2) / (1 - GAMMA * (A - B * x) ** 2)) * 1.5**2
    total, s = 0.0, torch.tensor([[1.5]]).double()
    for t in range(400):
        loss, _ = ddpg.deterministic_policy_loss(agent, s)
        total = total - GAMMA**t * torch.autograd.grad(loss, actor.weight)[0].item()
        s = A * s + B * actor(s).detach()
    close(-total, torch.autograd.grad(J, x)[0], 1e-9)  # the weight is −k
    assert abs(total) > 0.1


def test_theorem_on_a_tabular_problem():
    """Three states; P(s'|s,a) and r(s,a) vary with a number a; J by solving, its gradient by autograd."""
    first, second = torch.rand(2, 3, 3).double().softmax(-1)
    start, pay = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, -0.5, 2.0]).double()
    theta = torch.tensor([0.3, -0.4, 0.8]).double().requires_grad_()

    def transition(a: Tensor) -> Tensor:
        share = (1 + a.tanh()) / 2
        return share.unsqueeze(-1) * first + (1 - share).unsqueeze(-1) * second

    def reward(a: Tensor) -> Tensor:
        return pay * a - a**2

    eye = torch.eye(3).double()
    values = torch.linalg.solve(eye - GAMMA * transition(theta), reward(theta))
    (expected,) = torch.autograd.grad(start @ values, theta)
    V, P = values.detach(), transition(theta.detach())
    occupancy = torch.linalg.solve(eye - GAMMA * P.T, start)

    class Critic(nn.Module):
        def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
            a = actions.expand(-1, 3)  # an action in every state, of which obs takes one
            q = torch.stack([reward(row) + GAMMA * transition(row) @ V for row in a])
            return (obs * q).sum(-1)

    actor = nn.Linear(3, 1, bias=False).double()
    actor.weight.data = theta.detach().unsqueeze(0).clone()
    agent, total = SimpleNamespace(obs_norm=lambda x: x, actor=actor, critic=Critic()), 0.0
    for s in range(3):
        loss, _ = ddpg.deterministic_policy_loss(agent, eye[s : s + 1])
        total = total - occupancy[s] * torch.autograd.grad(loss, actor.weight)[0][0]
    close(total, expected)
    assert expected.norm() > 0.3


def test_gradient_by_hand_and_it_is_a_mean():
    """μ = tanh(W s), Q = w·[s, a]: −mean ∇_W μ ∇_a Q = −mean (1 − μ²) w_a sᵀ; rows that come twice change nothing."""
    agent = random_agent(3, spaces.Box(-1, 1, (2,)))
    agent.actor.net, agent.critic.net = nn.Linear(3, 2).double(), nn.Linear(5, 1).double()
    agent.obs_norm.update(torch.randn(20, 3) + 1)
    raw = torch.randn(6, 3).double()
    obs = agent.obs_norm(raw).numpy()
    W, b = (x.detach().numpy() for x in agent.actor.net.parameters())
    w = agent.critic.net.weight.detach().numpy()[0, 3:]
    slope = (1 - np.tanh(obs @ W.T + b) ** 2) * w
    loss, metrics = ddpg.deterministic_policy_loss(agent, raw)
    grads = torch.autograd.grad(loss, list(agent.actor.net.parameters()))
    close(grads[0], -slope.T @ obs / 6)
    close(grads[1], -slope.mean(0))
    close(metrics["policy_loss"], -agent.critic(agent.obs_norm(raw), agent.actor(agent.obs_norm(raw))).mean())
    twice, _ = ddpg.deterministic_policy_loss(agent, raw.repeat(2, 1))
    close(torch.autograd.grad(twice, agent.actor.net.weight)[0], -slope.T @ obs / 6)


def test_target_and_critic_loss_by_hand():
    agent = random_agent(3, spaces.Box(-1, 1, (2,)))
    (obs, next_obs), actions = torch.randn(2, 4, 3).double(), torch.rand(4, 2).double()
    rewards, terminated = torch.tensor([1.0, -2.0, 3.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
    loss, metrics = ddpg.deterministic_q_loss(agent, obs, actions, rewards, next_obs, terminated, gamma=GAMMA)
    expected, q = 0.0, []
    for i in range(4):
        y = float(rewards[i])
        if not terminated[i]:
            a = torch.tanh(agent.target_actor.net(next_obs[i]))
            y += GAMMA * float(agent.target_critic.net(torch.cat([next_obs[i], a])).detach())
        q.append(float(agent.critic.net(torch.cat([obs[i], actions[i]])).detach()))
        expected += (q[-1] - y) ** 2 / 4
    close(loss, expected)
    close(metrics["q_values"], np.mean(q))
    with pytest.raises(AssertionError):
        ddpg.q_targets(rewards, terminated, rewards.unsqueeze(-1), GAMMA)


def test_each_loss_trains_its_own_network():
    agent, obs, actions = random_agent(3, ASYMMETRIC), torch.randn(6, 3).double(), torch.rand(6, 2).double()
    n = torch.zeros(6).double()
    loss, _ = ddpg.deterministic_q_loss(agent, obs, actions, n, obs, n, gamma=0.9)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(loss, list(agent.critic.parameters()), retain_graph=True))
    others = [*agent.actor.parameters(), *agent.target_actor.parameters(), *agent.target_critic.parameters()]
    assert all(x is None for x in torch.autograd.grad(loss, others, allow_unused=True))
    loss, _ = ddpg.deterministic_policy_loss(agent, obs)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(loss, list(agent.actor.parameters())))


# -- actions and noise -------------------------------------------------------------------------------------------------


def test_actions_span_the_bounds_of_an_asymmetric_box():
    agent, to_env = random_agent(3, ASYMMETRIC).float(), ddpg.action_map(ASYMMETRIC)
    obs = np.float32(np.random.default_rng(0).normal(size=(5, 3)))
    mean = agent.actor(torch.from_numpy(obs)).detach()
    close(agent.policy()(obs, 0.0), mean, 1e-6)
    close(np.stack(to_env(agent.policy()(obs, 0.0))), np.array([1, 5]) + np.array([2, 5]) * mean.numpy(), 1e-5)
    for sign, bound in ((1, ASYMMETRIC.high), (-1, ASYMMETRIC.low)):
        agent.actor.net[4].bias.data.fill_(sign * 1e3)
        close(np.stack(to_env(agent.policy()(obs, 0.0))), np.tile(bound, (5, 1)), 1e-6)
        agent.actor.net[4].bias.data.zero_()
        noise = np.full((5, 2), sign * 100.0, np.float32)
        assert np.array_equal(agent.policy()(obs, noise), np.full((5, 2), sign, np.float32))


def test_the_first_policy_is_near_the_middle():
    agent = new_agent(3, ASYMMETRIC, 256)
    assert agent.actor(3 * torch.randn(500, 3)).abs().max() < 0.2


@pytest.mark.parametrize("correlation", [0.0, 0.86])
def test_noise_has_its_deviation_and_correlation_in_each_dimension(correlation: float):
    """Stationary from the first step of an episode on; lag-1 autocorrelation e^−θ; independent of the others."""
    n, sigma = 20_000, 0.3
    noise, dones = torch.full((n, 3), 50.0), torch.ones(n, dtype=torch.bool)
    history = []
    for _ in range(4):
        noise = ddpg.next_noise(noise, dones, torch.randn(n, 3), sigma, correlation)
        history.append(noise)
        dones = torch.zeros(n, dtype=torch.bool)
    for x in history:
        assert x.shape == (n, 3)
        assert x.mean().abs() < 0.01
        assert x.std(0) == pytest.approx([sigma] * 3, rel=0.03)
        assert (torch.corrcoef(x.T) - torch.eye(3)).abs().max() < 0.03
    for lag in (1, 2, 3):
        found = torch.corrcoef(torch.stack([history[0][:, 1], history[lag][:, 1]]))[0, 1]
        assert abs(found - correlation**lag) < 0.03


def test_noise_by_hand_and_it_begins_anew_where_an_episode_does():
    noise, draw = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    new = ddpg.next_noise(noise, torch.tensor([False, True]), draw, 0.2, 0.6)
    close(new, [[0.6 + 0.2 * 0.8 * 0.5, 1.2 - 0.2 * 0.8], [0.4, 0.0]], 1e-6)
    theta, sigma = 0.15, 0.2  # dx = −θ x dt + σ dW has this correlation and deviation
    assert math.exp(-theta) == pytest.approx(0.86, abs=0.001)
    assert sigma / math.sqrt(2 * theta) == pytest.approx(0.37, abs=0.005)


# -- the shipped loop --------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that train() did."""

    kind: str
    before: dict[str, Tensor]  # the agent
    given: tuple
    after: dict[str, Tensor]


def run_train(**flags: Any) -> tuple[list[Event], Any]:
    """All that the shipped train() did in order, in float64."""
    events, seen = [], SimpleNamespace()
    make_update, polyak, new, noise = ddpg.make_update, ddpg.polyak, ddpg.DDPGAgent, ddpg.next_noise
    step, add, sample = ddpg.Stepper.step, ddpg.ReplayBuffer.add, ddpg.ReplayBuffer.sample

    def copy() -> dict[str, Tensor]:
        return {name: x.clone() for name, x in seen.agent.state_dict().items()}

    def spy(kind: str, call: Any, *given: Any) -> Any:
        before, known = copy(), tuple(x.copy() if isinstance(x, np.ndarray) else x for x in given)
        result = call(*given)
        events.append(Event(kind, before, (*known, result), copy()))
        return result

    def doubles(*given: Any) -> list[Tensor]:
        return [x.double() for x in sample(*given)]

    def spy_agent(*args: Any) -> Any:
        seen.agent = new(*args).double()
        return seen.agent

    def spy_make_update(loss: Any, *args: Any) -> Any:
        update = make_update(loss, *args)
        return lambda *batch: spy(loss.func.__name__, update, *batch)

    small = {"hidden_size": 5, "batch_size": 7, "learning_starts": 10, "log_interval": 20, "total_timesteps": 60}
    small |= {"eval_episodes": 0, "checkpoint_every": 0, "device": "cpu", "num_envs": 2, "normalize_rewards": False}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(ddpg, "DDPGAgent", spy_agent)
        patch.setattr(ddpg, "make_update", spy_make_update)
        patch.setattr(ddpg, "polyak", lambda *x: spy("polyak", polyak, *x))
        patch.setattr(ddpg, "next_noise", lambda *x: spy("noise", noise, *x))
        patch.setattr(ddpg.Stepper, "step", lambda *x: spy("step", step, *x))
        patch.setattr(ddpg.ReplayBuffer, "add", lambda *x: spy("add", add, *x))
        patch.setattr(ddpg.ReplayBuffer, "sample", lambda *x: spy("sample", doubles, *x))
        ddpg.train(ddpg.Args(run_dir=directory, **small | flags))
    return events, seen.agent


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


class Both(gym.Env):
    """Actions of two dimensions, in bounds that are not ±1; ends in both ways."""

    observation_space, action_space = spaces.Box(-10, 10, (3,)), ASYMMETRIC

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.end = 0, int(self.np_random.integers(3, 9))
        return self.np_random.normal(2, 3, 3).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(np.float32(action))
        self.t += 1
        over, obs = self.t == self.end, self.np_random.normal(2, 3, 3).astype(np.float32)
        return obs, float(action.sum()), over and self.end % 2 == 0, over and self.end % 2 == 1, {}


gym.register("ddpg/Both-v0", Both)


@pytest.mark.parametrize("anneal_lr", [False, True])
def test_the_loop_can_be_taken_by_a_second_road(anneal_lr: bool):
    """Each gradient step with plain tensors, backward() and Adam, on the batch that was drawn; critic first."""
    flags = {"env_id": "ddpg/Both-v0", "gamma": GAMMA, "tau": 0.3, "num_updates": 2, "max_grad_norm": 5.0}
    events, agent = run_train(learning_rate=3e-3, q_learning_rate=5e-3, anneal_lr=anneal_lr, **flags)
    once = ["noise", "step", "add"]
    update = ["sample", "deterministic_q_loss", "deterministic_policy_loss", "polyak", "polyak"]
    assert [event.kind for event in events] == once * 4 + (once + 2 * update) * 26
    agent.load_state_dict(events[0].before)
    nets = {"deterministic_q_loss": "critic.", "deterministic_policy_loss": "actor."}
    copies = {kind: deepcopy(list(getattr(agent, net[:-1]).parameters())) for kind, net in nets.items()}
    rates = {"deterministic_q_loss": 5e-3, "deterministic_policy_loss": 3e-3}
    optimizers = {kind: torch.optim.Adam(copies[kind], rates[kind]) for kind in nets}
    for k, event in enumerate(events):
        if event.kind not in nets:
            continue
        agent.load_state_dict(event.before)
        sample = next(x for x in reversed(events[:k]) if x.kind == "sample")
        obs, actions, rewards, next_obs, terminated = sample.given[-1]
        for one, other in zip(event.given[:-1], (obs, actions, rewards, next_obs, terminated), strict=False):
            assert torch.equal(one, other)
        norm, losses = agent.obs_norm, []
        for i in range(7):
            s, after = ((x[i] * norm.scale + norm.shift).clamp(-10, 10) for x in (obs, next_obs))
            if event.kind == "deterministic_policy_loss":
                losses.append(-agent.critic.net(torch.cat([s, agent.actor.net(s).tanh()])))
            else:
                future = agent.target_critic.net(torch.cat([after, agent.target_actor.net(after).tanh()])).detach()
                y = rewards[i] + (0 if terminated[i] else GAMMA * future)
                losses.append((agent.critic.net(torch.cat([s, actions[i]])) - y) ** 2)
        net = agent.critic if event.kind == "deterministic_q_loss" else agent.actor
        grads = torch.autograd.grad(sum(losses).sum() / 7, list(net.parameters()))
        for copy, grad in zip(copies[event.kind], grads, strict=True):
            copy.grad = grad
        close(event.given[-1]["losses/grad_norm"], nn.utils.clip_grad_norm_(copies[event.kind], 5.0), 1e-8)
        iteration = (len(of_kind(events[:k], "step")) - 1) // 10  # 20 steps of 2 environments
        optimizers[event.kind].param_groups[0]["lr"] = rates[event.kind] * (1 - anneal_lr * iteration / 3)
        optimizers[event.kind].step()
        for name, x in event.after.items():
            if not name.startswith(nets[event.kind]):
                assert torch.equal(x, event.before[name])
        expected = [x for name, x in event.after.items() if name.startswith(nets[event.kind])]
        for copy, x in zip(copies[event.kind], expected, strict=True):
            close(copy, x, 1e-8)


def test_statistics_scale_the_batch():
    events, _ = run_train(env_id="ddpg/Both-v0", normalize_rewards=True, normalize_obs=True)
    rewards = []
    for k, event in enumerate(events):
        if event.kind == "step":
            rewards.append(event.given[-1][0].discounted_returns)
        if event.kind == "deterministic_q_loss":
            raw = next(x for x in reversed(events[:k]) if x.kind == "sample").given[-1][2]
            close(event.given[2], raw / (torch.cat(rewards).double().numpy().var() + 1e-8) ** 0.5, 1e-5)
            seen = torch.cat([x.given[1] for x in events[:k] if x.kind == "add"]).double()
            close(event.before["obs_norm.mean"], seen.mean(0), 1e-6)
            close(event.before["obs_norm.var"], seen.var(0, correction=0), 1e-6)
    assert of_kind(events, "deterministic_q_loss")
    assert run_train(env_id="ddpg/Both-v0", normalize_obs=False)[1].obs_norm.count == 0


def test_both_targets_follow_and_share_nothing():
    events, agent = run_train(env_id="ddpg/Both-v0", tau=0.3)
    nets = (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
    pointers = [{x.data_ptr() for x in net.parameters()} for net in nets]
    assert len(set.union(*pointers)) == sum(map(len, pointers)) == 24
    for name, x in events[0].before.items():
        if name.startswith("target_"):
            assert torch.equal(x, events[0].before[name.removeprefix("target_")])
    followed = of_kind(events, "polyak")
    assert len(followed) == 52
    for first, second in zip(followed[::2], followed[1::2], strict=True):
        for name, x in second.after.items():
            old = first.before[name]
            if name.startswith("target_"):
                close(x, 0.7 * old + 0.3 * first.before[name.removeprefix("target_")], 1e-12)
                assert not torch.equal(x, old)
            else:
                assert torch.equal(x, old)


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_actions_are_uniform_at_first_then_the_policy_with_noise(correlation: float):
    flags = {"env_id": "ddpg/Both-v0", "learning_starts": 400, "total_timesteps": 600, "num_envs": 4}
    events, agent = run_train(exploration_noise=0.4, noise_correlation=correlation, **flags)
    noises, steps, added = (of_kind(events, kind) for kind in ("noise", "step", "add"))
    uniform, previous, dones = [], torch.zeros(4, 2), torch.ones(4, dtype=torch.bool)
    for t, (noise, step, add) in enumerate(zip(noises, steps, added, strict=True)):
        obs, actions, rewards, next_obs, terminated = add.given[1:6]
        new, _ = step.given[-1]
        assert torch.equal(actions, torch.from_numpy(step.given[1]))
        assert torch.equal(next_obs, new.next_obs)
        assert torch.equal(rewards, new.rewards)
        assert torch.equal(terminated, new.terminated)
        close(rewards, (actions.double() * torch.tensor([2.0, 5.0]) + torch.tensor([1.0, 5.0])).sum(-1), 1e-5)
        assert (actions.abs() <= 1).all()
        close(noise.given[0], previous)
        assert torch.equal(noise.given[1], dones)
        assert noise.given[3:5] == (0.4, correlation)
        if t < 100:
            uniform.append(actions)
        else:
            agent.load_state_dict(step.before)
            mean = agent.actor.net(agent.obs_norm(obs.double())).tanh()
            close(actions, (mean + noise.given[-1]).clamp(-1, 1), 1e-5)
        previous, dones = noise.given[-1], new.dones
    draws = torch.stack([noise.given[2] for noise in noises]).flatten(1)  # each environment and dimension has its own
    assert (torch.corrcoef(draws.T) - torch.eye(8)).abs().max() < 0.35
    uniform = torch.cat(uniform).numpy()
    assert len(uniform) == 400
    for d in range(2):
        assert np.abs(np.histogram(uniform[:, d], 4, (-1, 1))[0] / 400 - 0.25).max() < 0.09
    assert abs(np.corrcoef(uniform.T)[0, 1]) < 0.15


def test_huge_noise_stays_within_the_bounds():
    """The environment minds its bounds."""
    events, _ = run_train(env_id="ddpg/Both-v0", exploration_noise=100.0)
    actions = torch.cat([event.given[2] for event in of_kind(events, "add")[5:]])
    assert (actions.abs() == 1).all(-1).float().mean() > 0.9
    assert actions.abs().max() == 1


def test_flags_that_cannot_be_are_refused():
    for bad in ({"tau": 1.5}, {"noise_correlation": 1.5}, {"buffer_size": 3, "num_envs": 4}):
        with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
            ddpg.Args(**bad)


# -- learning ----------------------------------------------------------------------------------------------------------


class Target(gym.Env):
    """One step; the best action is 1 + 2x for what is seen, x from [-0.5, 0.5]; the pay is minus the squared error."""

    observation_space, action_space = spaces.Box(-0.5, 0.5, (1,)), spaces.Box(-1, 3, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.5, 0.5, 1).astype(np.float32)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.x, -float((action - 1 - 2 * self.x).item() ** 2), True, False, {}


gym.register("ddpg/Target-v0", Target)


@pytest.mark.parametrize("broken", [False, True])
def test_learns_a_continuous_action(broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The threshold is one that a policy which goes down the slope of Q misses."""
    loss = ddpg.deterministic_policy_loss
    if broken:
        monkeypatch.setattr(ddpg, "deterministic_policy_loss", lambda *x: (-loss(*x)[0], loss(*x)[1]))
    args = ddpg.Args(
        env_id="ddpg/Target-v0", total_timesteps=2_000, num_envs=2, hidden_size=16, learning_starts=100, batch_size=64,
        learning_rate=3e-3, q_learning_rate=3e-3, tau=0.05, device="cpu", eval_episodes=200,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (ddpg.train(args)["eval/episodic_return"] > -0.05) == (not broken)


@pytest.mark.slow
def test_learns_pendulum(tmp_path: Path):
    args = ddpg.Args(device="cpu", eval_episodes=50, run_dir=str(tmp_path / "run"))
    assert ddpg.train(args)["eval/episodic_return"] > -190  # at random −1200


def test_the_clock_starts_after_the_update_that_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Iterations of the warm-up compile nothing: neither they nor the first with an update count as training."""
    args = ddpg.Args(compile=True, total_timesteps=10_000, run_dir=str(tmp_path / "run"), device="cpu")
    with ddpg.Run(args, agent=torch.nn.Linear(1, 1)) as run:
        run.end_iteration(200, [], {})
        assert run.first_step == 200
        assert "compiled" not in capsys.readouterr().out
        run.end_iteration(200, [], {"losses/grad_norm": 1.0})
        assert run.first_step == 400
        assert "the first update compiled" in capsys.readouterr().out
        run.end_iteration(200, [], {"losses/grad_norm": 1.0})
        assert run.first_step == 400
