"""Proves that each update of off_policy_ac.py is the off-policy gradient it claims to be, and that its data are right.

The expectations are exact: every trajectory of the MDP in tabular.py, weighted by its probability under a behaviour
policy β, goes through the shipped losses; the gradients are compared with formulas of Q^π and the states' distribution
under β, from dynamic programming. Those over a Box are integrated by Gauss and Hermite's rule. The training loop is
taken a second time by plain PyTorch.
"""

import math
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import CONTINUES, MDP, REWARD, TRANSITION, A, S, linear
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode

import off_policy_ac

GAMMA = 0.8
TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64).repeat(4, 1)
THETA = THETA + torch.linspace(-0.6, 0.7, 24, dtype=torch.float64).reshape(12, 2)
PI, BETA = THETA.softmax(-1), (0.9 * THETA.flip(0, 1) + 0.2).softmax(-1)
TRUE_V, TRUE_Q = TIMED.values(PI, GAMMA)
OTHER_Q = TRUE_Q + torch.linspace(-2, 3, 18, dtype=torch.float64).sin().reshape(3, 3, 2)
LOSS = {"actor_update": "resample", "importance_clip": 0.0, "ent_coef": 0.0}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def new_agent(obs_dim: int, space: gym.Space, hidden_size: int = 5) -> off_policy_ac.OffPolicyAgent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (obs_dim,)), action_space=space)
    return off_policy_ac.OffPolicyAgent(env, hidden_size, -0.3).double()


def random_agent(obs_dim: int, space: gym.Space) -> off_policy_ac.OffPolicyAgent:
    """With parameters that are all far from 0, so that no part of a formula can hide."""
    agent = new_agent(obs_dim, space)
    for param in agent.parameters():
        param.data = 0.5 * torch.randn_like(param)
    return agent


def with_horizon(q_values: Tensor, beyond: float = 0.0) -> Tensor:
    """Q (3, S, A) as a table (12, A), with a row for each state that the time limit leaves."""
    return torch.cat([q_values.reshape(9, A), torch.full((3, A), beyond, dtype=torch.float64)])


def tabular_agent(q_values: Tensor, target: Tensor | None = None, theta: Tensor = THETA) -> Any:
    agent = new_agent(12, spaces.Discrete(A))
    agent.actor.net, agent.critic.net = linear(theta), linear(q_values)
    agent.target_critic.net = linear(q_values if target is None else target)
    return agent


# -- expectations under a behaviour policy -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """All transitions of all trajectories, each with the probability that it is stored at its step."""

    weights: Tensor
    rows: Tensor
    obs: Tensor
    actions: Tensor
    rewards: Tensor
    next_obs: Tensor
    terminated: Tensor


def replay(beta: Tensor) -> Rows:
    batch = TIMED.batch()
    weights = TIMED.probabilities(beta).expand(len(batch.mask), -1)
    names = ("rows", "obs", "actions", "rewards", "next_obs", "terminated")
    return Rows(weights[batch.mask], *(getattr(batch, name)[batch.mask].double() for name in names))


def expected_gradient(agent: Any, beta: Tensor, behaviour: Tensor | None = None, **flags: Any) -> Tensor:
    """Minus the gradient of the shipped actor loss, summed over all stored transitions with their weights, (12, A)."""
    data, total = replay(beta), 0.0
    logprobs = (beta if behaviour is None else behaviour).log()[data.rows.long(), data.actions.long()]
    for i, weight in enumerate(data.weights):
        one = slice(i, i + 1)
        loss, _ = off_policy_ac.policy_loss(
            agent, data.obs[one], data.actions[one], logprobs[one], torch.zeros(1, 1, 0), **LOSS | flags
        )
        total = total - weight * torch.autograd.grad(loss, agent.actor.net.weight)[0].T
    return total


def formula(weights: Tensor, occupancy: Tensor) -> Tensor:
    """Σ_t Σ_s d_t(s) Σ_a ∇π(a|s) X_t(s, a), (12, A)."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(TIMED.surrogate(theta.softmax(-1), occupancy, weights), theta)[0]


@pytest.mark.parametrize("actor_update", ["resample", "importance"])
def test_the_expected_step_is_the_off_policy_gradient(actor_update: str):
    """Σ_t Σ_s d^β_t(s) Σ_a ∇π(a|s) Q(s, a), Degris et al.'s theorem, for the true Q^π and for a critic that errs."""
    for q_values in (TRUE_Q, OTHER_Q):
        gradient = expected_gradient(tabular_agent(with_horizon(q_values)), BETA, actor_update=actor_update)
        close(gradient, formula(q_values, TIMED.occupancy(BETA)))
        assert gradient.norm() > 0.3
        assert (gradient - formula(q_values, TIMED.occupancy(PI))).norm() > 0.05  # the states are those of β


@pytest.mark.parametrize("actor_update", ["resample", "importance"])
def test_with_the_present_policy_as_behaviour_it_is_on_policy(actor_update: str):
    """Then it is the gradient of J itself, here without a discount."""
    q_values = with_horizon(TIMED.values(PI, 1.0)[1])
    theta = THETA.clone().requires_grad_()
    (expected,) = torch.autograd.grad(TIMED.objective(theta.softmax(-1), 1.0), theta)
    close(expected_gradient(tabular_agent(q_values), PI, actor_update=actor_update), expected)


def test_the_naive_actor_is_wrong_by_this_much():
    """The stored action without a weight: Σ d^β Σ_a β ∇ log π A, so Σ d^β Σ_a (β − π) ∇ log π A too much."""
    agent = tabular_agent(with_horizon(TRUE_Q))
    naive = expected_gradient(agent, BETA, behaviour=PI, actor_update="importance")
    right = expected_gradient(agent, BETA, actor_update="importance")
    occupancy, theta = TIMED.occupancy(BETA), THETA.clone().requires_grad_()
    advantages, logprobs = TRUE_Q - TRUE_V[:3].unsqueeze(-1), theta.log_softmax(-1)[:9].reshape(3, S, A)
    excess = (occupancy.unsqueeze(-1) * (BETA - PI)[:9].reshape(3, S, A) * advantages * logprobs).sum()
    close(naive - right, torch.autograd.grad(excess, theta)[0])
    assert (naive - right).norm() > 0.3 * right.norm()


def test_the_naive_critic_learns_the_value_of_another_policy():
    """E_β[r + γ V(s')] has V^β as its fixed point, which is not V^π; E[r + γ E_π Q(s', ·) | s, a] has Q^π."""
    data, (beta_v, _) = replay(BETA), TIMED.values(BETA, GAMMA)

    def mean_by(table: Tensor, rows: Tensor, size: int) -> Tensor:
        """The expectation of the target, if s' is worth table[s'], given the row."""
        next_values = data.next_obs @ table.flatten()
        targets = off_policy_ac.q_targets(data.rewards, data.terminated, next_values, GAMMA)
        sums = torch.zeros(size, dtype=torch.float64).index_add(0, rows.long(), data.weights * targets)
        return sums / torch.zeros(size, dtype=torch.float64).index_add(0, rows.long(), data.weights)

    visited = TIMED.occupancy(BETA).flatten() > 0
    assert visited.sum() == 8
    close(mean_by(beta_v, data.rows, 9)[visited], beta_v[:3].flatten()[visited])
    assert (beta_v - TRUE_V)[:3].abs().max() > 0.3
    q_values = mean_by(TRUE_V, A * data.rows + data.actions, 18).reshape(9, A)
    close(q_values[visited], TRUE_Q.reshape(9, A)[visited])


def test_the_expected_step_of_the_critic():
    """2 Σ d^β β (Q − T^π Q') at each (t, s, a): T^π Q' is 0 after termination and Q' itself after the time limit."""
    target = with_horizon(OTHER_Q, 1.7)
    agent, data = tabular_agent(with_horizon(TRUE_Q), target), replay(BETA)
    gradient = torch.zeros(12, A, dtype=torch.float64)
    for i, weight in enumerate(data.weights):
        one, noise = slice(i, i + 1), torch.zeros(1, 1, 0)
        batch = (data.obs[one], data.actions[one], data.rewards[one], data.next_obs[one], data.terminated[one])
        loss, _ = off_policy_ac.q_loss(agent, *batch, noise, gamma=GAMMA)
        gradient += weight * torch.autograd.grad(loss, agent.critic.net.weight)[0].T
    next_values = (PI * target).sum(-1).reshape(4, S)[1:]
    backup = (TRANSITION * REWARD).sum(-1) + GAMMA * torch.einsum("san,tn->tsa", CONTINUES, next_values)
    weights = TIMED.occupancy(BETA).unsqueeze(-1) * BETA[:9].reshape(3, S, A)
    close(gradient[:9], (2 * weights * (TRUE_Q - backup)).reshape(9, A))
    assert gradient.norm() > 0.5


def test_importance_weights_by_hand():
    advantages = torch.tensor([2.0, -3.0, 5.0]).double()
    logratio = torch.tensor([0.5, 1.0, 4.0]).double().log().requires_grad_()
    for clip, weights in ((0.0, [0.5, 1.0, 4.0]), (2.0, [0.5, 1.0, 2.0]), (0.25, [0.25, 0.25, 0.25])):
        loss = off_policy_ac.importance_loss(logratio, advantages, clip)
        expected = torch.tensor(weights).double() * advantages / 3
        close(loss, -expected.sum())
        close(torch.autograd.grad(loss, logratio)[0], -expected)  # ∇ρ = ρ ∇ log π
    with pytest.raises(AssertionError):
        off_policy_ac.importance_loss(logratio, advantages[:, None], 0.0)


def test_the_clip_is_that_of_the_weights_in_expectation():
    agent = tabular_agent(with_horizon(TRUE_Q))
    theta, ratio = THETA.clone().requires_grad_(), (PI / BETA)[:9].reshape(3, S, A)
    assert (ratio > 1.2).any()
    advantages, logprobs = TRUE_Q - TRUE_V[:3].unsqueeze(-1), theta.log_softmax(-1)[:9].reshape(3, S, A)
    weights = TIMED.occupancy(BETA).unsqueeze(-1) * BETA[:9].reshape(3, S, A) * ratio.clamp(max=1.2)
    (expected,) = torch.autograd.grad((weights * advantages * logprobs).sum(), theta)
    close(expected_gradient(agent, BETA, actor_update="importance", importance_clip=1.2), expected)


def test_the_entropy_bonus_is_exact_and_raises_the_entropy():
    agent, obs = tabular_agent(with_horizon(0 * TRUE_Q)), torch.eye(12).double()
    batch = (obs, torch.zeros(12), torch.zeros(12).double(), torch.zeros(1, 12, 0))
    for actor_update in ("resample", "importance"):
        flags = LOSS | {"ent_coef": 0.3, "actor_update": actor_update}
        loss, metrics = off_policy_ac.policy_loss(agent, *batch, **flags)
        theta = THETA.clone().requires_grad_()
        entropy = Categorical(logits=theta).entropy().mean()
        close(metrics["entropy"], entropy)
        gradient = torch.autograd.grad(loss, agent.actor.net.weight)[0].T
        close(gradient, -0.3 * torch.autograd.grad(entropy, theta)[0])
        assert gradient.norm() > 0.01


# -- a Box: expectations by quadrature ---------------------------------------------------------------------------------

NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()
BOX1, BOX2 = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (2,))


class Bowl(nn.Module):
    """Q(s, a) = sin(2 a) s − (a − 0.3)²: smooth, so that the quadrature is exact to many digits."""

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        a, s = actions[..., 0], obs[..., 0]
        return (2 * a).sin() * s - (a - 0.3) ** 2


def bowl_agent(mean: float, log_std: float) -> Any:
    agent = new_agent(1, BOX1)
    agent.actor.net = nn.Linear(1, 2).double()
    agent.actor.net.weight.data = torch.tensor([[0.7], [-0.1]]).double()
    agent.actor.net.bias.data = torch.tensor([mean, log_std]).double()
    agent.critic = agent.target_critic = Bowl()
    return agent


OBS = torch.tensor([[0.8]]).double()


def true_gradient(agent: Any) -> Tensor:
    """Of E_{a ~ π(·|s)} Q(s, a)."""
    mean, log_std = agent.actor.net(OBS)[0]
    actions = (mean + log_std.exp() * NODES).tanh().unsqueeze(-1)
    value = WEIGHTS @ Bowl()(OBS.expand(80, 1), actions)
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, list(agent.actor.parameters()))])


def step(agent: Any, noise: Tensor, u: float = 0.0, behaviour_logprob: float = 0.0, **flags: Any) -> Tensor:
    """Minus the gradient of the shipped loss for one state."""
    batch = (OBS, torch.tensor([[u]]).double(), torch.tensor([behaviour_logprob]).double(), noise.reshape(-1, 1, 1))
    loss, _ = off_policy_ac.policy_loss(agent, *batch, **LOSS | flags)
    return -torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(agent.actor.parameters()))])


def test_reparameterized_is_the_gradient_of_the_expectation():
    agent = bowl_agent(0.2, -1.0)
    mean = sum(w * step(agent, x, actor_update="reparameterized") for x, w in zip(NODES, WEIGHTS, strict=True))
    close(mean, true_gradient(agent))
    assert mean.norm() > 0.3


def test_fresh_actions_give_the_same_gradient_by_their_score():
    """One draw without a baseline, and two, each with the other as its baseline, which halves the variance."""
    agent = bowl_agent(0.2, -1.0)
    pairs = [(x, w) for x, w in zip(NODES, WEIGHTS, strict=True) if w > 1e-10]
    ones = [(step(agent, x), w) for x, w in pairs]
    twos = [(step(agent, torch.stack([x, y])), v * w) for x, v in pairs for y, w in pairs]
    variances = []
    for draws in (ones, twos):
        mean = sum(w * x for x, w in draws)
        close(mean, true_gradient(agent), 1e-7)
        variances.append(float(sum(w * (x - mean).square().sum() for x, w in draws)))
    assert variances[1] < 0.5 * variances[0]


def test_the_baseline_is_the_mean_of_the_other_draws():
    logprobs, q_values = torch.randn(2, 4, 3).double()
    loss = off_policy_ac.score_loss(logprobs, q_values)
    expected = 0.0
    for k in range(4):
        for i in range(3):
            others = [float(q_values[j, i]) for j in range(4) if j != k]
            expected -= float(logprobs[k, i]) * (float(q_values[k, i]) - sum(others) / 3) / 12
    close(loss, expected)
    close(off_policy_ac.score_loss(logprobs[:1], q_values[:1]), -(logprobs[0] * q_values[0]).mean())
    with pytest.raises(AssertionError):
        off_policy_ac.score_loss(logprobs, q_values[:, :1])


@pytest.mark.parametrize("extra", [torch.tensor([0.4, -1.1]).double(), torch.zeros(1).double()])
def test_stored_actions_with_weights_give_the_same_gradient(extra: Tensor):
    """u ~ β; the draws of the baseline E_π Q are of no matter to the mean."""
    agent, mean, std = bowl_agent(0.2, -1.0), 0.9, 0.6
    total = 0.0
    for x, w in zip(NODES, WEIGHTS, strict=True):
        u = mean + std * float(x)
        logprob = float(Normal(mean, std).log_prob(torch.tensor(u).double()))
        total = total + w * step(agent, extra, u, logprob, actor_update="importance")
    close(total, true_gradient(agent), 1e-7)


def test_the_density_of_squashed_actions():
    agent = random_agent(3, BOX2)
    obs = torch.randn(40, 3).double()
    out = agent.actor.net(obs)
    mean, log_std = out.chunk(2, -1)
    assert (log_std.abs() < 2).all()
    u = agent.actor.sample(out, torch.randn(40, 2).double())
    gaussian = Independent(Normal(mean, log_std.exp()), 1)
    close(agent.actor.logprobs(out, u), gaussian.log_prob(u))
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    close(agent.actor.logprobs(out, u) - off_policy_ac.log_slope(u), squashed.log_prob(u.tanh()).sum(-1), 1e-6)
    a = torch.linspace(-1, 1, 200_001).double()[1:-1]
    out = torch.tensor([[0.3, -0.5]]).double()
    density = (agent.actor.logprobs(out, a.atanh()[:, None]) - off_policy_ac.log_slope(a.atanh()[:, None])).exp()
    assert float(density.sum() * 1e-5) == pytest.approx(1, abs=1e-6)
    far = torch.tensor([[12.0], [-30.0]])  # tanh is ±1 in float32
    close(off_policy_ac.log_slope(far), 2 * (math.log(2) - far.abs().double()).squeeze(-1), 1e-5)


def test_the_entropy_of_a_box_is_minus_the_log_probability_of_fresh_actions():
    agent, noise = random_agent(3, BOX2), torch.randn(7, 20, 2).double()
    obs, stored = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    mean, log_std = agent.actor.net(obs).chunk(2, -1)
    u = mean + log_std.exp() * noise
    logprobs = Independent(Normal(mean, log_std.exp()), 1).log_prob(u) - (1 - u.tanh() ** 2).log().sum(-1)
    for actor_update in ("resample", "importance", "reparameterized"):
        flags = LOSS | {"actor_update": actor_update}
        with_bonus, metrics = off_policy_ac.policy_loss(
            agent, obs, stored, torch.zeros(20).double(), noise, **flags | {"ent_coef": 0.3}
        )
        without, _ = off_policy_ac.policy_loss(agent, obs, stored, torch.zeros(20).double(), noise, **flags)
        close(metrics["entropy"], -logprobs.mean())
        close(with_bonus, without - 0.3 * metrics["entropy"])
        params = list(agent.actor.parameters())
        grads = [torch.autograd.grad(x, params) for x in (with_bonus, without)]
        expected = torch.autograd.grad(0.3 * logprobs.mean(), params, retain_graph=True)
        for one, other, bonus in zip(*grads, expected, strict=True):
            close(one - other, bonus)


def test_sigma_is_limited():
    agent = new_agent(1, BOX1)
    out = torch.tensor([[0.5, 9.0], [0.5, -30.0]]).double()
    close(agent.actor.sample(out, torch.ones(2, 1).double()).squeeze(-1), 0.5 + np.exp([2, -20]))
    close(agent.actor.choose(out.numpy(), np.ones((2, 1)))[:, 0], 0.5 + np.exp([2, -20]))
    z = Normal(0.5, torch.tensor([2.0, -20.0]).double().exp())
    u = torch.tensor([1.0, 0.5 + 1e-9]).double()
    close(agent.actor.logprobs(out, u.unsqueeze(-1)), z.log_prob(u))


# -- acting ------------------------------------------------------------------------------------------------------------


def test_noise_and_choice_draw_from_the_policy():
    torch.manual_seed(1)
    agent = random_agent(3, spaces.Discrete(3))
    obs = np.float32([[0.3, -1.0, 0.5]])
    probs = agent.actor.net(torch.from_numpy(obs).double()).softmax(-1)[0]
    act = agent.policy()
    draws = act(obs.repeat(40_000, 0), agent.actor.noise(40_000).numpy())
    found = np.bincount(draws, minlength=3) / 40_000
    assert np.abs(found - probs.detach().numpy()).max() < 0.01
    assert act(obs, 0.0)[0] == int(probs.argmax())
    agent = random_agent(3, BOX2)
    noise = agent.actor.noise(5, 2)
    assert noise.shape == (5, 2, 2)
    u = agent.actor.sample(agent.actor.net(torch.from_numpy(obs).double()), noise.double()[:, 0])
    close(agent.policy()(obs.repeat(5, 0), noise[:, 0].numpy()), u.tanh(), 1e-6)
    assert np.abs(agent.policy()(obs, 1e3)).max() <= 1


def test_acting_in_numpy_is_the_network_with_its_normaliser():
    agent, obs = random_agent(3, BOX2).float(), 20 * torch.randn(50, 3)
    for _ in range(2):
        forward = off_policy_ac.frozen(agent.obs_norm, agent.actor.net)
        expected = agent.actor.net(agent.obs_norm(obs)).detach()
        close(forward(obs.numpy()), expected, 1e-4)
        agent.obs_norm.update(torch.randn(30, 3) + 2)
        close(forward(obs.numpy()), expected, 1e-4)  # frozen


class Products(TorchDispatchMode):
    """Notes the shapes of x and W of each product that oneDNN is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if str(op) == "onednn_float32.linear.default":
            self.shapes.append((*args[0].shape, args[1].shape[0]))
        return op(*args, **(kwargs or {}))


def test_a_wide_layer_is_a_linear_layer():
    for fan_in, fan_out, dtype in ((40, 256, torch.float32), (256, 255, torch.float32), (40, 256, torch.float64)):
        layer = off_policy_ac.WideLinear(fan_in, fan_out).to(dtype)
        x, slope = torch.randn(3, 50, fan_in, dtype=dtype), torch.randn(3, 50, fan_out, dtype=dtype)
        with Products() as products:
            inputs = [x.requires_grad_(), layer.weight, layer.bias]
            y = layer(x)
            grads = torch.autograd.grad(y, inputs, slope)
        wide = off_policy_ac.ONEDNN and fan_out == 256 and dtype == torch.float32
        assert products.shapes == [(150, 40, 256), (150, 256, 40), (256, 150, 40)] * wide
        x, weight, bias, g = (z.detach().double().numpy() for z in (*inputs, slope))
        close(y, x @ weight.T + bias, 1e-5)
        rows, g_rows = x.reshape(150, -1), g.reshape(150, -1)
        for grad, expected in zip(grads, (g @ weight, g_rows.T @ rows, g_rows.sum(0)), strict=True):
            close(grad, expected, 1e-4)
        alone = torch.autograd.grad(layer(inputs[0].detach()), layer.weight, slope)[0]
        close(alone, grads[1])


def test_the_first_policy_is_nearly_uniform():
    for space in (spaces.Discrete(4), BOX2):
        env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (3,)), action_space=space)
        agent = off_policy_ac.OffPolicyAgent(env, 64, 0.0)
        out = agent.actor.net(torch.randn(500, 3))
        if agent.discrete:
            assert (out.softmax(-1) - 0.25).abs().max() < 0.02
        else:
            actions = agent.actor.sample(out, agent.actor.noise(500)).tanh().detach().numpy()
            shares = np.histogram(actions, 4, (-1, 1))[0] / actions.size
            assert (np.abs(shares - 0.25) < 0.1).all()


# -- the replay buffer -------------------------------------------------------------------------------------------------


def test_the_ring_holds_the_last_transitions_each_as_likely():
    buffer = off_policy_ac.ReplayBuffer(5, (2, 0, 1), torch.device("cpu"))
    for first, n in ((0, 3), (3, 3), (6, 1)):  # the second one wraps around
        tags = torch.arange(first, first + n)
        buffer.add(torch.stack([tags, -tags], -1), tags % 2 == 0, tags.double().unsqueeze(-1) / 2)
    assert len(buffer) == 5
    tags, even, half = buffer.sample(20_000)
    assert (tags.shape, even.shape, half.shape) == ((20_000, 2), (20_000,), (20_000, 1))
    assert torch.equal(tags[:, 0], -tags[:, 1])
    assert torch.equal(even, (tags[:, 0] % 2 == 0).float())
    assert torch.equal(half[:, 0], tags[:, 0] / 2)
    counts = Counter(tags[:, 0].tolist())
    assert set(counts) == {2, 3, 4, 5, 6}
    assert all(abs(n / 20_000 - 0.2) < 4 * math.sqrt(0.16 / 20_000) for n in counts.values())


def test_before_it_is_full_only_what_was_added_is_drawn_and_saved():
    buffer = off_policy_ac.ReplayBuffer(1000, (0,), torch.device("cpu"))
    buffer.rows.fill_(math.nan)
    buffer.add(torch.arange(3.0))
    assert set(buffer.sample(1000)[0].tolist()) == {0, 1, 2}
    saved = buffer.state_dict()
    assert saved["rows"].untyped_storage().nbytes() == 3 * 4
    other = off_policy_ac.ReplayBuffer(1000, (0,), torch.device("cpu"))
    other.load_state_dict(saved)
    for each in (buffer, other):
        each.add(torch.tensor([9.0]))
        assert each.rows[: len(each)].flatten().tolist() == [0, 1, 2, 9]
    with pytest.raises(RuntimeError):
        other.load_state_dict({"count": 2, "rows": saved["rows"]})


def test_a_buffer_that_cannot_be_had_is_refused(tmp_path: Path, capsys: Any):
    for size in (10**13, 2**62):
        with pytest.raises(SystemExit) as leave:
            off_policy_ac.train(off_policy_ac.Args(buffer_size=size, run_dir=str(tmp_path / "run"), device="cpu"))
        assert leave.value.code == 2
        err = capsys.readouterr().err
        assert "--buffer-size" in err
        assert "GB" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- the shipped loop --------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """Something that train() did."""

    kind: str
    before: dict[str, Tensor]  # the agent
    given: tuple
    after: dict[str, Tensor]


def run_train(**flags: Any) -> tuple[list[Event], Any, list[dict[str, float]]]:
    """All that the shipped train() did in order, in float64: steps, additions, samples, gradient steps, Polyak."""
    events, logged, seen = [], [], SimpleNamespace()
    module = off_policy_ac
    make_update, polyak, new, end = module.make_update, module.polyak, module.OffPolicyAgent, module.Run.end_iteration
    step, add, sample = module.Stepper.step, module.ReplayBuffer.add, module.ReplayBuffer.sample

    def copy() -> dict[str, Tensor]:
        return {name: x.clone() for name, x in seen.agent.state_dict().items()}

    def spy(kind: str, call: Any, *given: Any) -> Any:
        before = copy()
        result = call(*given)
        known = given[1:] if kind in ("add", "step", "sample") else given
        events.append(Event(kind, before, (*known, result), copy()))
        return result

    def spy_agent(*args: Any) -> Any:
        seen.agent = new(*args).double()
        return seen.agent

    def spy_make_update(loss: Any, *args: Any) -> Any:
        update = make_update(loss, *args)
        return lambda *batch: spy(loss.func.__name__, update, *batch)

    def spy_sample(*given: Any) -> Any:
        result = [x.double() for x in sample(*given)]
        return spy("sample", lambda *_: result, *given)

    def spy_end(run: Any, steps: int, ended: list, metrics: dict) -> None:
        logged.append(metrics | {"steps": steps, "ended": ended})
        end(run, steps, ended, metrics)

    small = {"hidden_size": 5, "batch_size": 7, "learning_starts": 10, "log_interval": 20, "total_timesteps": 60}
    small |= {"eval_episodes": 0, "checkpoint_every": 0, "device": "cpu", "num_envs": 2, "normalize_rewards": False}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(module, "OffPolicyAgent", spy_agent)
        patch.setattr(module, "make_update", spy_make_update)
        patch.setattr(module, "polyak", lambda *x: spy("polyak", polyak, *x))
        patch.setattr(module.Stepper, "step", lambda *x: spy("step", step, *x))
        patch.setattr(module.ReplayBuffer, "add", lambda *x: spy("add", add, *x))
        patch.setattr(module.ReplayBuffer, "sample", spy_sample)
        patch.setattr(module.Run, "end_iteration", spy_end)
        patch.setattr(torch, "randn", lambda *shape, randn=torch.randn: randn(*shape).double())
        module.train(module.Args(run_dir=directory, **small | flags))
    return events, seen.agent, logged


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.kind == kind]


CASES = [
    {"env_id": "Tabular-v0"}, {"env_id": "Tabular-v0", "actor_update": "importance", "importance_clip": 1.05},
    *({"env_id": "Pendulum-v1", "actor_update": x} for x in ("resample", "importance", "reparameterized")),
]  # fmt: skip


def reference_step(agent: Any, kind: str, given: tuple, flags: dict) -> Tensor:
    """The loss of a gradient step, sample by sample, with torch.distributions."""
    norm = agent.obs_norm
    obs, actions, *rest = given[:-1]
    obs, losses = (obs * norm.scale + norm.shift).clamp(-10, 10), []
    *rest, noise = rest
    fresh = lambda out, e: out.chunk(2, -1)[0] + out.chunk(2, -1)[1].exp() * e  # noqa: E731
    for i in range(len(obs)):
        s, a = obs[i], actions[i]
        if kind == "q_loss":
            r, next_obs, end = (x[i] for x in rest)
            after = (next_obs * norm.scale + norm.shift).clamp(-10, 10)
            out = agent.actor.net(after)
            if agent.discrete:
                future = Categorical(logits=out).probs @ agent.target_critic.net(after)
                q = agent.critic.net(s)[int(a)]
            else:
                all_u = [fresh(out, e[i]) for e in noise]
                future = sum(agent.target_critic.net(torch.cat([after, u.tanh()]))[0] for u in all_u) / len(noise)
                q = agent.critic.net(torch.cat([s, a.tanh()]))[0]
            losses.append((q - (r + GAMMA * (0 if end else 1) * future).detach()) ** 2)
            continue
        out, behaviour = agent.actor.net(s), rest[0][i]
        if agent.discrete:
            pi, q = Categorical(logits=out), agent.critic.net(s).detach()
            logprob, value, stored, entropy = pi.log_prob(a), (pi.probs @ q).detach(), q[int(a)], pi.entropy()
            loss = -(pi.probs @ q)
        else:
            mean, log_std = out.chunk(2, -1)
            pi, us = Independent(Normal(mean, log_std.exp()), 1), [fresh(out, e[i]) for e in noise]
            logprob = pi.log_prob(a)
            entropy = sum((1 - u.tanh() ** 2).log().sum() - pi.log_prob(u) for u in us) / len(us)
            q = torch.stack([agent.critic.net(torch.cat([s, u.tanh()]))[0] for u in us])
            stored, value = agent.critic.net(torch.cat([s, a.tanh()]))[0].detach(), q.mean().detach()
            loss = -q.mean()
            if flags.get("actor_update") == "resample":
                others = (q.sum() - q) / (len(us) - 1)
                weights = (q - others).detach()
                loss = -sum(pi.log_prob(u.detach()) * w for u, w in zip(us, weights, strict=True)) / len(us)
        if flags.get("actor_update") == "importance":
            ratio = (logprob - behaviour).exp()
            cut = flags.get("importance_clip", 0)
            weight = ratio.detach().clamp(max=cut) if cut else ratio.detach()
            loss = -weight * logprob * (stored - value)
        losses.append(loss - 0.1 * entropy)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("flags", CASES, ids=str)
def test_the_loop_can_be_taken_by_a_second_road(flags: dict):
    """Each gradient step with plain tensors, backward() and Adam, on the batch that was drawn; then Polyak."""
    more = {"gamma": GAMMA, "ent_coef": 0.1, "tau": 0.3, "num_updates": 2, "num_samples": 3, "max_grad_norm": 0.7}
    more |= {"learning_rate": 3e-3, "q_learning_rate": 5e-3}
    events, agent, logged = run_train(**more | flags)
    kinds = [event.kind for event in events]
    once, update = ["step", "add"], ["sample", "q_loss", "policy_loss", "polyak"]
    assert kinds == once * 4 + (once + 2 * update) * 26
    optimizers, norms, rates = {}, [], {"q_loss": 5e-3, "policy_loss": 3e-3}
    for k, event in enumerate(events):
        if event.kind not in ("q_loss", "policy_loss"):
            continue
        net = agent.critic if event.kind == "q_loss" else agent.actor
        agent.load_state_dict(event.before)
        if event.kind not in optimizers:
            copies = [nn.Parameter(x.detach().clone()) for x in net.parameters()]
            optimizers[event.kind] = (torch.optim.Adam(copies), copies)
        optimizer, copies = optimizers[event.kind]
        loss = reference_step(agent, event.kind, event.given, flags)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        for copy, grad in zip(copies, grads, strict=True):
            copy.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(copies, 0.7)
        close(event.given[-1]["losses/grad_norm"], norm, 1e-8)
        norms.append(float(norm))
        iteration = (2 * sum(x.kind == "step" for x in events[:k]) - 1) // 20
        optimizer.param_groups[0]["lr"] = rates[event.kind] * (1 - iteration / 3)
        optimizer.step()
        prefix = "critic." if event.kind == "q_loss" else "actor."
        expected = [event.after[name] for name in event.after if name.startswith(prefix)]
        for copy, after in zip(copies, expected, strict=True):
            close(copy, after, 1e-8)
        for name, x in event.after.items():  # no other part of the agent moves
            assert name.startswith(prefix) or torch.equal(x, event.before[name])
    assert min(norms) < 0.7 < max(norms)
    for sample, q_step, step in zip(*(of_kind(events, x) for x in ("sample", "q_loss", "policy_loss")), strict=True):
        obs, actions, rewards, next_obs, terminated, logprobs = sample.given[-1]
        for one, other in zip(q_step.given, (obs, actions, rewards, next_obs, terminated), strict=False):
            assert torch.equal(one, other)
        for one, other in zip(step.given, (obs, actions, logprobs), strict=False):
            assert torch.equal(one, other)
        if not agent.discrete:
            assert q_step.given[5].shape == step.given[3].shape == (3, 7, agent.actor.action_dim)
            assert (q_step.given[5] - step.given[3]).abs().min() > 0
    last = [float(event.given[-1]["losses/q_loss"]) for event in of_kind(events, "q_loss")[-20:]]
    assert logged[-1]["losses/q_loss"] == pytest.approx(np.mean(last))
    assert [x["charts/learning_rate"] for x in logged] == pytest.approx([3e-3, 2e-3, 1e-3])


def test_the_target_follows_and_shares_nothing():
    events, agent, _ = run_train(env_id="Tabular-v0", tau=0.3)
    pointers = [{x.data_ptr() for x in net.parameters()} for net in (agent.critic, agent.target_critic, agent.actor)]
    assert len(set.union(*pointers)) == sum(map(len, pointers)) == 18
    first = events[0].before
    for name, x in first.items():
        if name.startswith("critic."):
            assert torch.equal(x, first[f"target_{name}"])
    followed = of_kind(events, "polyak")
    assert len(followed) == 26
    for event in followed:
        moved = 0
        for name, x in event.after.items():
            if name.startswith("target_critic."):
                old, online = event.before[name], event.before[name.removeprefix("target_")]
                close(x, 0.7 * old + 0.3 * online, 1e-12)
                moved += not torch.equal(x, old)
            else:
                assert torch.equal(x, event.before[name])
        assert moved


@pytest.mark.parametrize("env_id", ["Tabular-v0", "Pendulum-v1"])
def test_what_is_stored_is_what_happened(env_id: str):
    """The true successor, also at the end of an episode; terminated alone; log π of the policy that acted."""
    events, agent, logged = run_train(env_id=env_id, total_timesteps=900, learning_starts=850)
    steps, added = of_kind(events, "step"), of_kind(events, "add")
    ends = 0
    for step, add, following in zip(steps, added, [*added[1:], None], strict=True):
        obs, actions, rewards, next_obs, terminated, logprobs = add.given[:6]
        new, _ = step.given[-1]
        agent.load_state_dict(step.before)
        assert torch.equal(next_obs, new.next_obs)
        assert torch.equal(rewards, new.rewards)
        assert torch.equal(terminated, new.terminated)
        out = agent.actor.net(agent.obs_norm(obs.double()))
        if agent.discrete:
            assert torch.equal(torch.from_numpy(step.given[0]), actions)
            expected = Categorical(logits=out).log_prob(actions)
        else:
            close(step.given[0], actions.tanh(), 1e-6)
            mean, log_std = out.chunk(2, -1)
            expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
        close(logprobs, expected, 1e-4)
        if following is not None:
            same = (following.given[0] == next_obs).all(-1)
            assert same[~new.dones].all()
            ends += int(new.dones.sum())
            assert not same[new.dones].all() or new.dones.sum() == 0 or env_id == "Tabular-v0"
    assert ends > 2
    assert bool(torch.cat([x.given[4] for x in added]).any()) == (env_id == "Tabular-v0")
    assert sum(len(each["ended"]) for each in logged) >= ends


class Corridor(gym.Env):
    """Counts; episode e shows 100 e + t; it terminates after 4 steps if e is even, is cut after 3 if odd; one array."""

    observation_space, action_space = spaces.Box(0, 1e6, (1,)), spaces.Discrete(2)
    episode = -1

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.shown = np.float32([100 * self.episode])
        return self.shown, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.shown += 1
        even = self.episode % 2 == 0
        return self.shown, 10.0 * self.t, even and self.t == 4, not even and self.t == 3, {}


gym.register("off_policy_ac/Corridor-v0", Corridor)


def test_no_stored_transition_crosses_an_episode():
    events, _, logged = run_train(env_id="off_policy_ac/Corridor-v0", num_envs=3, total_timesteps=120)
    count = 0
    for event in of_kind(events, "add"):
        obs, _, rewards, next_obs, terminated, _ = event.given[:6]
        assert torch.equal(next_obs - obs, torch.ones(3, 1))
        t = next_obs[:, 0] % 100
        assert torch.equal(rewards, 10 * t)
        assert torch.equal(terminated, (next_obs[:, 0] // 100 % 2 == 0) & (t == 4))
        count += len(obs)
    ended = [x for each in logged for x in each["ended"]]
    assert count == 126  # three iterations of 21 steps would be 63
    assert {(value, length) for _, value, length in ended} == {(100.0, 4), (60.0, 3)}
    discounted = [event.given[-1][0].discounted_returns[0].item() for event in of_kind(events, "step")[:5]]
    assert discounted == pytest.approx([10, 20 + 9.9, 30 + 0.99 * 29.9, 40 + 0.99 * (30 + 0.99 * 29.9), 10], rel=1e-6)


def test_statistics_scale_the_batch():
    events, _, _ = run_train(env_id="Pendulum-v1", normalize_rewards=True, normalize_obs=True)
    rewards = []
    for k, event in enumerate(events):
        if event.kind == "step":
            rewards.append(event.given[-1][0].discounted_returns)
        if event.kind == "q_loss":
            raw = next(x for x in reversed(events[:k]) if x.kind == "sample").given[-1][2]
            close(event.given[2], raw / (torch.cat(rewards).double().numpy().var() + 1e-8) ** 0.5, 1e-5)
            seen = torch.cat([x.given[0] for x in events[:k] if x.kind == "add"]).double()
            close(event.before["obs_norm.mean"], seen.mean(0), 1e-6)
            close(event.before["obs_norm.var"], seen.var(0, correction=0), 1e-6)
    off = run_train(env_id="Pendulum-v1", normalize_obs=False)[1]
    assert off.obs_norm.count == 0


def test_each_loss_trains_its_own_network():
    for space in (spaces.Discrete(3), BOX2):
        agent, obs, n = random_agent(3, space), torch.randn(6, 3).double(), torch.zeros(6).double()
        actions = torch.randint(3, (6,)) if agent.discrete else torch.randn(6, 2).double()
        noise = torch.randn(4, 6, 0 if agent.discrete else 2).double()
        losses = {"critic": off_policy_ac.q_loss(agent, obs, actions, n, obs, n, noise, gamma=0.9)[0]}
        for kind in ("resample", "importance") if agent.discrete else ("resample", "importance", "reparameterized"):
            losses[f"actor {kind}"] = off_policy_ac.policy_loss(
                agent, obs, actions, n, noise, **LOSS | {"actor_update": kind, "ent_coef": 0.1}
            )[0]
        for name, loss in losses.items():
            net = agent.critic if name == "critic" else agent.actor
            for grad in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True):
                assert grad.abs().sum() > 0
            if name == "critic":
                others = [*agent.actor.parameters(), *agent.target_critic.parameters()]
                assert all(x is None for x in torch.autograd.grad(loss, others, allow_unused=True))
        rows = torch.tensor([3, 1, 0, 2, 5, 4])
        shuffled = off_policy_ac.q_loss(
            agent, obs[rows], actions[rows], n, obs[rows], n, noise[:, rows], gamma=0.9
        )[0]
        close(shuffled, losses["critic"])


def test_flags_that_cannot_be_are_refused():
    for bad in ({"tau": 1.5}, {"buffer_size": 3, "num_envs": 4}):
        with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')}"):
            off_policy_ac.Args(**bad)


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


gym.register("off_policy_ac/Target-v0", Target)


@pytest.mark.parametrize(
    ("actor_update", "broken"),
    [("resample", False), ("importance", False), ("reparameterized", False), ("resample", True)],
)
def test_learns_a_continuous_action(actor_update: str, broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The threshold is one that an update with a wrong sign misses."""
    loss = off_policy_ac.policy_loss
    if broken:
        monkeypatch.setattr(off_policy_ac, "policy_loss", lambda *x, **y: (-loss(*x, **y)[0], loss(*x, **y)[1]))
    args = off_policy_ac.Args(
        env_id="off_policy_ac/Target-v0", total_timesteps=3_000, num_envs=4, hidden_size=16, learning_starts=100,
        batch_size=64, learning_rate=3e-3, q_learning_rate=3e-3, device="cpu", eval_episodes=200,
        actor_update=actor_update, run_dir=str(tmp_path / "run"), ent_coef=0.0 if broken else 0.01,
    )  # fmt: skip
    value = off_policy_ac.train(args)["eval/episodic_return"]
    assert (value > -0.05) == (not broken)


@pytest.mark.slow
def test_learns_cartpole(tmp_path: Path):
    args = off_policy_ac.Args(total_timesteps=50_000, device="cpu", eval_episodes=10, run_dir=str(tmp_path / "run"))
    assert off_policy_ac.train(args)["eval/episodic_return"] > 400  # at random 20, with a wrong sign 9
