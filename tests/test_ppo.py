"""Proves that ppo.py computes what its formulas say: advantages, losses, policies, statistics, rollouts, whole updates.

The references are double loops in NumPy, numbers worked out by hand, torch.distributions and torch's own optimisers.
Environments that count their steps write down all they are asked and answer; what train() hands to its own functions is
recorded and compared with that, and its gradient steps are taken again by a second road.
"""

import copy
import math
import tempfile
from collections import defaultdict
from functools import cache
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal, Normal

import ppo

DISCRETE, BOX = spaces.Discrete(3), spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["categorical", "gaussian"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def new_agent(obs_dim: int, space: gym.Space, hidden_size: int = 6, log_std_init: float = 0.0) -> ppo.Agent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (obs_dim,)), action_space=space)
    return ppo.Agent(env, hidden_size, log_std_init)


def random_agent(obs_dim: int, space: gym.Space, dtype: torch.dtype = torch.float64) -> ppo.Agent:
    """An agent whose parameters are all far from 0, so that no part of a formula can hide."""
    agent = new_agent(obs_dim, space).to(dtype)
    for param in agent.parameters():
        param.data = 0.7 * torch.randn(param.shape, dtype=dtype)
    return agent


def distribution(actor: torch.nn.Module, obs: Tensor) -> torch.distributions.Distribution:
    out = actor.net(obs)
    if isinstance(actor, ppo.CategoricalActor):
        return Categorical(logits=out)
    return MultivariateNormal(out, torch.diag(actor.log_std.exp().square()))


def random_case(space: gym.Space, size: int = 16) -> tuple[ppo.Agent, list[Tensor]]:
    """An agent, and obs, actions, old log-probabilities (some within the clip range), advantages and returns."""
    agent = random_agent(3, space)
    obs, actions, change, advantages, returns = (
        torch.randn(size, *shape, dtype=torch.float64) for shape in ((3,), (2,), (), (), ())
    )
    actions = torch.randint(3, (size,)) if space is DISCRETE else actions
    return agent, [obs, actions, agent.actor(obs, actions)[0].detach() + 0.3 * change, 2 * advantages + 1, returns]


FLAGS = {"clip_coef": 0.2, "vf_coef": 0.5, "ent_coef": 0.01, "normalize_advantages": False}


def reference_loss(
    agent: ppo.Agent, obs: Tensor, actions: Tensor, old_logprobs: Tensor, advantages: Tensor, returns: Tensor,
    clip_coef: float, vf_coef: float, ent_coef: float, normalize_advantages: bool,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """PPO's loss sample by sample: of each, the branch that is taken is chosen by `if`."""
    pi = distribution(agent.actor, obs)
    if normalize_advantages:
        advantages = torch.from_numpy((advantages.numpy() - advantages.numpy().mean()) / advantages.numpy().std())
    losses, kls, clipped = [], [], 0
    for logratio, advantage in zip(pi.log_prob(actions) - old_logprobs, advantages, strict=True):
        ratio = logratio.exp()
        bound = 1 + clip_coef if advantage > 0 else 1 - clip_coef
        beyond = ratio > bound if advantage > 0 else ratio < bound
        losses.append(-bound * advantage if beyond else -ratio * advantage)
        kls.append(ratio.item() - 1 - logratio.item())
        clipped += not 1 - clip_coef <= ratio.item() <= 1 + clip_coef
    policy_loss, entropy = sum(losses) / len(losses), pi.entropy().mean()
    value_loss = sum((v - g) ** 2 for v, g in zip(agent.critic.net(obs)[:, 0], returns, strict=True)) / len(returns)
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    metrics |= {"approx_kl": np.mean(kls), "clipfrac": clipped / len(kls)}
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy
    return loss, {name: torch.as_tensor(metric).item() for name, metric in metrics.items()}


def gradients(loss: Tensor, agent: ppo.Agent) -> dict[str, Tensor]:
    """By name; zeros where there is no way from the loss to the parameter."""
    grads = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True, retain_graph=True)
    named = zip(agent.named_parameters(), grads, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in named}


# -- advantages --------------------------------------------------------------------------------------------------------


def episodes_of(dones: np.ndarray) -> list[range]:
    """The steps of each episode, or piece of one, in a column of flags."""
    starts = [0, *(t + 1 for t in np.flatnonzero(dones)), len(dones)]
    return [range(a, b) for a, b in pairwise(starts) if a < b]


def double_loop(rewards, values, next_values, terminated, dones, gamma: float, lam: float) -> np.ndarray:
    """Each column is cut into episodes first; then A_t = Σ_k (γλ)^k δ_{t+k} within one of them, term by term."""
    advantages = np.zeros_like(rewards)
    for n in range(rewards.shape[1]):
        for episode in episodes_of(dones[:, n]):
            for t in episode:
                for u in range(t, episode.stop):
                    future = 0.0 if terminated[u, n] else gamma * next_values[u, n]
                    advantages[t, n] += (gamma * lam) ** (u - t) * (rewards[u, n] + future - values[u, n])
    return advantages


def random_ends(case: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """terminated and truncated (T, N), each with its own rate; now and then ends at every step, at 0, or at T - 1."""
    shape = (int(rng.integers(1, 20)), int(rng.integers(1, 4)))
    terminated, truncated = rng.random(shape) < rng.choice([0, 0.1, 0.5]), rng.random(shape) < rng.choice([0, 0.2, 0.6])
    (terminated, truncated)[case % 2][{0: slice(None), 1: 0, 2: -1}.get(case % 10, slice(0))] = True
    return terminated, truncated


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_equals_a_double_loop_over_separate_episodes(lam: float):
    rng, both = np.random.default_rng(0), 0
    for case in range(200):
        terminated, truncated = random_ends(case, rng)
        both += (terminated & truncated).sum()
        numbers = [10 * rng.normal(size=terminated.shape) for _ in range(3)]
        gamma = rng.choice([0.0, 0.9, 1.0])
        arrays = (*numbers, terminated, terminated | truncated)
        close(ppo.gae(*map(torch.from_numpy, arrays), gamma, lam), double_loop(*arrays, gamma, lam))
    assert both > 100


def gae_of(rewards, values, last, terminated, truncated, gamma=0.9, lam=0.8) -> list[float]:
    """One environment whose values follow each other; `last` is V of the last successor."""
    rewards, values = (torch.tensor(x, dtype=torch.float64).unsqueeze(1) for x in (rewards, values))
    terminated, truncated = (torch.tensor(x, dtype=torch.bool).unsqueeze(1) for x in (terminated, truncated))
    next_values = torch.cat([values[1:], torch.full((1, 1), last).double()])
    return ppo.gae(rewards, values, next_values, terminated, terminated | truncated, gamma, lam).squeeze(1).tolist()


@pytest.mark.parametrize(
    ("terminated", "truncated", "deltas"),
    [  # δ_0 = 1 + 0.9 · 5 − 5 = 0.5, and the last is 1 + 0.9 · 7 − 5 = 2.3 after a time limit, 1 − 5 after termination
        ([0, 0, 0], [0, 0, 1], [0.5, 0.5, 2.3]),
        ([0, 0, 0], [0, 0, 0], [0.5, 0.5, 2.3]),
        ([0, 0, 1], [0, 0, 0], [0.5, 0.5, -4.0]),
        ([0, 0, 1], [0, 0, 1], [0.5, 0.5, -4.0]),  # both: as terminated
    ],
)
def test_gae_by_hand(terminated: list, truncated: list, deltas: list):
    expected = [deltas[0] + 0.72 * deltas[1] + 0.5184 * deltas[2], deltas[1] + 0.72 * deltas[2], deltas[2]]
    close(gae_of([1, 1, 1], [5, 5, 5], 7, terminated, truncated), expected)
    twice = gae_of([1, 1, 1, 1], [5, 5, 5, 7], 50.0, [*terminated, 0], [*truncated, 0])  # a fourth step, δ = 39
    leaks = 0 if terminated[2] or truncated[2] else 39.0
    close(twice, [a + 0.72**k * leaks for a, k in zip([*expected, 39.0 - leaks], (3, 2, 1, 0), strict=True)])


def test_gae_is_one_step_or_monte_carlo_at_the_ends_of_lambda():
    rewards, values, gamma = [1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 2.0, 7.0], 0.5
    none, third = [0] * 4, [0, 0, 1, 0]
    close(gae_of(rewards, values, 8.0, none, none, gamma, 0.0), [0.0, 4.0, 4.5, 1.0])  # r + V' / 2 − V
    close(gae_of(rewards, values, 8.0, none, none, gamma, 1.0), [3.25, 6.5, 5.0, 1.0])  # 3.75, 5.5, 7, 8, less V
    close(gae_of(rewards, values, 8.0, third, none, gamma, 1.0), [2.25, 4.5, 1.0, 1.0])  # 2.75, 3.5, 3, 8, less V
    close(gae_of(rewards, values, 8.0, none, third, gamma, 1.0), [3.125, 6.25, 4.5, 1.0])  # with V = 7 after it


@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_the_next_episode_leaves_no_trace(lam: float):
    """Not one bit of an advantage before an end depends on a reward after it."""
    rng = np.random.default_rng(1)
    rewards, values, next_values = torch.from_numpy(rng.normal(size=(3, 20, 2)).astype(np.float32))
    for cut in ("terminated", "truncated"):
        dones = torch.zeros(20, 2, dtype=torch.bool)
        dones[12] = True
        terminated = dones & (cut == "terminated")
        before = ppo.gae(rewards, values, next_values, terminated, dones, 0.99, lam)
        changed = rewards.clone()
        changed[13:] *= 1e6
        after = ppo.gae(changed, values, next_values, terminated, dones, 0.99, lam)
        assert torch.equal(before[:13], after[:13])
        assert not (before[13:] == after[13:]).any()


def test_what_follows_termination_is_worth_nothing():
    arrays = [torch.randn(6, 2) for _ in range(3)]
    terminated = torch.zeros(6, 2, dtype=torch.bool)
    terminated[2] = terminated[5] = True
    before = ppo.gae(*arrays, terminated, terminated, 0.9, 0.8)
    arrays[2][terminated] = 1e6
    assert torch.equal(ppo.gae(*arrays, terminated, terminated, 0.9, 0.8), before)
    assert torch.equal(before[5], arrays[0][5] - arrays[1][5])


@pytest.mark.parametrize("i", range(5))
def test_gae_refuses_shapes_that_would_broadcast(i: int):
    arrays = [torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, 4), *[torch.zeros(4, 4, dtype=torch.bool)] * 2]
    arrays[i] = arrays[i][:, :1]
    with pytest.raises(AssertionError):
        ppo.gae(*arrays, 0.9, 0.8)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 64, 100])
def test_discounted_sum(steps: int):
    x, c = torch.randn(2, steps, 3, dtype=torch.float64)
    y = [sum(c[t:u].prod(0) * x[u] for u in range(t, steps)) for t in range(steps)]
    close(ppo.discounted_sum(x, c), torch.stack(y))
    with pytest.raises(AssertionError):
        ppo.discounted_sum(x, c[:, :1])


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1, 0.5, -0.5, -1), (1, 1.0, -1.0, -1), (1, 1.1, -1.1, -1), (1, 1.5, -1.2, 0),
        (-1, 0.5, 0.8, 0), (-1, 0.9, 0.9, 1), (-1, 1.0, 1.0, 1), (-1, 1.5, 1.5, 1),
        (3, 1.5, -3.6, 0), (-3, 1.5, 4.5, 3), (0, 1.5, 0, 0),
    ],
)  # fmt: skip
def test_clipped_surrogate_table(advantage: float, ratio: float, loss: float, slope: float):
    """The slope is that of the loss in ρ: zero exactly where the clip holds, and there alone."""
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value, approx_kl, clipfrac = ppo.clipped_surrogate(rho.log(), torch.tensor([float(advantage)]).double(), 0.2)
    close(value, loss)
    close(torch.autograd.grad(value, rho)[0], [slope])
    close(approx_kl, ratio - 1 - math.log(ratio))
    assert clipfrac == (ratio in (0.5, 1.5))
    assert not approx_kl.requires_grad


def test_approx_kl_estimates_the_divergence_of_the_new_policy_from_the_old():
    old, new = Normal(torch.zeros(()).double(), 1.0), Normal(torch.tensor(0.3).double(), 1.3)
    actions = old.sample((200_000,))
    logratio = new.log_prob(actions) - old.log_prob(actions)
    _, approx_kl, _ = ppo.clipped_surrogate(logratio, torch.zeros_like(logratio), 0.2)
    deviation = (logratio.exp() - 1 - logratio).std() / math.sqrt(len(actions))
    kl, reverse = torch.distributions.kl_divergence(old, new), torch.distributions.kl_divergence(new, old)
    assert abs(approx_kl - kl) < 4 * deviation < abs(kl - reverse) / 4
    for x in torch.linspace(-6, 6, 100, dtype=torch.float64):
        assert ppo.clipped_surrogate(x[None], torch.zeros(1), 0.2)[1] >= 0


def test_losses_are_means_over_samples():
    """Order and copies do not matter, 64 samples at once are 64 alone, and (B, 1) beside (B,) is refused."""
    logratio, advantages, values, returns = torch.randn(4, 64, dtype=torch.float64)
    order = torch.randperm(64)

    def losses(x: Any) -> Tensor:
        surrogate = ppo.clipped_surrogate(logratio[x], advantages[x], 0.2)
        return torch.stack([*surrogate, ppo.value_loss(values[x], returns[x])]).double()

    together = losses(order)
    close(losses(slice(None)), together, 1e-8)  # clipfrac is float32
    close(losses(order.repeat(3)), together, 1e-7)
    close(torch.stack([losses([i]) for i in range(64)]).mean(0), together, 1e-7)
    for loss in (lambda a, b: ppo.clipped_surrogate(a, b, 0.2), ppo.value_loss):
        for a, b in ((values, returns[:, None]), (values[:, None], returns), (values, returns[:1])):
            with pytest.raises(AssertionError):
                loss(a, b)


def test_value_loss_pulls_towards_constant_targets():
    values, returns = (torch.randn(5, dtype=torch.float64).requires_grad_() for _ in range(2))
    grads = torch.autograd.grad(ppo.value_loss(values, 1.0 * returns), [values, returns], allow_unused=True)
    close(grads[0], 2 * (values - returns) / 5)
    assert grads[1] is None


def test_explained_variance():
    returns = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    for values, expected in ((returns, 1.0), (torch.full((4,), 3.0), 0.0), (returns / 2, 0.75), (-returns, -3.0)):
        close(ppo.explained_variance(values.reshape(2, 2), returns.reshape(2, 2)), expected, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize(dtype: torch.dtype):
    for x in (1e3 + 50 * torch.randn(64, dtype=dtype), 1e-3 * torch.rand(8, 8, dtype=dtype)):
        y = ppo.normalize(x)
        close(y.mean(), 0, 1e-5)
        close(y.std(correction=0), 1, 1e-4)
        close(y, (x - x.mean()) / x.std(correction=0), 1e-3)
    for constant, size in product((0.0, 0.1, -12345.678), (1, 2, 7, 256, 1000)):
        assert torch.equal(ppo.normalize(torch.full((size,), constant, dtype=dtype)), torch.zeros(size, dtype=dtype))


@pytest.mark.parametrize("normalize_advantages", [False, True])
@BOTH
def test_loss_gradient_and_metrics(space: gym.Space, normalize_advantages: bool):
    agent, batch = random_case(space)
    flags = FLAGS | {"normalize_advantages": normalize_advantages}
    (loss, metrics), (expected, numbers) = (f(agent, *batch, **flags) for f in (ppo.ppo_loss, reference_loss))
    close(loss, expected, 1e-7)
    assert metrics.keys() == numbers.keys()
    assert 0.2 < numbers["clipfrac"] < 1
    for name, number in numbers.items():
        close(metrics[name], number, 1e-7)
    one, other = gradients(loss, agent), gradients(expected, agent)
    for name, grad in one.items():
        assert grad.abs().sum() > 0, name
        close(grad, other[name], 1e-6)
    agent.critic = agent.critic.net  # which gives (B, 1)
    with pytest.raises(AssertionError):
        ppo.ppo_loss(agent, *batch, **flags)


@BOTH
def test_each_loss_trains_its_own_network(space: gym.Space):
    agent, batch = random_case(space)
    for flags, trained in (
        ({"vf_coef": 0.0, "ent_coef": 0.0}, "actor"), ({"vf_coef": 0.0, "ent_coef": 0.1}, "actor"), ({}, "critic"),
    ):  # fmt: skip
        if trained == "critic":
            batch[3], flags = torch.zeros(16), {"ent_coef": 0.0}
        loss, _ = ppo.ppo_loss(agent, *batch, **FLAGS | flags)
        for name, grad in gradients(loss, agent).items():
            assert (grad.abs().sum() > 0) == name.startswith(trained), name
    close(gradients(loss, agent)["critic.net.4.bias"][0], (agent.critic(batch[0]) - batch[4]).mean())  # ½ · 2 (V − G)
    addresses = [{p.untyped_storage().data_ptr() for p in net.parameters()} for net in (agent.actor, agent.critic)]
    assert not addresses[0] & addresses[1]


@pytest.mark.parametrize("normalize_advantages", [False, True])
@BOTH
def test_without_advantages_the_entropy_grows_or_nothing_happens(space: gym.Space, normalize_advantages: bool):
    for ent_coef in (0.0, 0.1):
        agent, batch = random_case(space)
        batch[3] = torch.zeros(16, dtype=torch.float64)
        before, entropy = copy.deepcopy(agent.actor.state_dict()), agent.actor(*batch[:2])[1].mean()
        flags = FLAGS | {"ent_coef": ent_coef, "normalize_advantages": normalize_advantages}
        loss, _ = ppo.ppo_loss(agent, *batch, **flags)
        grads = gradients(loss, agent)
        with torch.no_grad():
            for name, param in agent.named_parameters():
                param -= 0.05 * grads[name]
        same = [torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items()]
        if ent_coef:
            assert agent.actor(*batch[:2])[1].mean() > entropy + 1e-5
        else:
            assert all(same)


# -- policies ----------------------------------------------------------------------------------------------------------


@BOTH
def test_logprob_and_entropy(space: gym.Space):
    """Values and gradients as torch.distributions has them, one number for an action of any dimension."""
    agent, (obs, actions, *_) = random_case(space, 20)
    for shape in ((20,), (5, 4)):
        seen, taken = obs.reshape(*shape, 3), actions.reshape(*shape, *actions.shape[1:])
        pi = distribution(agent.actor, seen)
        for actual, expected in zip(agent.actor(seen, taken), (pi.log_prob(taken), pi.entropy()), strict=True):
            assert actual.shape == shape
            close(actual, expected)
            weights = torch.linspace(-1, 2, 20).reshape(shape)
            one, other = (gradients((weights * x).sum(), agent) for x in (actual, expected))
            for name in one:
                close(one[name], other[name])


def test_gumbel_noise_draws_from_the_softmax():
    draws, logits = 200_000, np.array([1.0, -0.5, 0.0, 2.0], np.float32)
    actor = random_agent(3, spaces.Discrete(4)).actor
    probs = np.exp(logits) / np.exp(logits).sum()
    freqs = np.bincount(actor.choose(logits, actor.noise(draws).numpy()), minlength=4) / draws
    assert (np.abs(freqs - probs) < 4 * np.sqrt(probs * (1 - probs) / draws)).all()
    assert actor.choose(np.stack([logits, -logits]), 0.0).tolist() == [3, 1]
    assert actor.noise(5, 2).shape == (5, 2, 4)


def test_gaussian_noise_draws_from_the_normal():
    """Each dimension of each environment at each step has noise of its own."""
    agent = random_agent(3, BOX, torch.float32)
    agent.actor.log_std.data = torch.tensor([1.0, -2.0])
    draws, sigma = 100_000, np.exp([1.0, -2.0])
    noise = agent.actor.noise(draws, 2)
    assert noise.shape == (draws, 2, 2)
    assert not noise.requires_grad
    z = (noise.numpy() / sigma).reshape(draws, 4)
    close(z.mean(0), np.zeros(4), 4 / math.sqrt(draws))
    close(z.T @ z / draws, np.eye(4), 4 * math.sqrt(2 / draws))
    close((z**4).mean(0), np.full(4, 3.0), 4 * math.sqrt(96 / draws))
    close((z[1:] * z[:-1]).mean(0), np.zeros(4), 4 / math.sqrt(draws))
    mean = np.float32([[1, 2], [3, 4]])
    assert (agent.actor.choose(mean, 0.0) == mean).all()
    assert (agent.actor.choose(mean, np.float32([[5, 6], [7, 8]])) == [[6, 8], [10, 12]]).all()


@BOTH
def test_the_policy_in_numpy_is_the_network(space: gym.Space):
    agent = random_agent(3, space, torch.float32)
    agent.obs_norm.update(torch.tensor([2.0, -30.0, 0.1]) * torch.randn(50, 3) + 5)
    obs, noise = 5 + 20 * torch.randn(200, 3), agent.actor.noise(200)
    out = agent.actor.net(agent.obs_norm(obs)).detach().numpy()
    expected = (out + noise.numpy()).argmax(-1) if space is DISCRETE else out + noise.numpy()
    act = agent.policy()
    close(act(obs.numpy(), noise.numpy()), expected, 1e-5)
    close(act(obs.numpy(), 0.0), out.argmax(-1) if space is DISCRETE else out, 1e-5)
    before = act(obs.numpy(), 0.0)
    for tensor in agent.state_dict().values():
        tensor.add_(1.0)  # in place: the policy was a copy
    assert (act(obs.numpy(), 0.0) == before).all()


@BOTH
def test_initial_weights_are_orthogonal(space: gym.Space):
    agent, obs = new_agent(5, space, 16, -0.5), torch.randn(100, 5)
    for net, last in ((agent.actor.net, 0.01), (agent.critic.net, 1.0)):
        weights = {name: param for name, param in net.named_parameters() if "weight" in name}
        assert [w.shape[1] for w in weights.values()] == [5, 16, 16]
        for w, gain in zip(weights.values(), (math.sqrt(2), math.sqrt(2), last), strict=True):
            product = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            close(product, gain**2 * torch.eye(len(product)), 1e-5)
        assert all((p == 0).all() for name, p in net.named_parameters() if "bias" in name)
    if space is DISCRETE:
        close(distribution(agent.actor, obs).probs, torch.full((100, 3), 1 / 3), 0.02)
    else:
        close(agent.actor.net(obs), torch.zeros(100, 2), 0.05)
        assert agent.actor.log_std.tolist() == [-0.5, -0.5]


# -- running statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_running_moments_equal_those_of_all_rows(shape: tuple[int, ...]):
    rng, norm = np.random.default_rng(0), ppo.RunningNorm(*shape)
    x = torch.randn(4, *shape)
    assert torch.equal(norm(1e9 * x), 1e9 * x)  # before the first rows
    rows = []
    for size in [*rng.integers(1, 50, 20).tolist(), 1, 1, 2]:
        rows.append(1e6 + rng.normal(size=(size, 2, *shape)) * np.arange(1, 4)[: math.prod(shape)].reshape(shape))
        norm.update(torch.from_numpy(rows[-1]))
    rows = np.concatenate(rows).reshape(-1, *shape)
    assert norm.count == len(rows)
    np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var, rows.var(0), rtol=1e-9)


def test_running_moments_do_not_cancel_in_float32():
    norm = ppo.RunningNorm(1)
    norm.update(torch.tensor([[1e4], [1e4 + 1], [1e4 + 2]]))
    assert float(norm.var.sqrt()) == pytest.approx(math.sqrt(2 / 3), rel=1e-9)


def test_running_norm_output_and_state():
    rows = torch.tensor([5.0, -3.0, 0.0]) + torch.tensor([2.0, 30.0, 0.0]) * torch.randn(1000, 3)
    norm, other = ppo.RunningNorm(3), ppo.RunningNorm(3)
    norm.update(rows[:300])
    norm.update(rows[300:])
    x = torch.cat([rows, 100 * rows])
    expected = (x.numpy() - rows.double().numpy().mean(0)) / np.sqrt(rows.double().numpy().var(0) + 1e-8)
    close(norm(x), np.clip(expected, -10, 10), 1e-5)
    assert norm(x).dtype == torch.float32
    assert norm(x).abs().max() == 10
    assert {k for k, v in norm.state_dict().items() if v.dtype == torch.float64} == {"count", "mean", "var"}
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(x), norm(x))
    for each in (norm, other):
        each.update(7 * rows)
    assert torch.equal(other(x), norm(x))
    assert not list(norm.parameters())


@BOTH
def test_settled_statistics_change_no_output(space: gym.Space):
    """Of actor and critic, in exact arithmetic. Before they are settled, no parameter changes, and so every output."""
    agent, rng = random_agent(3, space), np.random.default_rng(0)
    obs = torch.from_numpy(rng.normal(size=(50, 3)))

    def outputs() -> list[Tensor]:
        seen = agent.obs_norm(obs)
        assert seen.abs().max() < 10
        return [agent.actor.net(seen).detach(), agent.critic(seen).detach()]

    layer = copy.deepcopy(agent.actor.net[0])
    for rows in (99_999, 1):
        before = outputs()
        agent.update_obs_norm(torch.from_numpy(rng.normal(0.3, 1, (rows, 3))) * torch.tensor([0.4, 1.0, 3.0]))
        assert all(map(torch.equal, agent.actor.net[0].parameters(), layer.parameters()))
        assert all((new - old).abs().max() > 1e-9 for new, old in zip(outputs(), before, strict=True))
    for k in range(1, 6):
        before, scale = outputs(), agent.obs_norm.scale.clone()
        agent.update_obs_norm(torch.from_numpy(rng.normal(k, 1 + k, (10**k, 3))))
        assert (agent.obs_norm.scale - scale).abs().min() > 1e-6  # by the last rows a half
        for new, old in zip(outputs(), before, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


def test_an_input_that_was_at_rest_does_not_explode(monkeypatch: pytest.MonkeyPatch):
    """Its deviation is 1e-4 at first. Of the networks' slope in it no more than ten times the weight is left."""
    monkeypatch.setattr(ppo.Agent, "settled_after", 1)
    agent = random_agent(2, DISCRETE)
    rest = torch.tensor([[0.0, 5.0], [1.0, 5.0]]).double()
    agent.update_obs_norm(rest)
    before, weight = agent.critic(agent.obs_norm(rest)), agent.critic.net[0].weight.clone()
    agent.update_obs_norm(torch.tensor([[0.0, 4.0], [1.0, 8.0]]).double())
    ratio = agent.critic.net[0].weight / weight
    close(ratio, torch.tensor([1.0, 10.0]).expand_as(ratio), 1e-9)
    close(agent.critic(agent.obs_norm(rest)), before, 1e-9)  # where all inputs were, all is as before


# -- rollouts ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    obs: np.ndarray
    action: Any
    reward: float
    next_obs: np.ndarray
    terminated: bool
    truncated: bool
    clock: int  # steps that all environments have taken, this one among them
    episode: int


class Counting(gym.Env):
    """Shows scale × (step + 100 × episode) and its own index, pays what no other step pays, and writes all down.

    Episodes last 3, 1, 4, 2, 9 steps (each environment begins elsewhere) and end in termination, a time limit, or both
    at once. Every other environment shows the same array each time, as some environments do.
    """

    made: ClassVar[list["Counting"]] = []
    clock = 0

    def __init__(
        self, action_space: gym.Space = DISCRETE, scale: float = 1.0, lengths: tuple[int, ...] = (3, 1, 4, 2, 9)
    ) -> None:
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (2,)), action_space
        self.scale, self.lengths, self.index = scale, lengths, len(Counting.made)
        self.array, self.log, self.seeds = np.zeros(2, np.float32), [], []
        Counting.made.append(self)

    def show(self) -> np.ndarray:
        self.array[:] = self.scale * (self.count + 100 * len(self.seeds)), self.index
        return self.array.copy() if self.index % 2 else self.array

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.seeds.append(seed)
        self.count = 0
        return self.show(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        which, obs = len(self.seeds) + self.index, self.show().copy()
        assert self.count < self.lengths[which % len(self.lengths)], "step after the end"
        self.count, Counting.clock = self.count + 1, Counting.clock + 1
        reward = self.index + len(self.seeds) / 4 - (self.count - 2) ** 2
        ends = self.count == self.lengths[which % len(self.lengths)]
        terminated, truncated = ends and which % 3 != 1, ends and which % 3 != 0
        next_obs, episode = self.show().copy(), len(self.seeds)
        self.log.append(Step(obs, action, reward, next_obs, terminated, truncated, Counting.clock, episode))
        return self.show(), reward, terminated, truncated, {}


WIDE = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))  # not symmetric, and not of one width
gym.register("ppo/Counting-v0", Counting, kwargs={"scale": 0.01})
gym.register("ppo/CountingBox-v0", Counting, kwargs={"scale": 0.01, "action_space": WIDE})


def counting_envs(num_envs: int, **kwargs: Any) -> list[Counting]:
    Counting.made, Counting.clock = [], 0
    return [Counting(**kwargs) for _ in range(num_envs)]


def hand_count(logs: list[list[Step]], gamma: float) -> tuple[dict[str, np.ndarray], list[tuple[int, float, int]]]:
    """The arrays of a rollout, (T, N, ...), and (clock, return, length) of the episodes that ended."""
    columns, ended = defaultdict(list), []
    for log in logs:
        for name in ("obs", "next_obs", "reward", "terminated", "truncated"):
            columns[name].append([getattr(step, name) for step in log])
        discounted = []
        for t, now in enumerate(log):
            episode = [step for step in log[: t + 1] if step.episode == now.episode]
            discounted.append(sum(gamma ** (t - s) * log[s].reward for s in range(t + 1 - len(episode), t + 1)))
            if now.terminated or now.truncated:
                ended.append((now.clock, sum(step.reward for step in episode), len(episode)))
        columns["discounted"].append(discounted)
    return {name: np.stack(column, 1) for name, column in columns.items()}, sorted(ended)


@pytest.mark.parametrize("steps", [1, 5, 16])
def test_rollouts_hold_what_the_environments_did(steps: int):
    """Over rollouts that cut episodes anywhere, and across the ends of episodes of all kinds."""
    envs, agent = counting_envs(4), new_agent(2, DISCRETE)
    collector = ppo.Collector(envs, 0.9)
    collector.reset(3, 0)
    rollouts, ended = [], []
    for k in range(32 // steps):
        rollout, ends = collector.collect(agent, steps)
        assert {x.shape[:2] for x in rollout} == {(steps, 4)}
        rollouts.append(rollout)
        ended += [(k * steps * 4 + offset, total, length) for offset, total, length in ends]
    rollout = ppo.Rollout(*map(torch.cat, zip(*rollouts, strict=True)))
    expected, expected_ended = hand_count([env.log for env in envs], 0.9)

    assert ended == expected_ended
    assert {length for _, _, length in ended} >= {1, 2, 3, 4, 9}
    close(rollout.obs, expected["obs"])
    close(rollout.next_obs, expected["next_obs"])
    close(rollout.rewards, expected["reward"])
    close(rollout.discounted_returns, expected["discounted"], 1e-4)  # float32, up to 100
    assert (rollout.terminated.numpy() == expected["terminated"]).all()
    assert (rollout.dones.numpy() == expected["terminated"] | expected["truncated"]).all()
    kinds = np.unique(expected["terminated"] + 2 * expected["truncated"])
    assert kinds.tolist() == [0, 1, 2, 3]

    counts, next_counts = rollout.obs[..., 0], rollout.next_obs[..., 0]
    assert (next_counts - counts == 1).all()  # no transition crosses an episode
    assert torch.equal(counts[1:][~rollout.dones[:-1]], next_counts[:-1][~rollout.dones[:-1]])
    assert (counts[1:][rollout.dones[:-1]] % 100 == 0).all()
    assert sum(len(env.log) for env in envs) == rollout.rewards.numel()
    # Environment 2 begins with the episode of length 2, then 9; its first episode is number 1
    assert counts[:4, 2].tolist() == [100, 101, 200, 201]
    assert next_counts[:4, 2].tolist() == [101, 102, 201, 202]


def test_termination_in_the_last_step_before_the_time_limit():
    """TimeLimit then sets both flags; V(s') must not be used."""
    counting_envs(0)
    envs = [gym.wrappers.TimeLimit(Counting(lengths=lengths), 3) for lengths in ((9,), (9,), (3,), (9,))]
    collector, agent = ppo.Collector(envs, 0.9), new_agent(2, DISCRETE)
    collector.reset(0, 0)
    rollout, ended = collector.collect(agent, 6)
    assert rollout.dones.T.int().tolist() == [[0, 0, 1, 0, 0, 1]] * 4
    assert rollout.terminated[:, [0, 1, 3]].sum() == 0
    assert rollout.terminated[:, 2].tolist() == [False, False, True] + [False] * 3  # its second end is a time limit
    assert rollout.next_obs[2, :, 0].tolist() == [103] * 4
    assert [length for _, _, length in ended] == [3] * 8


@BOTH
def test_actions_are_drawn_from_the_policy_for_the_observation_beside_them(space: gym.Space):
    envs, agent = counting_envs(3, scale=0.01, action_space=space), random_agent(2, space, torch.float32)
    agent.obs_norm.update(torch.randn(10, 2))
    collector = ppo.Collector(envs, 0.9)
    collector.reset(0, 0)
    torch.manual_seed(5)
    rollout, _ = collector.collect(agent, 20)
    torch.manual_seed(5)
    noise = agent.actor.noise(20, 3)
    out = agent.actor.net(agent.obs_norm(rollout.obs))
    close(rollout.actions, (out + noise).argmax(-1) if space is DISCRETE else out + noise, 1e-5)
    assert torch.randn(1).item() != noise.flatten()[0]  # the generator went on


INF = np.inf
SPACES = {  # what the environment should get for the policy's −100, −1, 0, 0.5, 1 and 100
    "asymmetric": (WIDE, [[-1, 0], [-1, 0], [1, 5], [2, 7.5], [3, 10], [3, 10]]),
    "unbounded": (spaces.Box(-INF, INF, (1,)), [[-100], [-1], [0], [0.5], [1], [100]]),
    "half": (
        spaces.Box(np.float32([-INF, 0]), np.float32([0.25, INF])),
        [[-100, 0], [-1, 0], [0, 0], [0.25, 0.5], [0.25, 1], [0.25, 100]],
    ),
    "mixed": (
        spaces.Box(np.float32([-2, -INF]), np.float32([6, INF])),
        [[-2, -100], [-2, -1], [2, 0], [4, 0.5], [6, 1], [6, 100]],
    ),
    "matrix": (
        spaces.Box(np.array([[0.0], [-4.0]]), np.array([[1.0], [4.0]]), dtype=np.float64),
        [[[0], [-4]], [[0], [-4]], [[0.5], [0]], [[0.75], [2]], [[1], [4]], [[1], [4]]],
    ),
    "scalar": (spaces.Box(-2.0, 4.0, ()), [-2, -2, 1, 2.5, 4, 4]),
}


@pytest.mark.parametrize("name", SPACES)
def test_action_units(name: str):
    space, expected = SPACES[name]
    units = np.float32([-100, -1, 0, 0.5, 1, 100])[:, None].repeat(math.prod(space.shape), 1)
    mapped = ppo.action_map(space)(units)
    np.testing.assert_allclose(np.array(mapped), np.array(expected))
    assert all(np.shape(action) == space.shape for action in mapped)
    assert all(space.contains(np.asarray(action, space.dtype)) for action in mapped)


@pytest.mark.parametrize("name", [*SPACES, "discrete"])
def test_environments_get_clipped_actions_and_rollouts_keep_the_others(name: str):
    space = spaces.Discrete(3, start=5) if name == "discrete" else SPACES[name][0]
    envs = counting_envs(3, action_space=space)
    agent, collector = new_agent(2, space, log_std_init=math.log(10)), ppo.Collector(envs, 0.9)
    collector.reset(0, 0)
    rollout, _ = collector.collect(agent, 40)
    given = np.stack([[step.action for step in env.log] for env in envs], 1)
    if name == "discrete":
        assert rollout.actions.shape == (40, 3)
        assert set(rollout.actions.flatten().tolist()) == {0, 1, 2}
        assert all(type(step.action) is int and space.contains(step.action) for env in envs for step in env.log)
        assert (given == rollout.actions.numpy() + 5).all()
        return
    taken, low, high = rollout.actions.numpy().reshape(given.shape), space.low, space.high
    assert rollout.actions.shape == (40, 3, math.prod(space.shape))
    assert 5 < taken.std() < 20  # σ = 10 in the policy's units
    assert ((low <= given) & (given <= high)).all()
    if name != "unbounded":
        assert ((given == low) | (given == high)).mean() > 0.3
    middle, half = np.zeros(space.shape), np.ones(space.shape)
    for d in np.ndindex(space.shape):
        if abs(low[d]) < INF and abs(high[d]) < INF:
            middle[d], half[d] = (low[d] + high[d]) / 2, (high[d] - low[d]) / 2
    np.testing.assert_allclose(given, np.clip(middle + half * taken, low, high), rtol=1e-5, atol=1e-5)


class Shaped(gym.Env):
    """Shows one after the other the samples of a space."""

    def __init__(self, space: gym.Space, samples: list) -> None:
        self.observation_space, self.action_space, self.samples = space, DISCRETE, iter(samples)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        return next(self.samples), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        return next(self.samples), 1, False, False, {}


@pytest.mark.parametrize(
    ("space", "samples", "expected"),
    [
        (spaces.Discrete(3, start=5), [5, 7, 6], [[1, 0, 0], [0, 0, 1], [0, 1, 0]]),
        (spaces.Box(0, 9, (2, 2)), [np.float32([[k, 1], [2, 3]]) for k in range(3)], [[k, 1, 2, 3] for k in range(3)]),
        (spaces.Box(0, 9, (), np.float64), [np.array(4.0), np.array(5.0), np.array(6.0)], [[4], [5], [6]]),
        (spaces.Box(0, 9, (2,), np.int64), [np.array([4, k]) for k in range(3)], [[4, 0], [4, 1], [4, 2]]),
    ],
    ids=["discrete", "matrix", "scalar", "integers"],
)
def test_observations_come_out_flat(space: gym.Space, samples: list, expected: list):
    gym.register("ppo/Shaped-v0", Shaped, kwargs={"space": space, "samples": samples})
    try:
        (env,) = ppo.make_envs("ppo/Shaped-v0", 1)
    finally:
        del gym.registry["ppo/Shaped-v0"]
    agent, collector = ppo.Agent(env, 4, 0.0), ppo.Collector([env], 0.9)
    collector.reset(0, 0)
    rollout, _ = collector.collect(agent, 2)
    assert rollout.obs.dtype == torch.float32
    assert rollout.obs[:, 0].tolist() == expected[:2]
    assert rollout.next_obs[:, 0].tolist() == expected[1:]


def test_no_two_environments_share_a_seed():
    """Not in ten runs, nor in the restarts after a checkpoint, nor with the evaluation of any run."""
    envs, agent, evaluated = counting_envs(8), new_agent(2, DISCRETE), Counting()
    for seed in range(10):
        for iteration in range(4):
            ppo.Collector(envs, 0.9).reset(seed, iteration)
        ppo.evaluate(agent, evaluated, seed, 3)
    training = [seed for env in envs for seed in env.seeds]
    assert len({*training, *evaluated.seeds}) == 10 * 8 * 4 + 10 * 3
    assert None not in {*training, *evaluated.seeds}


def test_first_observations_differ_and_belong_to_the_seeds():
    envs = ppo.make_envs("CartPole-v1", 8)
    collector = ppo.Collector(envs, 0.9)
    collector.reset(1, 0)
    assert len(np.unique(collector.obs, axis=0)) == 8
    first = collector.obs.copy()
    collector.reset(2, 0)
    assert len(np.unique(np.concatenate([first, collector.obs]), axis=0)) == 16
    for i, obs in enumerate(first):
        alone, _ = gym.make("CartPole-v1").reset(seed=ppo.env_seed(1, 0, 0, i))
        assert (alone == obs).all()


# -- the loop ----------------------------------------------------------------------------------------------------------


class Update(NamedTuple):
    agent: ppo.Agent  # as it was before the step
    batch: tuple[Tensor, ...]  # obs, actions, old_logprobs, advantages, returns
    flags: dict[str, Any]
    learning_rate: float
    epoch: int  # counted over the whole run


class Trained(NamedTuple):
    """What happened in a run of train()."""

    args: ppo.Args
    start: dict[str, Tensor]
    rollouts: list[ppo.Rollout]
    advantages: list[tuple[ppo.Agent, tuple, Tensor]]  # for each epoch the agent, gae()'s arguments, its result
    updates: list[Update]
    envs: list[Counting]
    metrics: dict[str, float]
    checkpoint: dict[str, Any]
    scalars: dict[str, list[tuple[int, float]]]  # TensorBoard's (x, y)
    optimizer: torch.optim.Optimizer


SMALL = {
    "env_id": "ppo/Counting-v0", "num_envs": 3, "num_steps": 8, "num_minibatches": 4, "update_epochs": 3,
    "total_timesteps": 96, "learning_rate": 0.01, "gamma": 0.9, "gae_lambda": 0.7, "ent_coef": 0.05, "hidden_size": 8,
    "checkpoint_every": 0, "eval_episodes": 2, "device": "cpu",
}  # fmt: skip
NORMALIZED = {"normalize_obs": True, "normalize_rewards": True}
HUGE = {"env_id": "ppo/CountingBox-v0", "log_std_init": 2.3, **NORMALIZED}  # σ = 10
RUNS = pytest.mark.parametrize("flags", [{}, HUGE], ids=["discrete", "box"])


def run_train(**flags: Any) -> Trained:
    """Runs train() once for the same flags, with everything it calls in its place and its arguments written down."""
    return _run_train(tuple((SMALL | flags).items()))


@cache
def _run_train(flags: tuple) -> Trained:
    seen = SimpleNamespace(rollouts=[], advantages=[], updates=[])
    make_agent, make_update, gae, loss, collect = (
        ppo.Agent, ppo.make_update, ppo.gae, ppo.ppo_loss, ppo.Collector.collect,
    )  # fmt: skip

    def spy_agent(*args: Any) -> ppo.Agent:
        seen.agent = make_agent(*args)
        seen.start = copy.deepcopy(seen.agent.state_dict())
        return seen.agent

    def spy_make_update(loss: Any, params: Any, optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        seen.optimizer = optimizer
        return make_update(loss, params, optimizer, *rest)

    def spy_gae(*args: Any) -> Tensor:
        result = gae(*args)
        seen.advantages.append((copy.deepcopy(seen.agent), args, result))
        return result

    def spy_loss(agent: ppo.Agent, *batch: Tensor, **flags: Any) -> tuple[Tensor, dict[str, Tensor]]:
        learning_rate, batch = seen.optimizer.param_groups[0]["lr"], tuple(x.clone() for x in batch)
        seen.updates.append(Update(copy.deepcopy(agent), batch, flags, learning_rate, len(seen.advantages) - 1))
        return loss(agent, *batch, **flags)

    def spy_collect(*args: Any) -> tuple[ppo.Rollout, list]:
        rollout, ended = collect(*args)
        seen.rollouts.append(ppo.Rollout(*(x.clone() for x in rollout)))
        return rollout, ended

    counting_envs(0)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        for name, spy in (("Agent", spy_agent), ("make_update", spy_make_update), ("gae", spy_gae)):
            patch.setattr(ppo, name, spy)
        patch.setattr(ppo, "ppo_loss", spy_loss)
        patch.setattr(ppo.Collector, "collect", spy_collect)
        args = ppo.Args(**dict(flags), run_dir=directory)
        metrics = ppo.train(args)
        checkpoint = torch.load(f"{directory}/checkpoint.pt", weights_only=True)
        events = EventAccumulator(directory, {"scalars": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    envs = Counting.made[: args.num_envs]
    return Trained(
        args, seen.start, seen.rollouts, seen.advantages, seen.updates, envs, metrics, checkpoint, scalars,
        seen.optimizer,
    )  # fmt: skip


def rows(*tensors: Tensor) -> list[tuple[float, ...]]:
    """One tuple of numbers for each of the B transitions."""
    return list(map(tuple, torch.cat([x.reshape(24, -1).double() for x in tensors], 1).tolist()))


@RUNS
def test_ratio_is_1_at_the_first_minibatch_and_leaves_it_later(flags: dict):
    run = run_train(**flags)
    logratios = [(u.agent.actor(*u.batch[:2])[0] - u.batch[2]).abs().max().item() for u in run.updates]
    assert len(logratios) == 4 * 3 * 4
    assert max(logratios[::12]) < 1e-6
    assert min(logratios[i] for i in range(48) if i % 12) > 1e-4
    if flags:
        assert max(rollout.actions.abs().max() for rollout in run.rollouts) > 10


@RUNS
def test_gradient_of_the_first_minibatch_is_the_policy_gradient(flags: dict):
    for update in run_train(**flags).updates[::12]:
        agent, (obs, actions, _, advantages, _) = update.agent, update.batch
        loss, _ = ppo.ppo_loss(agent, *update.batch, **update.flags | {"vf_coef": 0.0, "ent_coef": 0.0})
        scaled = (advantages - advantages.mean()) / advantages.std(correction=0)
        vanilla = -(scaled * distribution(agent.actor, obs).log_prob(actions)).mean()
        ours, theirs = gradients(loss, agent), gradients(vanilla, agent)
        assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
        for name in ours:
            close(ours[name], theirs[name], 1e-5)


@RUNS
def test_every_epoch_has_each_transition_once_in_a_new_order(flags: dict):
    """What belongs together stays together: observation, action, log-probability, advantage and return."""
    run, orders = run_train(**flags), set()
    for epoch, (_, arguments, advantages) in enumerate(run.advantages):
        iteration, parts = epoch // 3, [u.batch for u in run.updates if u.epoch == epoch]
        first = run.updates[12 * iteration].agent
        rollout, values = run.rollouts[iteration], arguments[1]
        with torch.no_grad():
            seen = first.obs_norm(rollout.obs)
            logprobs, _ = first.actor(seen, rollout.actions)
        assert [len(part[0]) for part in parts] == [6] * 4
        batch = [torch.cat(column) for column in zip(*parts, strict=True)]
        expected = rows(seen, rollout.actions, logprobs, advantages, advantages + values)
        assert len({row[:2] for row in expected}) == 24
        np.testing.assert_allclose(sorted(rows(*batch)), sorted(expected), rtol=1e-5, atol=1e-5)
        orders.add(tuple(row[:2] for row in rows(batch[0])))
    assert len(orders) == 12


@RUNS
def test_advantages_come_from_the_newest_critic_and_the_true_successors(flags: dict):
    """At every transition, also the last of a rollout and of an episode; and again in every epoch."""
    run, previous = run_train(**flags), None
    logs = [env.log[: 8 * 4] for env in run.envs]
    expected, _ = hand_count(logs, run.args.gamma)
    for epoch, (agent, arguments, advantages) in enumerate(run.advantages):
        now = slice(8 * (epoch // 3), 8 * (epoch // 3) + 8)
        rewards, values, next_values, terminated, dones, gamma, lam = arguments
        with torch.no_grad():
            by_hand = [agent.critic(agent.obs_norm(torch.tensor(expected[x][now]))) for x in ("obs", "next_obs")]
        close(values, by_hand[0], 1e-5)
        close(next_values, by_hand[1], 1e-5)
        assert previous is None or (values - previous).abs().min() > 0
        ends = expected["terminated"][now], expected["terminated"][now] | expected["truncated"][now]
        assert (terminated.numpy() == ends[0]).all()
        assert (dones.numpy() == ends[1]).all()
        numbers = [x.double().numpy() for x in (rewards, *by_hand)]
        close(advantages, double_loop(*numbers, *ends, 0.9, 0.7), 1e-4)
        assert (gamma, lam) == (0.9, 0.7)
        previous = values
        if epoch % 3 == 0:
            returns = advantages + values
            explained = 1 - np.var((returns - values).numpy()) / np.var(returns.numpy())
            close(run.scalars["losses/explained_variance"][epoch // 3], (24 * (epoch // 3 + 1), explained), 1e-4)


@RUNS
def test_rollouts_of_a_run_follow_each_other(flags: dict):
    run = run_train(**flags)
    expected, _ = hand_count([env.log for env in run.envs], run.args.gamma)
    rollout = ppo.Rollout(*map(torch.cat, zip(*run.rollouts, strict=True)))
    close(rollout.obs, expected["obs"])
    close(rollout.rewards, expected["reward"])
    assert all([seed is None for seed in env.seeds] == [False] + [True] * (len(env.seeds) - 1) for env in run.envs)


@RUNS
def test_the_gradient_steps_can_be_taken_by_a_second_road(flags: dict):
    """Separate tensors, loss.backward(), clip_grad_norm_, plain Adam: the same parameters and the same metrics."""
    run = run_train(**flags)
    agent = copy.deepcopy(run.updates[0].agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1.0, eps=1e-5)
    metrics = defaultdict(list)
    for i, update in enumerate(run.updates):
        if i and i % 12 == 0 and run.args.normalize_obs:
            agent.update_obs_norm(run.rollouts[i // 12 - 1].obs)
        for param, then in zip(agent.parameters(), update.agent.parameters(), strict=True):
            close(param, then, 1e-4)
            param.data.copy_(then)  # rounding would grow from step to step
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - (i // 12) / 4)
        optimizer.zero_grad()
        coefs = {"clip_coef": 0.2, "vf_coef": 0.5, "ent_coef": 0.05, "normalize_advantages": True}
        loss, numbers = reference_loss(agent, *update.batch, **coefs)
        loss.backward()
        numbers["grad_norm"] = torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5).item()
        optimizer.step()
        for name, number in numbers.items():
            metrics[name].append(number)
    if run.args.normalize_obs:
        agent.update_obs_norm(run.rollouts[-1].obs)
    for name, value in agent.named_parameters():
        close(value, run.checkpoint["agent"][name], 1e-4)
    assert max(metrics["grad_norm"]) > 0.5
    assert max(metrics["clipfrac"]) > 0
    for name, numbers in metrics.items():
        means = np.mean(np.reshape(numbers, (4, 12)), 1)
        logged = [value for _, value in run.scalars[f"losses/{name}"]]
        np.testing.assert_allclose(logged, means, rtol=1e-4, atol=1e-5)
        assert run.metrics[f"losses/{name}"] == pytest.approx(logged[-1], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("flags", "updates"),
    [
        ({}, 4 * 3 * 4),
        ({"target_kl": 1e-5}, 4 * 1 * 4),  # iterations x epochs x minibatches
        ({"target_kl": 1e-6, "num_minibatches": 1}, 4 * 2),  # the policy has not moved when the first epoch is over
        ({"target_kl": 1e9}, 4 * 3 * 4),
        ({"num_minibatches": 24, "update_epochs": 1}, 4 * 24),  # single samples
        ({"total_timesteps": 73, "num_minibatches": 1}, 4 * 3),  # rounded up to a whole iteration
    ],
)
def test_number_of_updates(flags: dict, updates: int):
    run = run_train(**flags, anneal_lr=False)
    assert len(run.updates) == updates
    assert run.checkpoint["optimizer"]["state"][0]["step"] == updates
    assert run.checkpoint["step"] == sum(len(env.log) for env in run.envs) == 96
    assert all(torch.isfinite(value).all() for value in run.checkpoint["agent"].values())


def test_target_kl_is_compared_with_the_mean_of_one_epoch():
    """Where the mean of the third epoch is a hair above it, there are three; a hair below, there is one more.

    The last minibatch alone would end it earlier, as it is above the mean, and the mean of all three epochs later.
    """
    flags = {"anneal_lr": False, "total_timesteps": 24, "update_epochs": 5}
    logratios = [u.agent.actor(*u.batch[:2])[0] - u.batch[2] for u in run_train(**flags).updates]
    kls = np.reshape([(x.exp() - 1 - x).mean().item() for x in logratios], (5, 4))
    means = kls.mean(1).tolist()
    assert max(means[:2]) < kls[:3].mean() < 0.99 * means[2]
    assert 1.01 * means[2] < min(kls[2, 3], means[3])
    for factor, epochs in ((0.999, 3), (1.001, 4)):
        assert len(run_train(**flags, target_kl=factor * means[2]).advantages) == epochs


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_learning_rate(anneal_lr: bool):
    run = run_train(anneal_lr=anneal_lr)
    expected = [0.01, 0.0075, 0.005, 0.0025] if anneal_lr else [0.01] * 4
    assert [u.learning_rate for u in run.updates[::12]] == pytest.approx(expected)
    assert [u.learning_rate for u in run.updates[11::12]] == pytest.approx(expected)
    logged = run.scalars["charts/learning_rate"]
    assert [x for x, _ in logged] == [24, 48, 72, 96]
    assert [y for _, y in logged] == pytest.approx(expected)
    group = run.checkpoint["optimizer"]["param_groups"][0]
    assert group["lr"] == expected[-1] == pytest.approx(0.01 / 4 if anneal_lr else 0.01)
    assert group["eps"] == 1e-5


@pytest.mark.parametrize("env_id", ["ppo/Counting-v0", "ppo/CountingBox-v0"])
def test_one_update_changes_every_parameter(env_id: str):
    run = run_train(env_id=env_id, total_timesteps=24, num_minibatches=1, update_epochs=1)
    assert len(run.updates) == 1
    names = [name for name in run.start if not name.startswith("obs_norm")]
    assert len(names) == 12 + ("Box" in env_id)
    for name in names:
        assert not torch.equal(run.start[name], run.checkpoint["agent"][name]), name


def test_statistics_of_a_run():
    """Those of all it saw, in the checkpoint; in the loss those of the steps before, of rewards with the newest."""
    run = run_train(**HUGE)
    expected, _ = hand_count([env.log for env in run.envs], 0.9)
    saved, seen, discounted = run.checkpoint, expected["obs"].astype(float), expected["discounted"]
    close(saved["agent"]["obs_norm.mean"], seen.mean((0, 1)))
    close(saved["agent"]["obs_norm.var"], seen.var((0, 1)))
    close(saved["return_norm"]["mean"][0], discounted.mean(), 1e-5)
    np.testing.assert_allclose(saved["return_norm"]["var"], discounted.var(), rtol=1e-6)
    assert saved["agent"]["obs_norm.count"] == saved["return_norm"]["count"] == 96
    for k in range(4):
        now, before = slice(8 * k, 8 * k + 8), seen[: 8 * k].reshape(-1, 2)
        scaled = (seen[now] - before.mean(0)) / np.sqrt(before.var(0) + 1e-8) if k else seen[now]
        batch = torch.cat([u.batch[0] for u in run.updates[12 * k : 12 * k + 4]])
        np.testing.assert_allclose(
            sorted(rows(batch)), sorted(map(tuple, scaled.reshape(24, 2).clip(-10, 10))), atol=1e-4
        )
        rewards, deviation = run.advantages[3 * k][1][0], np.sqrt(discounted[: 8 * k + 8].var() + 1e-8)
        close(rewards, expected["reward"][now] / deviation, 1e-5)


@pytest.mark.parametrize("flag", NORMALIZED)
def test_each_flag_updates_its_own_statistics(flag: str):
    saved = run_train(**{flag: True}).checkpoint
    assert saved["agent"]["obs_norm.count"] == (96 if flag == "normalize_obs" else 0)
    assert saved["return_norm"]["count"] == (96 if flag == "normalize_rewards" else 0)


def test_statistics_stay_out_of_a_run_without_the_flags():
    run = run_train()
    for norm in (run.checkpoint["return_norm"], run.checkpoint["agent"]):
        prefix = "" if "count" in norm else "obs_norm."
        assert norm[f"{prefix}count"] == 0
        assert (norm[f"{prefix}scale"] == 1).all()
    assert [rows(r.rewards) for r in run.rollouts] == [rows(arguments[0]) for _, arguments, _ in run.advantages[::3]]


@RUNS
def test_raw_returns_are_logged_at_the_step_where_the_episode_ended(flags: dict):
    run = run_train(**flags)
    _, ended = hand_count([env.log for env in run.envs], 0.9)
    assert len(ended) > 20
    assert run.scalars["charts/episodic_return"] == [(clock, total) for clock, total, _ in ended]
    assert run.scalars["charts/episodic_length"] == [(clock, length) for clock, _, length in ended]
    assert len(run.scalars["eval/episodic_return"]) == 1
    for tag, points in run.scalars.items():
        assert all(math.isfinite(y) for _, y in points), tag


def test_environments_start_anew_after_a_checkpoint():
    run = run_train(checkpoint_every=48)
    seeds = [seed for env in run.envs for seed in env.seeds if seed is not None]
    assert len(seeds) == len(set(seeds)) == 3 * 2
    for env in run.envs:
        assert env.log[16].obs[0] == np.float32(0.01 * (100 * env.log[16].episode))
        assert env.log[16].episode > env.log[15].episode
    _, ended = hand_count([env.log for env in run.envs], 0.9)  # of which only whole episodes are logged
    assert run.scalars["charts/episodic_return"] == [(clock, total) for clock, total, _ in ended]


# -- one step of the optimiser -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@BOTH
def test_update_clips_the_gradient_of_all_parameters_together(space: gym.Space, optimizer: type, max_grad_norm: float):
    agent, batch = random_case(space)
    other, params = copy.deepcopy(agent), list(agent.parameters())
    flat = ppo.flatten(params)
    plain, ours = optimizer(other.parameters(), 0.1), optimizer([flat], 0.1)
    update = ppo.make_update(lambda *batch: ppo.ppo_loss(agent, *batch, **FLAGS), params, ours, max_grad_norm, False)
    for _ in range(3):
        metrics = update(*batch)
        plain.zero_grad()
        reference_loss(other, *batch, **FLAGS)[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), max_grad_norm)
        plain.step()
        close(metrics["losses/grad_norm"], norm, 1e-7)
        close(flat.grad.norm(), min(norm, max_grad_norm), 1e-6)
        for param, expected in zip(params, other.parameters(), strict=True):
            close(param, expected, 1e-6)
    assert torch.equal(torch.cat([param.flatten() for param in params]), flat)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's compiler itself
@pytest.mark.slow
def test_the_compiled_gradient_is_the_same():
    agent, batch = random_case(BOX)
    agent, batch = agent.float(), [x.float() for x in batch]
    grads, metrics = [], []
    for compiled in (False, True):
        one = copy.deepcopy(agent)
        params = list(one.parameters())
        optimizer = torch.optim.SGD([ppo.flatten(params)], 0.0)
        loss = ppo.partial(ppo.ppo_loss, one, **FLAGS)
        metrics.append(ppo.make_update(loss, params, optimizer, 0.5, compiled)(*batch))
        grads.append(optimizer.param_groups[0]["params"][0].grad)
    assert grads[0].norm() > 0.4
    close(grads[1], grads[0], 1e-5)
    for name, value in metrics[0].items():
        close(metrics[1][name], value, 1e-4)


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


gym.register("ppo/Target-v0", Target)


@pytest.mark.parametrize("broken", [False, True])
def test_learns_a_continuous_action(broken: bool, monkeypatch, tmp_path):
    """The threshold is one that an update with a wrong sign misses; the policy starts near −1/3."""
    surrogate = ppo.clipped_surrogate
    if broken:
        monkeypatch.setattr(ppo, "clipped_surrogate", lambda x, a, eps: surrogate(x, -a, eps))
    args = ppo.Args(
        env_id="ppo/Target-v0", total_timesteps=4_000, num_envs=4, num_steps=50, num_minibatches=2, update_epochs=5,
        learning_rate=0.01, hidden_size=16, device="cpu", eval_episodes=200, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (ppo.train(args)["eval/episodic_return"] > -0.02) == (not broken)


def test_learns_cartpole(tmp_path):
    args = ppo.Args(
        total_timesteps=15_000, num_envs=4, num_steps=128, num_minibatches=4, update_epochs=8, learning_rate=2e-3,
        gae_lambda=0.9, device="cpu", eval_episodes=10, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert ppo.train(args)["eval/episodic_return"] > 120  # at random 20, with a wrong sign 9
