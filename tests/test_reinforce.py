"""Proves that each estimator of reinforce.py has exactly the expectation it claims, and that the rest of it is right.

The expectations are exact, not statistical. One iteration of the shipped `train`, with step size 0, is run on every
trajectory of the MDP in tabular.py, or for the leave-one-out baselines on every pair or triple of trajectories. What it
hands to its loss and to its optimiser, weighted by the probability of the group, is compared with formulas of J, Q and
the state distribution that come from dynamic programming.
"""
import copy
import gc
import io
import math
import pickle
import tempfile
import warnings
import zipfile
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement, product
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tabular import MDP, REWARD, TERMINATES, TRANSITION, A, S, linear
from torch import Tensor

import reinforce

GAMMA = 0.8
OLD = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64)  # logits of the policy that acted
NEW = OLD + torch.tensor([[0.4, -0.3], [0.5, -0.2], [-0.6, 0.7]], dtype=torch.float64)  # and of a later one
WRONG_V = torch.tensor([[3.0], [-1.5], [0.7]], dtype=torch.float64)
WEIGHTS, DISCOUNTS = ("trajectory", "reward_to_go"), ("now", "start")
BASELINES, IMPORTANCES = ("none", "average", "optimal", "time", "value"), ("trajectory", "causal", "first_order")
GROUPED = ("average", "optimal", "time")  # the baselines that need other episodes
# Length of the bias of ∇J on this MDP with OLD and NEW, for what is an approximation
BIASES = {"now": 0.142781506, "trajectory": 0.0, "causal": 0.195394808, "first_order": 0.191459698}
# Groups of n trajectories are listed on ever smaller problems: 42 single ones, 136 pairs, 84 triples
MDPS = {1: MDP(horizon=3), 2: MDP(horizon=2), 3: MDP(horizon=2, start=(0.0, 1.0, 0.0))}


def powers(x: float, steps: int) -> Tensor:
    """x^t, (steps, 1)."""
    return torch.tensor([[x**t] for t in range(steps)], dtype=torch.float64)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- the shipped estimators on all trajectories ------------------------------------------------------------------------


class Iteration(NamedTuple):
    batch: tuple[Tensor, ...]  # what train() handed to reinforce_loss, the agent aside
    gradient: Tensor  # the estimate of ∇J: minus what it handed to the optimiser, of the actor's parameters in one row
    metrics: dict[str, float]
    learning_rate: float  # of the policy's optimiser
    ended: list[tuple[int, float, int]]  # episodes as they are logged: (steps of the iteration so far, return, length)


def new_agent(obs_dim: int, action_space: gym.Space) -> reinforce.Agent:
    space = spaces.Box(-1, 1, (obs_dim,))
    return reinforce.Agent(SimpleNamespace(observation_space=space, action_space=action_space), 5, -0.3)


def tabular_agent(theta: Tensor, values: Tensor = WRONG_V) -> reinforce.Agent:
    agent = new_agent(len(theta), spaces.Discrete(A)).double()
    agent.actor.net, agent.critic.net = linear(theta), linear(values)
    return agent


def run_train(batches: list[reinforce.Episodes], agent: reinforce.Agent, **flags: Any) -> list[Iteration]:
    """The shipped train() with these episodes in place of those it would run, one iteration each, and step size 0."""
    feed, seen, iterations = iter(batches), [], []
    loss, end_iteration = reinforce.reinforce_loss, reinforce.Run.end_iteration

    def spy_loss(agent: reinforce.Agent, *batch: Tensor, importance: str) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(batch)
        return loss(agent, *batch, importance=importance)

    def spy_end(run: reinforce.Run, steps: int, ended: list, metrics: dict[str, float]) -> None:
        (group,) = run.parts["optimizer"].param_groups
        gradient = -torch.cat([param.grad.flatten() for param in group["params"]])
        iterations.append(Iteration(seen[-1], gradient, metrics, group["lr"], ended))
        end_iteration(run, steps, ended, metrics)

    steps = sum(int(episodes.mask.sum()) for episodes in batches)
    flags = {"gamma": GAMMA, "learning_rate": 0.0, "critic_learning_rate": 0.0, "critic_epochs": 1} | flags
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(reinforce, "Agent", lambda *_: agent)
        patch.setattr(reinforce, "run_episodes", lambda *_: next(feed))
        patch.setattr(reinforce, "reinforce_loss", spy_loss)
        patch.setattr(reinforce.Run, "end_iteration", spy_end)
        patch.setattr(reinforce.Run, "log", lambda *_: None)  # slow
        flags |= {"env_id": "Tabular-v0", "num_envs": batches[0].mask.shape[1], "total_timesteps": steps}
        flags |= {"run_dir": directory, "checkpoint_every": 0, "eval_episodes": 0, "device": "cpu"}
        reinforce.train(reinforce.Args(**flags))
    assert len(iterations) == len(batches)
    return iterations


def tabular_episodes(mdp: MDP, chosen: Any) -> reinforce.Episodes:
    batch = mdp.batch(chosen)
    return reinforce.Episodes(batch.obs, batch.actions, batch.rewards, batch.mask)


@cache
def shipped(
    weight: str, discount_from: str, baseline: str, n: int, gamma: float = GAMMA
) -> tuple[Tensor, list[Iteration]]:
    """The probability of every group of n trajectories under OLD, in any order, and what train() makes of the group."""
    mdp = MDPS[n]
    single = mdp.probabilities(OLD.softmax(-1))
    groups = list(combinations_with_replacement(range(len(single)), n))
    orders = [math.factorial(n) / math.prod(map(math.factorial, Counter(group).values())) for group in groups]
    iterations = run_train(
        [tabular_episodes(mdp, group) for group in groups], tabular_agent(OLD),
        weight=weight, discount_from=discount_from, baseline=baseline, gamma=gamma,
    )  # fmt: skip
    return torch.tensor(orders, dtype=torch.float64) * single[torch.tensor(groups)].prod(1), iterations


def on_policy(iterations: list[Iteration]) -> Tensor:
    """The estimates of ∇J at OLD that the optimiser got, (groups, S, A)."""
    return torch.stack([iteration.gradient.reshape(A, S).T for iteration in iterations])


def off_policy(iterations: list[Iteration], theta: Tensor, importance: str) -> Tensor:
    """The estimates of ∇J at theta from the same batches, (groups, S, A)."""
    agent, grads = tabular_agent(theta), []
    for iteration in iterations:
        loss, _ = reinforce.reinforce_loss(agent, *iteration.batch, importance=importance)
        grads.append(-torch.autograd.grad(loss, agent.actor.net.weight)[0].T)
    return torch.stack(grads)


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.tensordot(probabilities, values, 1)


def variance(probabilities: Tensor, grads: Tensor) -> float:
    """E‖ĝ − Eĝ‖², summed over the parameters."""
    return float(probabilities @ (grads - expectation(probabilities, grads)).square().flatten(1).sum(1))


def true_gradient(mdp: MDP, theta: Tensor, gamma: float = GAMMA) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(mdp.objective(theta.softmax(-1), gamma), theta)[0]


def formula(mdp: MDP, discount_from: str, theta: Tensor, states: Tensor, future: Tensor) -> Tensor:
    """Σ_t c_t E[∇ log π_θ(a|s) Q_t(s,a)], a from θ, s_t from the policy `states`, Q of `future`; c_t is γ^t or 1."""
    theta = theta.clone().requires_grad_()
    discount = powers(GAMMA if discount_from == "start" else 1.0, mdp.horizon)
    _, q_values = mdp.values(future.softmax(-1), GAMMA)
    surrogate = mdp.surrogate(theta.softmax(-1), discount * mdp.occupancy(states.softmax(-1)), q_values)
    return torch.autograd.grad(surrogate, theta)[0]


@pytest.mark.parametrize("mdp", [*MDPS.values(), MDP(horizon=4), MDP(timed=True)])
def test_dynamic_programming_and_enumeration_agree(mdp: MDP):
    theta = (OLD.repeat(mdp.rows // S, 1) + torch.linspace(-1, 1, 2 * mdp.rows).reshape(-1, 2)).requires_grad_()
    pi = theta.softmax(-1)
    probabilities, batch = mdp.probabilities(pi), mdp.batch()
    by_listing = probabilities @ (powers(GAMMA, mdp.horizon) * batch.rewards).sum(0)
    by_programming = mdp.objective(pi, GAMMA)
    close(probabilities.sum(), 1.0)
    close(by_listing, by_programming)
    close(*(torch.autograd.grad(J, theta, retain_graph=True)[0] for J in (by_listing, by_programming)))
    assert len({float(r) for r in REWARD.flatten()}) == REWARD.numel()
    (values, q_values), occupancy = mdp.values(pi, GAMMA), mdp.occupancy(pi)
    for t, s in product(range(mdp.horizon), range(S)):  # E[G_t | s_t, a_t] by conditioning on the listed trajectories
        returns = sum(GAMMA ** (u - t) * batch.rewards[u] for u in range(t, mdp.horizon))
        here = batch.mask[t] & (batch.rows[t] == mdp.row(t, s))
        close(probabilities[here].sum(), occupancy[t, s])
        for a in range(A) if here.any() else ():
            there = here & (batch.actions[t] == a)
            close(probabilities[there] @ returns[there] / probabilities[there].sum(), q_values[t, s, a])
        if here.any():
            close(probabilities[here] @ returns[here] / probabilities[here].sum(), values[t, s])


def test_the_environment_walks_the_listed_trajectories_and_no_others():
    env, walked = gym.make("Tabular-v0", disable_env_checker=True).unwrapped, set()
    rng, listed, batch = np.random.default_rng(0), MDP().trajectories, MDP().batch()
    for episode in range(600):
        obs, _ = env.reset(seed=episode)
        path, flags, rewards = [], [(False, False)], []
        while not any(flags[-1]):
            action = int(rng.integers(A))
            next_obs, reward, *ends, _ = env.step(action)
            path.append((int(obs.argmax()), action, int(next_obs.argmax())))
            flags.append(tuple(ends))
            rewards.append(reward)
            obs = next_obs
        i, steps = listed.index(tuple(path)), len(path)
        walked.add(i)
        assert batch.mask[:, i].sum() == steps
        assert batch.rewards[:steps, i].tolist() == rewards
        assert list(zip(batch.terminated[:steps, i], batch.truncated[:steps, i], strict=True)) == flags[1:]
    assert len(walked) > 0.9 * len(listed)
    assert TERMINATES.sum() == 1
    assert TRANSITION[TERMINATES] > 0


# -- expectation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "discount_from", "baseline"), list(product(WEIGHTS, DISCOUNTS, BASELINES)))
def test_expected_gradient(weight: str, discount_from: str, baseline: str):
    """With any baseline: `start` is ∇J, `now` is Σ_t E[∇ log π Q_t]; off-policy as the docstring says of each kind."""
    n = 2 if baseline in GROUPED else 1
    mdp, (probabilities, iterations) = MDPS[n], shipped(weight, discount_from, baseline, n)
    mean = expectation(probabilities, on_policy(iterations))
    close(mean, formula(mdp, discount_from, OLD, OLD, OLD))
    if discount_from == "start":
        close(mean, true_gradient(mdp, OLD))
        close(formula(mdp, discount_from, NEW, NEW, NEW), true_gradient(mdp, NEW))
    for importance, (states, future) in zip(IMPORTANCES, [(NEW, NEW), (NEW, OLD), (OLD, OLD)], strict=True):
        claimed = formula(mdp, discount_from, NEW, states, future)
        close(expectation(probabilities, off_policy(iterations, NEW, importance)), claimed)
        few = iterations[::9]
        close(off_policy(few, OLD, importance), on_policy(few))  # at θ = β nothing is reweighted


@pytest.mark.parametrize("baseline", GROUPED)
def test_expected_gradient_of_three_episodes(baseline: str):
    probabilities, iterations = shipped("reward_to_go", "start", baseline, 3)
    close(expectation(probabilities, on_policy(iterations)), true_gradient(MDPS[3], OLD))
    mean = expectation(probabilities, off_policy(iterations, NEW, "trajectory"))
    close(mean, true_gradient(MDPS[3], NEW))


def test_bias_of_discounting_from_now():
    """It is Σ_t (1 − γ^t) E[∇ log π Q_t], not small, and 0 with γ = 1."""
    probabilities, iterations = shipped("reward_to_go", "now", "none", 1)
    bias = expectation(probabilities, on_policy(iterations)) - true_gradient(MDPS[1], OLD)
    theta, batch = OLD.clone().requires_grad_(), MDPS[1].batch()
    missing = torch.zeros((), dtype=torch.float64)  # by listing, with the factor that `now` lacks
    for t, u in product(range(3), range(3)):
        logprobs = torch.distributions.Categorical(logits=theta[batch.rows[t]]).log_prob(batch.actions[t])
        score = MDPS[1].probabilities(OLD.softmax(-1)) * logprobs * batch.mask[t]
        missing = missing + (score @ batch.rewards[u]) * (GAMMA ** (u - t) - GAMMA**u if u >= t else 0)
    close(bias, torch.autograd.grad(missing, theta)[0])
    assert float(bias.norm()) == pytest.approx(BIASES["now"], rel=1e-6)
    for discount_from in DISCOUNTS:
        probabilities, iterations = shipped("reward_to_go", discount_from, "none", 1, gamma=1.0)
        close(expectation(probabilities, on_policy(iterations)), true_gradient(MDPS[1], OLD, gamma=1.0))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_bias_of_importance_weights(importance: str):
    """Exact for `trajectory` alone; the sizes are those of this MDP, NEW and OLD."""
    probabilities, iterations = shipped("reward_to_go", "start", "none", 1)
    bias = expectation(probabilities, off_policy(iterations, NEW, importance)) - true_gradient(MDPS[1], NEW)
    assert float(bias.norm()) == pytest.approx(BIASES[importance], rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("n", [2, 3])
def test_an_episode_in_its_own_baseline_would_bias(n: int):
    """By the factor 1 − 1/N: the contrast to the shipped baselines, which leave it out."""
    probabilities, iterations = shipped("trajectory", "start", "none", n)
    agent, grads = tabular_agent(OLD), []
    for obs, actions, old_logprobs, returns, mask in (iteration.batch for iteration in iterations):
        batch = (obs, actions, old_logprobs, returns - returns[0].mean(), mask)
        loss, _ = reinforce.reinforce_loss(agent, *batch, importance="trajectory")
        grads.append(-torch.autograd.grad(loss, agent.actor.net.weight)[0].T)
    close(expectation(probabilities, torch.stack(grads)), (1 - 1 / n) * true_gradient(MDPS[n], OLD))


# -- variance ----------------------------------------------------------------------------------------------------------


def spread(weight: str, discount_from: str, baseline: str, n: int) -> float:
    probabilities, iterations = shipped(weight, discount_from, baseline, n)
    return variance(probabilities, on_policy(iterations))


@pytest.mark.parametrize("discount_from", DISCOUNTS)
def test_reward_to_go_and_baselines_lower_the_variance(discount_from: str):
    """Even a baseline from one other episode, which adds noise of its own, as all rewards of this MDP are positive.

    `value` has a test of its own below: a wrong V may do harm.
    """
    for n in (1, 2):
        assert spread("reward_to_go", discount_from, "none", n) < 0.75 * spread("trajectory", discount_from, "none", n)
    for weight, baseline in product(WEIGHTS, GROUPED):
        assert spread(weight, discount_from, baseline, 2) < 0.35 * spread(weight, discount_from, "none", 2)


@pytest.mark.parametrize(("weight", "discount_from"), list(product(WEIGHTS, DISCOUNTS)))
def test_logged_variance_is_that_of_the_estimate(weight: str, discount_from: str):
    """In expectation, where episodes are independent. A leave-one-out baseline ties them: the log is then too small."""
    for baseline in ("none", "value", "average"):
        probabilities, iterations = shipped(weight, discount_from, baseline, 2)
        logged = torch.tensor([i.metrics["losses/gradient_variance"] for i in iterations], dtype=torch.float64)
        exact = spread(weight, discount_from, baseline, 2)
        if baseline == "average":
            assert 0.5 * exact < float(probabilities @ logged) < 0.9 * exact
        else:
            close(probabilities @ logged, exact)


@pytest.mark.parametrize(("weight", "discount_from"), list(product(WEIGHTS, DISCOUNTS)))
def test_the_true_values_lower_the_variance(weight: str, discount_from: str):
    """V_t(s) is in reach where the observation shows the time."""
    mdp = MDP(timed=True)
    theta = OLD.repeat(mdp.horizon + 1, 1)
    agent = tabular_agent(theta, mdp.values(theta.softmax(-1), GAMMA)[0].reshape(-1, 1))
    batches = [tabular_episodes(mdp, [i]) for i in range(len(mdp.trajectories))]
    probabilities, variances = mdp.probabilities(theta.softmax(-1)), []
    for baseline in ("value", "none"):
        iterations = run_train(batches, agent, weight=weight, discount_from=discount_from, baseline=baseline)
        variances.append(variance(probabilities, torch.stack([iteration.gradient for iteration in iterations])))
    assert variances[0] < (0.15 if weight == "reward_to_go" else 0.5) * variances[1]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_optimal_baseline_has_the_least_variance_of_all_constants(weight: str):
    """In the limit of many episodes: trajectories count with their probability, and the one left out is a row of 0."""
    mdp, batch = MDPS[1], MDPS[1].batch()
    probabilities, actor = mdp.probabilities(OLD.softmax(-1)), tabular_agent(OLD).actor
    returns = reinforce.discounted_sum(batch.rewards, torch.full_like(batch.rewards, GAMMA))
    psi = returns if weight == "reward_to_go" else returns[0].expand_as(returns)
    scores = reinforce.episode_gradients(actor, batch.obs, batch.actions, batch.mask.double())
    grads = reinforce.episode_gradients(actor, batch.obs, batch.actions, batch.mask * psi)
    rows = [torch.cat([x * probabilities.sqrt().unsqueeze(1), torch.zeros(1, S * A)]) for x in (scores, grads)]
    best = float(reinforce.optimal_baseline(*rows)[-1])
    if weight == "trajectory":  # E[‖g‖² R] / E[‖g‖²]
        squares = probabilities * scores.square().sum(1)
        close(best, squares @ psi[0] / squares.sum())
    least = variance(probabilities, grads - best * scores)
    for constant in [*np.linspace(-3, 10, 53), best - 1e-3, best + 1e-3, float(probabilities @ psi[0])]:
        assert variance(probabilities, grads - constant * scores) > least
    assert least < 0.6 * variance(probabilities, grads)


# -- one iteration against plain loops ---------------------------------------------------------------------------------


def random_episodes(lengths: list[int], obs_dim: int, action_space: gym.Space, seed: int = 0) -> reinforce.Episodes:
    rng, shape = np.random.default_rng(seed), (max(lengths), len(lengths))
    mask = np.arange(shape[0])[:, None] < np.array(lengths)
    discrete = isinstance(action_space, spaces.Discrete)
    actions = rng.integers(action_space.n, size=shape) if discrete else rng.normal(size=(*shape, *action_space.shape))
    columns = rng.normal(size=(*shape, obs_dim)), actions, rng.normal(1, 2, shape) * mask, mask
    return reinforce.Episodes(*map(torch.as_tensor, columns))


def random_agent(obs_dim: int, action_space: gym.Space, dtype: torch.dtype = torch.float64) -> reinforce.Agent:
    torch.manual_seed(0)
    agent = new_agent(obs_dim, action_space)
    for parameter in agent.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return agent if dtype is torch.float32 else agent.to(dtype)


def distribution(actor: torch.nn.Module, obs: Tensor) -> torch.distributions.Distribution:
    if hasattr(actor, "log_std"):
        return torch.distributions.MultivariateNormal(actor.net(obs), torch.diag(actor.log_std.exp().square()))
    return torch.distributions.Categorical(logits=actor.net(obs))


LENGTHS = [4, 1, 3, 2]
TWO_AXES = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("space", [spaces.Discrete(3), TWO_AXES], ids=["categorical", "gaussian"])
@pytest.mark.parametrize(("weight", "discount_from", "baseline"), list(product(WEIGHTS, DISCOUNTS, BASELINES)))
def test_one_iteration(space: gym.Space, weight: str, discount_from: str, baseline: str):
    """Advantages, gradient and every metric that is logged, from their definitions, one episode and step at a time."""
    agent, episodes = random_agent(3, space), random_episodes(LENGTHS, 3, space)
    flags = {"weight": weight, "discount_from": discount_from, "baseline": baseline}
    (iteration,) = run_train([episodes], agent, **flags)
    n, steps = len(LENGTHS), [(t, i) for i, length in enumerate(LENGTHS) for t in range(length)]
    params, obs, r = list(agent.actor.parameters()), episodes.obs, episodes.rewards.numpy()
    pi = distribution(agent.actor, obs)
    logprobs, values = pi.log_prob(episodes.actions), agent.critic(obs).detach()

    def factor(t: int, u: int) -> float:  # of the reward at u in the weight of the action at t
        if u < t and weight == "reward_to_go":
            return 0.0
        return GAMMA**u if discount_from == "start" else GAMMA ** max(u - t, 0)

    def gradient(i: int, w: dict[tuple[int, int], float]) -> np.ndarray:  # Σ_t w_ti ∇ log π of episode i
        total = sum(w[t, i] * logprobs[t, i] for t in range(LENGTHS[i]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, params, retain_graph=True)]).numpy()

    psi = {(t, i): sum(factor(t, u) * r[u, i] for u in range(LENGTHS[i])) for t, i in steps}
    scores = [gradient(i, dict.fromkeys(steps, 1.0)) for i in range(n)]
    weighted = [gradient(i, psi) for i in range(n)]

    def subtracted(t: int, i: int) -> float:
        others = [j for j in range(n) if j != i]
        if baseline == "average":
            return np.mean([np.mean([psi[u, j] for u in range(LENGTHS[j])]) for j in others])
        if baseline == "time":
            return np.mean([psi[t, j] for j in others if LENGTHS[j] > t] or [0.0])
        if baseline == "optimal":
            return sum(scores[j] @ weighted[j] for j in others) / sum(scores[j] @ scores[j] for j in others)
        return float(values[t, i]) * (GAMMA**t if discount_from == "start" else 1) if baseline == "value" else 0.0

    advantages = {(t, i): psi[t, i] - subtracted(t, i) for t, i in steps}
    grads = [gradient(i, advantages) for i in range(n)]
    close([iteration.batch[3][step] for step in steps], list(advantages.values()))
    close(iteration.gradient, np.mean(grads, 0))
    metrics = {name.removeprefix("losses/"): value for name, value in iteration.metrics.items()}
    close(metrics["gradient_variance"], sum(np.var(grads, 0, ddof=1)) / n)
    close(metrics["grad_norm"], np.linalg.norm(np.mean(grads, 0)))
    close(metrics["policy_loss"], -sum(logprobs[step].item() * advantages[step] for step in steps) / n)
    close(metrics["entropy"], np.mean([pi.entropy()[step].item() for step in steps]))
    close(metrics["approx_kl"], 0.0)
    close(metrics["charts/discounted_return"], np.mean([sum(GAMMA**t * r[t, i] for t in range(4)) for i in range(n)]))
    assert ("value_loss" in metrics) == ("explained_variance" in metrics) == (baseline == "value")
    if baseline == "value":
        to_go = np.array([sum(GAMMA ** (u - t) * r[u, i] for u in range(t, LENGTHS[i])) for t, i in steps])
        error = to_go - np.array([float(values[step]) for step in steps])
        close(metrics["value_loss"], np.mean(error**2))
        close(metrics["explained_variance"], 1 - np.var(error) / np.var(to_go), 1e-8)


def test_episodes_are_logged_where_they_end():
    """While all of lengths 3, 1, 2 run: after 3 steps in all the second ends, after 5 the third, after 6 the first."""
    episodes = random_episodes([3, 1, 2], 3, spaces.Discrete(3))
    (iteration,) = run_train([episodes], random_agent(3, spaces.Discrete(3)))
    assert [(step, length) for step, _, length in iteration.ended] == [(3, 1), (5, 2), (6, 3)]
    close([total for _, total, _ in iteration.ended], episodes.rewards.sum(0)[[1, 2, 0]])


def test_normalised_advantages_have_mean_0_and_deviation_1_over_the_steps_taken():
    agent, episodes = random_agent(3, TWO_AXES), random_episodes(LENGTHS, 3, TWO_AXES)
    raw, scaled = (
        run_train([episodes], agent, normalize_advantages=on)[0].batch[3][episodes.mask] for on in (False, True)
    )
    close(scaled, (raw - raw.mean()) / raw.std(correction=0), 1e-6)


def test_observations_are_normalised_by_earlier_steps_taken():
    agent = random_agent(3, TWO_AXES)
    batches = [random_episodes(LENGTHS, 3, TWO_AXES, seed) for seed in (1, 2)]
    first, second = run_train(batches, agent, normalize_obs=True)
    close(first.batch[0], batches[0].obs)
    rows = batches[0].obs[batches[0].mask]
    close(second.batch[0], (batches[1].obs - rows.mean(0)) / (rows.var(0, correction=0) + 1e-8).sqrt())
    assert agent.obs_norm.count == 2 * sum(LENGTHS)
    rows = torch.cat([episodes.obs[episodes.mask] for episodes in batches])
    close(agent.obs_norm.mean, rows.mean(0))
    close(agent.obs_norm.var, rows.var(0, correction=0))


def test_later_epochs_are_off_policy():
    agent, episodes = random_agent(3, TWO_AXES), random_episodes(LENGTHS, 3, TWO_AXES)
    before = copy.deepcopy(agent)
    (iteration,) = run_train([episodes], agent, update_epochs=3, learning_rate=0.01, importance="causal")
    close(iteration.batch[2], before.actor(episodes.obs, episodes.actions)[0])
    assert iteration.metrics["losses/approx_kl"] > 1e-6


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_gradient_steps_can_be_taken_by_a_second_road(importance: str):
    """Separate tensors, backward() and plain Adam: steps of the policy, then of a critic that had not seen the batch.

    Twice: the second iteration starts halfway through the run, which only the policy's learning rate heeds.
    """
    agent, episodes = random_agent(3, TWO_AXES), random_episodes(LENGTHS, 3, TWO_AXES)
    agent.obs_norm.update(1 + 3 * torch.randn(50, 3).double())
    other, mask = copy.deepcopy(agent), episodes.mask
    flags = {"learning_rate": 0.01, "update_epochs": 3, "critic_learning_rate": 0.02, "critic_epochs": 4}
    iterations = run_train([episodes] * 2, agent, importance=importance, **flags)
    obs = other.obs_norm(episodes.obs)
    returns = reinforce.discounted_sum(episodes.rewards, torch.full_like(episodes.rewards, GAMMA))
    actor, critic = (torch.optim.Adam(net.parameters(), lr=0.02, eps=1e-5) for net in (other.actor, other.critic))
    for iteration, learning_rate in zip(iterations, (0.01, 0.005), strict=True):
        advantages = ((returns - other.critic(obs)) * mask).detach()
        close(iteration.batch[3] * mask, advantages)
        actor.param_groups[0]["lr"] = learning_rate
        old = distribution(other.actor, obs).log_prob(episodes.actions).detach()
        for _ in range(3):
            logprobs = distribution(other.actor, obs).log_prob(episodes.actions)
            logratio = ((logprobs - old) * mask).detach()
            products = {"trajectory": logratio.sum(0), "causal": logratio.cumsum(0), "first_order": logratio}
            actor.zero_grad()
            (-(products[importance].exp() * advantages * logprobs).sum() / 4).backward()
            actor.step()
        for _ in range(4):
            critic.zero_grad()
            (other.critic(obs) - returns)[mask].square().mean().backward()
            critic.step()
    for param, expected in zip(agent.parameters(), other.parameters(), strict=True):
        close(param, expected)


@pytest.mark.parametrize(("anneal_lr", "expected"), [(True, [1.0, 0.75, 0.5]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_from_all_of_it_to_more_than_0(anneal_lr: bool, expected: list[float]):
    """After 0, 10 and 20 of 40 steps, in the optimiser as in the log."""
    batches = [random_episodes(LENGTHS, 3, TWO_AXES)] * 4
    iterations = run_train(batches, random_agent(3, TWO_AXES), learning_rate=1e-3, anneal_lr=anneal_lr)
    close([iteration.learning_rate for iteration in iterations[:3]], [1e-3 * x for x in expected])
    assert iterations[-1].learning_rate > 0
    assert all(iteration.metrics["charts/learning_rate"] == iteration.learning_rate for iteration in iterations)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_importance_weights(importance: str):
    logratio = torch.tensor([[0.5, -1.0], [0.25, 2.0], [-2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    exponents = {"trajectory": [[-1.25, 1.0]] * 3, "causal": [[0.5, -1.0], [0.75, 1.0], [-1.25, 1.0]]}
    weights = reinforce.importance_weights(logratio, importance)
    close(weights, torch.tensor(exponents.get(importance, logratio.tolist()), dtype=torch.float64).exp())
    assert not weights.requires_grad


# -- returns, baselines, losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [2.75, 3.5, 3.0]),
        ({"discount_from": "start"}, [2.75, 1.75, 0.75]),
        ({"weight": "trajectory", "discount_from": "start"}, [2.75, 2.75, 2.75]),
        ({"weight": "trajectory"}, [2.75, 4.5, 6.0]),  # 1 and 1 + 2 came before
    ],
)
def test_weights_of_rewards_1_2_3(flags: dict, expected: list[float]):
    episodes = random_episodes([3], 3, TWO_AXES)._replace(rewards=torch.tensor([[1.0], [2.0], [3.0]]).double())
    (iteration,) = run_train([episodes], random_agent(3, TWO_AXES), gamma=0.5, baseline="none", **flags)
    close(iteration.batch[3].squeeze(1), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64])
def test_discounted_sum(steps: int):
    rng = np.random.default_rng(steps)
    x, c = rng.normal(size=(steps, 3, 2)), rng.uniform(size=(steps, 3, 2)) * (rng.uniform(size=(steps, 3, 2)) < 0.8)
    y = [sum(np.prod(c[t:u], axis=0) * x[u] for u in range(t, steps)) for t in range(steps)]
    close(reinforce.discounted_sum(torch.from_numpy(x), torch.from_numpy(c)), np.array(y))
    with pytest.raises(AssertionError):
        reinforce.discounted_sum(torch.zeros(steps, 1), torch.zeros(steps))


def test_an_episode_is_not_in_its_own_baseline():
    rng = np.random.default_rng(0)
    mask = torch.arange(4).unsqueeze(1) < torch.tensor(LENGTHS)
    weights, scores = torch.from_numpy(rng.normal(size=(4, 4))), torch.from_numpy(rng.normal(size=(4, 6)))
    for i in range(4):
        changed, changed_scores = weights.clone(), scores.clone()
        changed[:, i], changed_scores[i] = 1e3, 7.0
        for baseline in (reinforce.average_baseline, reinforce.time_baseline):
            before, after = baseline(weights, mask), baseline(changed, mask)
            close(after[..., i], before[..., i])
            assert all((after[0, j] if after.ndim == 2 else after[j]) > 100 for j in range(4) if j != i)
        before, after = (reinforce.optimal_baseline(x, x * w) for x, w in ((scores, 2.0), (changed_scores, 3.0)))
        close(before, torch.full((4,), 2.0))
        close(after, torch.full((4,), 3.0))
        grads = scores * weights.sum(1, keepdim=True)
        changed_grads = grads.clone()
        changed_grads[i] = 50.0
        before, after = (reinforce.optimal_baseline(*x) for x in ((scores, grads), (changed_scores, changed_grads)))
        close(after[i], before[i])
        assert (after - before).abs().argsort()[0] == i


def test_optimal_baseline_beside_an_episode_with_a_much_larger_score():
    """In float32, where the sum over all minus the own term would have lost the small one."""
    scores, grads = torch.tensor([[1.0], [2e-4]]), torch.tensor([[1.0], [6e-4]])  # ratios 1 and 3
    close(reinforce.optimal_baseline(scores, grads), [3.0, 1.0], 1e-3)


def test_pseudo_loss():
    generator = torch.Generator().manual_seed(0)
    logprobs, weights = (torch.randn(5, 4, generator=generator).double().requires_grad_() for _ in range(2))
    loss = reinforce.pseudo_loss(logprobs, weights)
    close(loss, -sum(w * x for w, x in zip(weights.flatten(), logprobs.flatten(), strict=True)) / 4)
    close(torch.autograd.grad(loss, logprobs)[0], -weights / 4)
    assert torch.autograd.grad(reinforce.pseudo_loss(logprobs, weights), weights, allow_unused=True) == (None,)
    order = torch.tensor([2, 0, 3, 1])
    close(reinforce.pseudo_loss(logprobs[:, order], weights[:, order]), loss)
    close(reinforce.pseudo_loss(logprobs.repeat(1, 3), weights.repeat(1, 3)), loss)  # a mean over episodes
    close(reinforce.pseudo_loss(logprobs.repeat(3, 1), weights.repeat(3, 1)), 3 * loss)  # and a sum over steps
    with pytest.raises(AssertionError):
        reinforce.pseudo_loss(logprobs[:, :1], weights)


def test_policy_loss_does_not_train_the_critic_nor_is_changed_after_the_end():
    agent, (obs, actions, rewards, mask) = random_agent(3, TWO_AXES), random_episodes(LENGTHS, 3, TWO_AXES)
    old = torch.zeros_like(rewards)

    def loss_and_metrics(junk: float, importance: str) -> tuple[Tensor, dict[str, Tensor]]:
        batch = [torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, junk) for x in (obs, actions, old)]
        return reinforce.reinforce_loss(agent, *batch, torch.where(mask, rewards, junk), mask, importance=importance)

    for importance in IMPORTANCES:
        (loss, metrics), (other, others) = (loss_and_metrics(junk, importance) for junk in (0.0, 2.0))
        close(loss, other)
        close(torch.stack(list(metrics.values())), torch.stack(list(others.values())))
        assert set(torch.autograd.grad(loss, agent.critic.parameters(), allow_unused=True, retain_graph=True)) == {None}
        assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, list(agent.actor.parameters())))


def test_value_loss_and_explained_variance():
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = reinforce.value_loss(values, returns)
    close(loss, (1 + 1 + 9) / 3)
    close(torch.autograd.grad(loss, values)[0], [2 / 3, -2 / 3, 2.0])
    assert not reinforce.value_loss(values.detach(), returns).requires_grad
    with pytest.raises(AssertionError):
        reinforce.value_loss(values.unsqueeze(1), returns)
    close(reinforce.explained_variance(returns, returns), 1.0)
    close(reinforce.explained_variance(torch.full((3,), 5.0), returns), 0.0, 1e-7)
    close(reinforce.explained_variance(values, returns), 1 - np.var([1, -1, 3]) / np.var([0, 3, 1]), 1e-7)


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-1, 1, (3,))], ids=["categorical", "gaussian"])
def test_logprob_and_entropy(space: gym.Space):
    """Values and gradients as torch.distributions has them, summed over the dimensions of an action."""
    agent, (obs, actions, *_) = random_agent(2, space), random_episodes([6] * 4, 2, space)
    pi = distribution(agent.actor, obs)
    for actual, expected in zip(agent.actor(obs, actions), (pi.log_prob(actions), pi.entropy()), strict=True):
        assert actual.shape == (6, 4)
        close(actual, expected)
        weights, params = torch.linspace(-1, 2, 24).reshape(6, 4), list(agent.actor.parameters())
        grads = (torch.autograd.grad((weights * x).sum(), params, retain_graph=True, allow_unused=True)
                 for x in (actual, expected))  # fmt: skip
        for one, other in zip(*grads, strict=True):
            close(torch.zeros(()) if one is None else one, torch.zeros(()) if one is None else other)


def acting(space: gym.Space) -> tuple[reinforce.Agent, Any, Tensor]:
    """An agent that normalises, its act(obs, noise), and what its networks see of two observations."""
    agent, obs = random_agent(2, space, torch.float32), torch.tensor([[2.0, 5.0], [4.0, -1.0]])
    agent.obs_norm.update(torch.tensor([[1.0, 2.0], [3.0, 8.0], [5.0, -2.0]]))
    for parameter in agent.actor.parameters():
        parameter.data.mul_(2)
    act = agent.policy()
    return agent, lambda i, noise: act(obs[i].expand(len(noise), 2).numpy(), noise), agent.obs_norm(obs)


def test_categorical_actions_are_drawn_from_the_policy():
    agent, act, seen = acting(spaces.Discrete(4))
    probs = agent.actor(seen.unsqueeze(1).expand(2, 4, 2), torch.arange(4).expand(2, 4))[0].exp().double().detach()
    draws = 100_000
    for i in range(2):
        expected = draws * probs[i].numpy()
        counts = np.bincount(act(i, agent.actor.noise(draws).numpy()), minlength=4)
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # χ² with 3 degrees of freedom, p = 0.001
        assert act(i, np.zeros((1, 1))) == probs[i].argmax()
    assert probs.max() > 0.5
    assert agent.actor.noise(5, 2).shape == (5, 2, 4)


def test_gaussian_actions_are_drawn_from_the_policy():
    agent, act, seen = acting(TWO_AXES)
    agent.actor.log_std.data = torch.tensor([0.5, -1.0])
    draws, pi = 100_000, distribution(agent.actor, seen)
    for i in range(2):
        close(act(i, np.zeros((1, 1))), pi.mean[i : i + 1], 1e-6)
        z = (act(i, agent.actor.noise(draws).numpy()) - pi.mean[i].detach().numpy()) / np.exp([0.5, -1.0])
        close(z.mean(0), [0.0, 0.0], 4 / math.sqrt(draws))
        close(z.T @ z / draws, torch.eye(2), 4 * math.sqrt(2 / draws))
        close((z**4).mean(0), [3.0, 3.0], 4 * math.sqrt(96 / draws))
    assert agent.actor.noise(5, 2).shape == (5, 2, 2)


def test_running_norm():
    rng = np.random.default_rng(0)
    norm, parts = reinforce.RunningNorm(2), [1e6 + rng.normal(size=(k, 2)) * [1, 3] for k in (1, 5, 2, 40)]
    for part in parts:
        norm.update(torch.from_numpy(part))
    rows = np.concatenate(parts)
    np.testing.assert_allclose(norm.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.var, rows.var(0), rtol=1e-9)
    small = reinforce.RunningNorm(1)
    small.update(torch.tensor([[1e4], [1e4 + 1], [1e4 + 2]]))
    assert float(small.var.sqrt()) == pytest.approx(0.81650, abs=1e-5)
    close(small(torch.tensor([[1e9], [-1e9]])), [[10.0], [-10.0]])


# -- episodes ----------------------------------------------------------------------------------------------------------


class Counting(gym.Env):
    """Shows step + 100 × episode, pays index + step / 4, and lasts `length` steps; after them no step is allowed."""

    def __init__(self, index: int, length: int, ending: str, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(0, np.inf, (1,)), action_space
        self.index, self.length, self.ending, self.left = index, length, ending, 0
        self.array, self.seeds, self.actions = np.zeros(1), [], []  # the same array at every step, as some do

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.seeds.append(seed)
        self.left, self.array[0] = self.length, 100 * len(self.seeds)
        return self.array, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.left > 0
        reward = self.index + (self.length - self.left) / 4
        self.left, self.array[0] = self.left - 1, self.array[0] + 1
        self.actions.append(action)
        ends = [self.left == 0 and self.ending in (name, "both") for name in ("terminated", "truncated")]
        return self.array, reward, *ends, {}


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3, start=5), spaces.Box(np.float32([-2, 0]), np.float32([6, 1]))], ids=["discrete", "box"]
)
def test_each_environment_runs_exactly_one_episode(space: gym.Space):
    """So short episodes count no more often than long ones, and what an idle environment shows is never used."""
    lengths, endings = [2, 7, 1, 4], ["terminated", "truncated", "both", "terminated"]
    envs = [Counting(i, *how, space) for i, how in enumerate(zip(lengths, endings, strict=True))]
    agent = random_agent(1, space, torch.float32)
    for episode, seeds in ((1, [11, 12, 13, 14]), (2, [None] * 4)):
        obs, actions, rewards, mask = reinforce.run_episodes(envs, agent, seeds)
        assert obs.shape == (7, 4, 1)
        assert mask.dtype == torch.bool
        assert mask.sum(0).tolist() == lengths
        steps = torch.arange(7).unsqueeze(1)
        close(obs.squeeze(-1), 100 * episode + torch.minimum(steps, torch.tensor(lengths)))
        close(rewards, (torch.arange(4) + steps / 4) * mask)
        assert actions.isfinite().all()
        for i, env in enumerate(envs):
            assert env.seeds[-1] == seeds[i]
            assert len(env.seeds) == episode
            taken, given = actions[mask[:, i], i].numpy(), np.array(env.actions[-lengths[i] :])
            if isinstance(space, spaces.Discrete):
                assert given.tolist() == (taken + 5).tolist()
            else:  # −1 is the lower bound, 1 the upper; what lies beyond is clipped for the environment alone
                np.testing.assert_allclose(given, np.clip([2, 0.5] + taken * [4, 0.5], [-2, 0], [6, 1]), atol=1e-6)
    if isinstance(space, spaces.Box):
        assert (actions.abs() > 1).any()


def test_every_step_has_noise_of_its_own():
    """However long the episode: the deviations from the mean are all different, and standard normal over σ."""
    envs = [Counting(i, length, "truncated", TWO_AXES) for i, length in enumerate((600, 400))]
    agent = random_agent(1, TWO_AXES, torch.float32)
    obs, actions, _, mask = reinforce.run_episodes(envs, agent, [0, 0])
    z = ((actions - agent.actor.net(obs)) / agent.actor.log_std.exp())[mask].detach()
    assert len(z.unique(dim=0)) == 1000
    close(z.mean(0), [0.0, 0.0], 4 / math.sqrt(1000))
    close(z.T @ z / 1000, torch.eye(2), 4 * math.sqrt(2 / 1000))


# -- cloning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [spaces.Discrete(3), TWO_AXES], ids=["categorical", "gaussian"])
def test_weights_1_give_the_gradient_of_the_likelihood(space: gym.Space):
    agent, (obs, actions, *_) = random_agent(2, space), random_episodes([6] * 4, 2, space)
    params, likelihood = list(agent.actor.parameters()), distribution(agent.actor, obs).log_prob(actions).sum() / 4
    logprobs, _ = agent.actor(obs, actions)
    loss = reinforce.pseudo_loss(logprobs, torch.ones_like(logprobs))
    for grad, expected in zip(torch.autograd.grad(loss, params), torch.autograd.grad(likelihood, params), strict=True):
        close(-grad, expected)


def test_clone_recovers_the_teacher():
    torch.manual_seed(0)
    obs = torch.randn(400, 2)
    for space, actions in (
        (spaces.Discrete(3), torch.bucketize(obs[:, 0] - obs[:, 1], torch.tensor([-1.0, 1.0]))),
        (TWO_AXES, torch.stack([obs.sum(1), obs[:, 0].tanh()], 1) / 2),
    ):
        agent = random_agent(2, space, torch.float32)
        critic, before = copy.deepcopy(agent.critic.state_dict()), agent.actor(obs, actions)[0].mean()
        reinforce.clone(agent, obs, actions, 400, 0.01)
        assert agent.actor(obs, actions)[0].mean() > before + 1
        assert np.abs(agent.policy()(obs.numpy(), 0.0) - actions.numpy()).mean() < 0.06
        assert all(torch.equal(value, critic[name]) for name, value in agent.critic.state_dict().items())


def test_clone_uses_all_rows():
    """The last of 600 alone show what to do in the second state."""
    obs, actions = torch.eye(2).repeat_interleave(300, 0), torch.tensor([0, 1]).repeat_interleave(300)
    agent = random_agent(2, spaces.Discrete(3), torch.float32)
    reinforce.clone(agent, obs, actions, 200, 0.01)
    assert agent.actor(obs, actions)[0].exp().min() > 0.9


def test_a_run_clones_once_and_from_normalised_observations(tmp_path, monkeypatch):
    """By the statistics of the demonstrations; a resumed run must not lose to them what it has learned since."""
    obs, seen, clone = np.random.default_rng(0).normal(2, 5, (50, 3)), [], reinforce.clone

    def spy(agent: reinforce.Agent, *args: Any) -> None:
        seen.append((copy.deepcopy(agent.obs_norm), args))
        clone(agent, *args)

    monkeypatch.setattr(reinforce, "clone", spy)
    np.savez(tmp_path / "file.npz", obs=obs, actions=np.arange(50) % A)
    flags = {"env_id": "Tabular-v0", "num_envs": 2, "total_timesteps": 1, "eval_episodes": 0, "normalize_obs": True}
    flags |= {"demonstrations": str(tmp_path / "file.npz"), "cloning_steps": 2, "learning_rate": 0.01}
    for resume in (False, True):
        real_run(tmp_path, resume=resume, **flags)
    ((norm, (cloned, actions, *rest)),) = seen
    close(cloned, (obs - obs.mean(0)) / obs.std(0), 1e-5)
    close(norm.mean, obs.mean(0), 1e-6)
    assert actions.tolist() == [0, 1] * 25
    assert rest == [2, 0.01]


def test_demonstrations_come_in_the_units_of_the_environment(tmp_path):
    def loaded(space: gym.Space, actions: Any) -> Tensor:
        env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (2,)), action_space=space)
        np.savez(tmp_path / "file.npz", obs=np.arange(6.0).reshape(3, 2), actions=np.array(actions))
        obs, policy_actions = reinforce.load_demonstrations(str(tmp_path / "file.npz"), env)
        close(obs, [[0, 1], [2, 3], [4, 5]])
        assert obs.dtype == torch.float32
        np.testing.assert_allclose(reinforce.action_map(space)(policy_actions.numpy()), actions)
        return policy_actions

    discrete = loaded(spaces.Discrete(4, start=-1), [-1, 2, 0])
    assert discrete.dtype == torch.int64
    assert discrete.tolist() == [0, 3, 1]
    box = loaded(spaces.Box(np.float32([-2, 0]), np.float32([6, 1])), [[-2, 1], [4, 0.5], [6, 0]])
    assert box.dtype == torch.float32
    close(box, [[-1, 1], [0.5, 0], [1, -1]])
    half_open = spaces.Box(np.float32([[-np.inf], [0]]), np.float32([[3], [4]]))  # unbounded below: as it is
    close(loaded(half_open, [[[-7], [4]], [[3], [0]], [[0], [1]]]), [[-7, 1], [3, -1], [0, -0.5]])


OBS, ACTIONS = np.zeros((5, 4), np.float32), np.zeros(5, int)


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def garbled(data: bytes, at: int, count: int) -> bytes:
    return data[:at] + b"\xff" * count + data[at + count :]


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).normal(size=(50, 4))
BAD_FILES = {
    "missing": None,
    "text": b"hello",
    "pickle": pickle.dumps({"obs": [0]}),
    "pickled array": npz(obs=OBS, actions=np.array([None] * 5)),
    "no actions": npz(obs=OBS),
    "half a file": npz(obs=OBS, actions=ACTIONS)[:400],
    "a wrong byte": garbled(npz(obs=OBS, actions=ACTIONS), 150, 1),
    "no array inside": zipped(obs=b"\x93NUMPY\x01\x00\x10\x00{", actions=b"x"),
    "words for obs": npz(obs=np.full((5, 4), "x"), actions=ACTIONS),
    "narrow obs": npz(obs=OBS[:, :3], actions=ACTIONS),
    "scalar obs": npz(obs=np.float32(1), actions=ACTIONS),
    "too few actions": npz(obs=OBS, actions=ACTIONS[:3]),
    "a column of actions": npz(obs=OBS, actions=ACTIONS[:, None]),
    "no rows": npz(obs=OBS[:0], actions=ACTIONS[:0]),
    "empty": b"",
    "npy": npz(lambda file, obs: np.save(file, obs), obs=OBS),
    "compressed and damaged": garbled(npz(np.savez_compressed, obs=NOISE, actions=np.zeros(50, int)), 200, 20),
    "words for actions": npz(obs=OBS, actions=np.full(5, "x")),
    "action out of range": npz(obs=OBS, actions=ACTIONS + 2),
    "negative action": npz(obs=OBS, actions=ACTIONS - 1),
    "half an action": npz(obs=OBS, actions=ACTIONS + 0.5),
    "nan": npz(obs=OBS * np.nan, actions=ACTIONS),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_demonstrations_are_refused(name: str, tmp_path, capsys):
    path, data = tmp_path / "file.npz", BAD_FILES[name]
    if data is not None:
        path.write_bytes(data)
    env = gym.make("CartPole-v1", disable_env_checker=True)
    with pytest.raises(SystemExit) as stopped:
        reinforce.load_demonstrations(str(path), env)
    assert stopped.value.code == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # NumPy leaves a file open that is not a whole zip
        del stopped
        gc.collect()
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert str(path) in output.err


# -- real runs ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    metrics: dict[str, float]
    returns: list[float]  # of all episodes of the training
    changed: list[str]  # names of the parameters that were trained
    same: list[str]  # and of those that were not


def real_run(tmp_path, **flags: Any) -> Outcome:
    made, make, returns, end_iteration = [], reinforce.Agent, [], reinforce.Run.end_iteration

    def spy_end(run: reinforce.Run, steps: int, ended: list, metrics: dict[str, float]) -> None:
        returns.extend(total for _, total, _ in ended)
        end_iteration(run, steps, ended, metrics)

    def spy(*args: Any) -> reinforce.Agent:
        agent = make(*args)
        made.append((agent, copy.deepcopy(agent.state_dict())))
        return agent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reinforce, "Agent", spy)
        patch.setattr(reinforce.Run, "end_iteration", spy_end)
        metrics = reinforce.train(reinforce.Args(run_dir=str(tmp_path / "run"), device="cpu", **flags))
    ((agent, before),) = made
    names = [name for name, _ in agent.named_parameters()]
    same = [name for name in names if torch.equal(before[name], agent.state_dict()[name])]
    return Outcome(metrics, returns, [name for name in names if name not in same], same)


@pytest.mark.parametrize(("weight", "discount_from", "baseline"), list(product(WEIGHTS, DISCOUNTS, BASELINES)))
def test_every_choice_trains(weight: str, discount_from: str, baseline: str, tmp_path):
    for importance in IMPORTANCES:
        run = real_run(
            tmp_path / importance, weight=weight, discount_from=discount_from, baseline=baseline, importance=importance,
            num_envs=3, total_timesteps=100, update_epochs=2, critic_epochs=2, hidden_size=8, eval_episodes=0,
        )  # fmt: skip
        assert all(map(math.isfinite, run.metrics.values()))
        assert run.metrics["losses/approx_kl"] > 0
        trained = {"actor", "critic"} if baseline == "value" else {"actor"}
        assert {name.split(".")[0] for name in run.changed} == trained
        assert {name.split(".")[0] for name in run.same} == {"actor", "critic"} - trained


def test_environments_get_seeds_of_their_own(tmp_path, monkeypatch):
    """At the start and after a checkpoint, where all episodes begin anew; in between they are not seeded again."""
    seen, run_episodes = [], reinforce.run_episodes

    def spy(envs: list[gym.Env], agent: reinforce.Agent, seeds: list[int | None], *rest: Any) -> reinforce.Episodes:
        seen.append(seeds)
        return run_episodes(envs, agent, seeds, *rest)

    monkeypatch.setattr(reinforce, "run_episodes", spy)
    for seed in (1, 2):
        real_run(tmp_path / str(seed), env_id="Tabular-v0", seed=seed, num_envs=3, total_timesteps=60,
                 checkpoint_every=25, eval_episodes=0)  # fmt: skip
    fresh = [seeds for seeds in seen if seeds != [None] * 3]
    assert seen[0] in fresh
    assert len(fresh) == 6  # from step 0, 25 and 50 of each run
    assert len(seen) > 12
    assert len({seed for seeds in fresh for seed in seeds} - {None}) == 18


@pytest.mark.parametrize("flags", [{"normalize_obs": True}, {"normalize_advantages": True}, {"log_std_init": -1.0}])
def test_continuous_actions_train(flags: dict, tmp_path):
    run = real_run(tmp_path, env_id="Pendulum-v1", num_envs=2, total_timesteps=800, eval_episodes=1, **flags)
    assert all(map(math.isfinite, run.metrics.values()))
    assert not run.same
    assert "actor.log_std" in run.changed


def late_return(run: Outcome) -> float:
    """The mean over the later half of the episodes; the last evaluation alone is too much a matter of luck."""
    return float(np.mean(run.returns[len(run.returns) // 2 :]))


def test_learns_cartpole(tmp_path):
    """About 23 without learning, 58 to 64 with it (six seeds)."""
    assert late_return(real_run(tmp_path, total_timesteps=12_000, eval_episodes=0)) > 42


def test_clones_cartpole(tmp_path):
    """A hand-written teacher that keeps the pole up for all 500 steps is copied before any reward is used."""
    env, rng = gym.make("CartPole-v1", disable_env_checker=True), np.random.default_rng(0)
    rows, obs = [], env.reset(seed=0)[0]
    for _ in range(1500):
        teacher = int(obs[2] + 0.4 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0)
        rows.append((obs, teacher))
        obs, _, terminated, truncated, _ = env.step(teacher if rng.random() < 0.8 else 1 - teacher)
        obs = env.reset()[0] if terminated or truncated else obs
    np.savez(tmp_path / "teacher.npz", obs=[row[0] for row in rows], actions=[row[1] for row in rows])
    run = real_run(
        tmp_path, demonstrations=str(tmp_path / "teacher.npz"), cloning_steps=300, total_timesteps=1, num_envs=2,
        eval_episodes=3,
    )  # fmt: skip
    assert run.metrics["eval/episodic_return"] > 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"baseline": "average", "weight": "trajectory"},
        {"baseline": "optimal", "discount_from": "start"},
        {"baseline": "time"},
        {"update_epochs": 4, "importance": "trajectory"},
        {"update_epochs": 4, "importance": "causal"},
    ],
)
def test_solves_cartpole(flags: dict, tmp_path):
    """About 23 without learning, 103 to 461 with it (four seeds of each)."""
    assert late_return(real_run(tmp_path, total_timesteps=40_000, eval_episodes=0, **flags)) > 80


@pytest.mark.slow
def test_solves_inverted_pendulum(tmp_path):
    """With continuous actions; 300 to 380 (three seeds), without learning about 6."""
    flags = {"env_id": "InvertedPendulum-v5", "normalize_obs": True, "log_std_init": -0.5}
    assert late_return(real_run(tmp_path, total_timesteps=80_000, eval_episodes=0, **flags)) > 150
