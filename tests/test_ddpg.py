"""Proves that ddpg.py follows the deterministic policy gradient and explores as it says; and the buffers.

The gradient is compared with that of the exact objective: on a linear problem that is solved by hand and on a
tabular one. test_off_policy_ac.py takes whole runs of this script too a second time.
"""

from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import ddpg
import off_policy_ac

GAMMA = 0.9


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-10):
    given = [x if torch.is_tensor(x) else torch.from_numpy(np.asarray(x, float)) for x in (actual, expected)]
    torch.testing.assert_close(*(x.detach().double() for x in given), rtol=0, atol=tolerance)


def new_agent(script, obs_dim, action_dim, discrete=False, spread=0.5, **flags):
    """With parameters that are all far from 0, so that no part of a formula can hide; in float64."""
    args = script.Args(**{"normalize_obs": False, "hidden_size": 5} | flags)
    agent = script.Agent(SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, discrete=discrete), args)
    for param in agent.parameters() if spread else []:
        param.data = spread * torch.randn_like(param)
    return agent.double()


def same(agent, own, loss, expected, reached=()):
    """The same number and gradient, which reaches the network `own` and no other, but for `reached`."""
    close(loss, expected)
    for name, param in agent.named_parameters():
        given = {"allow_unused": True, "retain_graph": True}
        pair = [torch.autograd.grad(x, param, **given)[0] for x in (loss, expected)]
        if name.startswith(own):
            close(*pair)
            assert pair[0].abs().sum() > 0
        else:
            assert pair[0] is None or name.split(".")[0] in reached


def network(function):
    net = nn.Identity()
    net.forward = function
    return net


@pytest.mark.parametrize("k", [0.0, 0.4, 1.3, 2.0])
def test_theorem_on_a_linear_quadratic_problem(k):
    """s' = A s + B a, r = −q s² − c a², a = −k s: J = −P(k) s_0², of slope Σ_t γ^t ∇_k μ ∇_a Q(s_t, a)."""
    A, B, q, c, s = 0.9, 0.5, 1.0, 0.3, torch.tensor([[0.4]], dtype=torch.float64)
    x = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    P = (q + c * x**2) / (1 - GAMMA * (A - B * x) ** 2)
    (expected,) = torch.autograd.grad(-P * 0.4**2, x)
    cost = lambda s, a: q * s**2 + c * a**2 + GAMMA * P.detach() * (A * s + B * a) ** 2  # noqa: E731
    agent, layer, total = new_agent(ddpg, 1, 1), nn.Linear(1, 1, bias=False).double(), 0.0
    layer.weight.data.fill_(-k)
    agent.critic = network(lambda sa: -cost(*sa.split(1, -1)))
    agent.actor = nn.Sequential(layer, network(torch.atanh))  # tanh undoes it
    for t in range(400):
        loss, _ = ddpg.policy_loss(agent, s)
        total += GAMMA**t * torch.autograd.grad(loss, layer.weight)[0].item()  # the weight is −k
        s = A * s + B * layer(s).detach()
    close(total, expected, 1e-9)
    assert abs(total) > 0.01


def test_theorem_on_a_tabular_problem():
    """Three states; P(s'|s, a) and r(s, a) vary with a number a; J by solving, its gradient by autograd."""
    first, second = torch.rand(2, 3, 3).double().softmax(-1)
    start, pay = torch.tensor([[0.5, 0.3, 0.2], [1.0, -0.5, 2.0]]).double()
    theta, eye = torch.tensor([0.3, -0.4, 0.8]).double().requires_grad_(), torch.eye(3).double()

    def model(a):
        """r (3,) and P (3, 3) for an action in every state."""
        share = ((1 + a) / 2).unsqueeze(-1)
        return pay * a - a**2, share * first + (1 - share) * second

    reward, transition = model(theta.tanh())
    values = torch.linalg.solve(eye - GAMMA * transition, reward)
    (expected,) = torch.autograd.grad(start @ values, theta, retain_graph=True)
    occupancy = torch.linalg.solve(eye - GAMMA * transition.detach().T, start)

    def q_value(x):  # of one row, obs and action
        reward, transition = model(x[0, 3:].expand(3))
        return (x[:, :3] * (reward + GAMMA * transition @ values.detach())).sum(-1, True)

    agent, total = new_agent(ddpg, 3, 1), 0.0
    agent.actor, agent.critic = nn.Linear(3, 1, bias=False).double(), network(q_value)
    agent.actor.weight.data = theta.detach().unsqueeze(0).clone()
    for s in range(3):
        loss, _ = ddpg.policy_loss(agent, eye[s : s + 1])
        total = total - occupancy[s] * torch.autograd.grad(loss, agent.actor.weight)[0][0]
    close(total, expected)
    assert expected.norm() > 0.3


def test_losses_by_hand_are_means_and_each_trains_its_own_network():
    agent, (raw, after) = new_agent(ddpg, 3, 2, normalize_obs=True), torch.randn(2, 6, 3).double()
    agent.obs_norm.update(torch.randn(20, 3) + 1)
    actions, rewards, terminated = torch.rand(6, 4).double().split((2, 1, 1), 1)
    rewards, terminated = rewards[:, 0], terminated[:, 0].round()
    expected, q_values, norm = 0.0, [], agent.obs_norm
    for i in range(6):
        y, s = float(rewards[i]), norm(after[i])
        if not terminated[i]:
            y += GAMMA * agent.target_critic(torch.cat([s, agent.target_actor(s).tanh()])).item()
        q_values.append(agent.critic(torch.cat([norm(raw[i]), actions[i]]))[0])
        expected = expected + (q_values[i] - y) ** 2 / 6
    loss, metrics = ddpg.q_loss(agent, raw, actions, rewards, after, GAMMA * (1 - terminated))
    same(agent, "critic", loss, expected)
    close(torch.stack(metrics), torch.stack([expected, sum(q_values) / 6]))
    with pytest.raises(AssertionError):
        ddpg.q_targets(rewards, terminated, rewards.unsqueeze(-1))
    expected = -sum(agent.critic(torch.cat([norm(s), agent.actor(norm(s)).tanh()]))[0] for s in raw) / 6
    loss, (metric,) = ddpg.policy_loss(agent, raw)
    same(agent, "actor", loss, expected, reached="critic")
    close(metric, loss)


def test_acting_in_numpy_is_the_network_and_noise_within_the_bounds():
    agent, obs = new_agent(ddpg, 3, 2, normalize_obs=True), 20 * torch.randn(50, 3)
    agent.obs_norm.update(torch.randn(30, 3) + 2)
    mean = agent.actor(((obs - agent.obs_norm.mean) * agent.obs_norm.scale).clip(-10, 10)).tanh()
    close(agent.action(obs, agent.actor), mean)
    for noise in (0 * mean, torch.randn(50, 2), 100 * torch.randn(50, 2)):
        for actions in (agent.in_numpy()(obs.numpy(), noise.detach().numpy()), agent.act(obs, noise)):
            close(actions, (mean + noise).clamp(-1, 1), 1e-5)
    first = new_agent(ddpg, 3, 2, spread=0, hidden_size=256)  # near 0; the targets start as the networks
    assert first.action(3 * torch.randn(500, 3).double(), first.actor).abs().max() < 0.2
    for name, x in first.state_dict().items():
        assert name.startswith("target") or torch.equal(x, first.state_dict()[f"target_{name}"])


@pytest.mark.parametrize("correlation", [0.0, 0.86])
def test_noise_is_stationary_correlated_in_time_alone_and_new_with_an_episode(correlation):
    """Deviation σ from the first step of an episode on; lag-k autocorrelation c^k; independent otherwise."""
    n, noise, history = 20_000, np.full((20_000, 3), 50, np.float32), []
    for starts in (True, False, False, False):
        noise = ddpg.next_noise(noise, [starts] * n, torch.randn(n, 3).numpy(), 0.3, correlation)
        history.append(torch.from_numpy(noise))
    close(torch.stack([x.mean(0) for x in history]), torch.zeros(4, 3), 0.01)
    close(torch.stack([x.std(0) for x in history]), torch.full((4, 3), 0.3), 0.009)
    found = torch.corrcoef(torch.cat(history, 1).T)  # of dimension d at t with dimension e at u
    lags = correlation ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs()
    close(found, torch.kron(lags, torch.eye(3)), 0.03)
    close(np.corrcoef(noise[:-1, 0], noise[1:, 0]), torch.eye(2), 0.03)
    noise, draw = np.float32([[[1, 2], [3, 4]], [[0.5, -1], [2, 0]]])
    new = ddpg.next_noise(noise, [False, True], draw, 0.2, 0.6)
    close(new, [[0.6 + 0.2 * 0.8 * 0.5, 1.2 - 0.2 * 0.8], [0.4, 0.0]], 1e-6)


def new_buffer(script, capacity):
    buffer = script.ReplayBuffer(capacity, [2, 1, 1], torch.device("cpu"))
    buffer.rows.fill_(np.nan)
    return buffer


def add(buffer, n):
    """n rows (tag, −tag, is it even, tag / 2), where tag counts all rows that were ever added."""
    tags = np.arange(buffer.count, buffer.count + n)
    buffer.add(np.stack([tags, -tags], -1), tags % 2 == 0, tags / 2)


def tags_of(*columns):
    """The first column, if the others of each row belong to it."""
    rows = torch.cat(columns, 1)
    assert torch.equal(rows, torch.stack([(t := rows[:, 0]), -t, (t + 1) % 2, t / 2], 1))
    return rows[:, 0].long()


@pytest.mark.parametrize("script", [ddpg, off_policy_ac])
def test_the_buffer_holds_the_last_rows_whatever_is_added_and_goes_on_as_one_that_was_saved(script):
    for capacity in (1, 2, 5, 8):
        buffer, rng = new_buffer(script, capacity), np.random.default_rng(capacity)
        for n in [1, *rng.integers(1, 2 * capacity + 3, 60)]:
            add(buffer, n)
            state, other = buffer.state_dict(), new_buffer(script, capacity)
            assert sorted(tags_of(state["rows"]).tolist()) == [*range(buffer.count)][-capacity:]
            assert state["rows"].untyped_storage().nbytes() == 16 * len(state["rows"])  # no more
            other.load_state_dict(state)
            assert torch.equal(other.rows.nan_to_num(9e9), buffer.rows.nan_to_num(9e9))
            buffer = other
    with pytest.raises(SystemExit):
        script.ReplayBuffer(10**14, [1], torch.device("cpu"))


@pytest.mark.parametrize("script", [ddpg, off_policy_ac])
@pytest.mark.parametrize("added", [(17, 17), (40, 30, 1, 42)])  # not full; full, after two rounds
def test_small_batches_draw_each_stored_row_as_often_and_no_other(script, added):
    buffer = new_buffer(script, 50)
    for n in added:
        add(buffer, n)
    stored, batches = min(sum(added), 50), [buffer.batch(buffer.draw(4)) for _ in range(5_000)]
    assert [x.shape for x in batches[0]] == [(4, 2), (4, 1), (4, 1)]
    tags = torch.stack([tags_of(*batch) for batch in batches]) - max(0, sum(added) - 50)
    pairs = (tags[:, 1] - tags[:, 0]) % stored, (tags[1:, 0] - tags[:-1, 3]) % stored  # independent
    for found in (tags.flatten(), *pairs):
        shares = found.bincount(minlength=stored) / len(found)
        close(shares, torch.full((stored,), 1 / stored), 4.5 * (len(found) * stored) ** -0.5)


class Both(gym.Env):
    """Shows x; wants the action 0.4 + x, in units of ±1; pays minus the squared error; ends in both ways."""

    observation_space = spaces.Box(-0.5, 0.5, (2,))
    action_space = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(1, 6)
        self.x = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.x, {}

    def step(self, action):
        assert self.action_space.contains(action)
        error = (action - [1, 5]) / [2, 5] - 0.4 - self.x
        self.x, self.left = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32), self.left - 1
        over = bool(self.left == 0)
        return self.x, -float(error @ error), over and self.x[0] > 0, over, {}


gym.register("Both-v0", Both)


def small(script, path, **flags):
    flags |= {"num_envs": 4, "hidden_size": 16, "learning_starts": 100, "batch_size": 64, "device": "cpu"}
    return script.Args(env_id="Both-v0", run_dir=str(path), **flags)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("kind", ["ddpg", "resample", "importance", "reparameterized"])
def test_learns_what_an_update_with_a_wrong_sign_does_not(kind, broken, monkeypatch, tmp_path):
    """A policy that stays in the middle gets −0.49 for each step."""
    script, flags = (ddpg, {}) if kind == "ddpg" else (off_policy_ac, {"actor_update": kind})
    flags |= dict.fromkeys(("normalize_obs", "normalize_rewards"), kind != "resample")
    flags |= dict.fromkeys(("learning_rate", "q_learning_rate"), 1e-2) | {"gamma": 0.5, "eval_episodes": 100}
    right = script.policy_loss
    if broken:
        monkeypatch.setattr(script, "policy_loss", lambda *x: (-right(*x)[0], right(*x)[1]))
    metrics = script.train(small(script, tmp_path, total_timesteps=1_500, **flags))
    value = metrics["eval/episodic_return"] / metrics["eval/episodic_length"]
    assert (value > -0.15) == (not broken)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("script", "backend"), [(ddpg, "aot_eager"), (off_policy_ac, "inductor")])
def test_compiled_gradients_are_the_eager_ones(script, backend, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    saved = []
    for compile in (False, True):
        flags = {"compile": compile, "total_timesteps": 108, "eval_episodes": 0}
        script.train(small(script, tmp_path / str(compile), **flags))
        saved.append(torch.load(tmp_path / str(compile) / "checkpoint.pt", weights_only=True))
    for name in ("optimizer", "critic_optimizer"):
        eager, compiled = (x[name]["state"][0]["exp_avg"] for x in saved)
        close(compiled, eager, 1e-4 * eager.abs().max().item())
