"""Proves that each estimator of reinforce.py has exactly the expectation it claims, and the loop around it.

The expectations are exact. The shipped `train`, with step size 0, runs every trajectory of the MDP in
tabular.py, or for leave-one-out baselines every pair or triple. What it hands to loss and optimiser, weighted
by the probability of the group, is compared with formulas of J, Q and the distribution of states from dynamic
programming. Real runs are retraced by explicit sums over steps, backward() and plain Adam.
"""

import copy
import math
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement, product

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from second_road import as_seen, close, distribution, new_agent, vector, watch
from tabular import DISCRETE, MDP, SPACES, A, Given, S, linear

import reinforce

GAMMA = 0.8
OLD = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]]).double()  # logits of the policy that acted
NEW = OLD + torch.tensor([[0.4, -0.3], [0.5, -0.2], [-0.6, 0.7]]).double()  # and of a later one
WRONG_V = torch.tensor([[3.0], [-1.5], [0.7]]).double()
WEIGHTS, DISCOUNTS = ("trajectory", "reward_to_go"), ("now", "start")
IMPORTANCES = ("trajectory", "causal", "first_order")
GROUPED = ("average", "optimal", "time")  # the baselines that need other episodes
# Groups of n trajectories are listed on ever smaller problems: 42 single ones, 136 pairs, 84 triples
MDPS = {1: MDP(horizon=3), 2: MDP(horizon=2), 3: MDP(horizon=2, start=(0.0, 1.0, 0.0))}
CHOICES = list(product(WEIGHTS, DISCOUNTS, ("none", *GROUPED, "value")))


def tabular_agent(theta):
    agent = new_agent(reinforce, DISCRETE, S)
    agent.actor, agent.critic = linear(theta), linear(WRONG_V)
    return agent


@cache
def shipped(weight, discount_from, baseline, n):
    """The probability of every group of n trajectories under OLD, in any order, and what train() makes of it:
    the estimate of ∇J that the optimiser got, (groups, S, A), and the batch. The step size is 0.
    """
    single = MDPS[n].probabilities(OLD.softmax(-1))
    groups = list(combinations_with_replacement(range(len(single)), n))
    orders = [math.factorial(n) / math.prod(map(math.factorial, Counter(x).values())) for x in groups]
    envs, agent = Given([MDPS[n].batch(group) for group in groups]), tabular_agent(OLD)
    agent.in_numpy = lambda: lambda *_: envs.rows[0].actions
    flags = {"weight": weight, "discount_from": discount_from, "baseline": baseline, "num_envs": n}
    flags |= {"learning_rate": 0.0, "critic_learning_rate": 0.0, "critic_epochs": 1, "normalize_advantages": False}
    flags["total_timesteps"] = int(sum(row.mask.sum() for row in envs.rows))
    args = reinforce.Args(device="cpu", gamma=GAMMA, **flags)
    iterations = watch(reinforce, agent, "reinforce_loss", args, lambda *_: envs)
    grads = torch.stack([-iteration.gradients[0].reshape(A, S).T for iteration in iterations])
    probabilities = torch.tensor(orders).double() * single[torch.tensor(groups)].prod(1)
    return probabilities, grads, [iteration.batches[0][0][:-1] for iteration in iterations]


def off_policy(batches, theta, importance):
    """The estimates of ∇J at theta from the same batches, (groups, S, A)."""
    agent = tabular_agent(theta)
    losses = (reinforce.reinforce_loss(agent, *batch, importance)[0] for batch in batches)
    return torch.stack([-torch.autograd.grad(loss, agent.actor.weight)[0].T for loss in losses])


def expectation(probabilities, grads):
    return torch.tensordot(probabilities, grads, 1)


def variance(probabilities, grads):
    """E‖ĝ − Eĝ‖², summed over the parameters."""
    return float(probabilities @ (grads - expectation(probabilities, grads)).square().flatten(1).sum(1))


def true_gradient(mdp, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(mdp.objective(theta.softmax(-1), GAMMA), theta)[0]


def formula(mdp, discount_from, theta, states, future):
    """Σ_t c_t E[∇ log π_θ(a|s) Q_t(s,a)], a of θ, s of the policy `states`, Q of `future`; c_t: γ^t or 1."""
    theta = theta.clone().requires_grad_()
    discount = (GAMMA if discount_from == "start" else 1.0) ** torch.arange(mdp.horizon).double().unsqueeze(1)
    _, q_values = mdp.values(future.softmax(-1), GAMMA)
    surrogate = mdp.surrogate(theta.softmax(-1), discount * mdp.occupancy(states.softmax(-1)), q_values)
    return torch.autograd.grad(surrogate, theta)[0]


@pytest.mark.parametrize(
    ("weight", "discount_from", "baseline", "n"),
    [(*choice, 2 if choice[2] in GROUPED else 1) for choice in CHOICES]
    + [("reward_to_go", "start", baseline, 3) for baseline in GROUPED],
)
def test_expected_gradient(weight, discount_from, baseline, n):
    """With any baseline `start` is ∇J, `now` Σ_t E[∇ log π Q_t]; off-policy as importance_weights says."""
    mdp, (probabilities, grads, batches) = MDPS[n], shipped(weight, discount_from, baseline, n)
    close(expectation(probabilities, grads), formula(mdp, discount_from, OLD, OLD, OLD))
    if discount_from == "start":
        close(expectation(probabilities, grads), true_gradient(mdp, OLD))
        close(formula(mdp, discount_from, NEW, NEW, NEW), true_gradient(mdp, NEW))
    else:  # its bias is not small
        assert (expectation(probabilities, grads) - true_gradient(mdp, OLD)).norm() > 0.04
    for importance, (states, future) in zip(IMPORTANCES, [(NEW, NEW), (NEW, OLD), (OLD, OLD)], strict=True):
        mean = expectation(probabilities, off_policy(batches, NEW, importance))
        close(mean, formula(mdp, discount_from, NEW, states, future))
        close(off_policy(batches[::9], OLD, importance), grads[::9])  # at θ = β nothing is reweighted


@pytest.mark.parametrize("weight", WEIGHTS)
def test_optimal_baseline_has_the_least_variance_of_all_constants(weight):
    """In the limit of many episodes: each counts with its probability, and the one left out is a row of 0."""
    batch, agent = MDPS[1].batch(), tabular_agent(OLD)
    probabilities = MDPS[1].probabilities(OLD.softmax(-1))
    psi, _ = reinforce.episode_weights(batch.rewards, GAMMA, weight, "start")
    logprobs, _ = agent.policy(batch.obs, batch.actions)
    params, roots, zero = [agent.actor.weight], probabilities.sqrt().unsqueeze(1), torch.zeros(1, S * A)
    scores, grads = (reinforce.episode_gradients(logprobs, batch.mask * w, params) for w in (1.0, psi))
    rows = [torch.cat([x * roots, zero]) for x in (scores, grads)]
    best = float(reinforce.optimal_baseline(*rows)[-1])
    if weight == "trajectory":  # E[‖g‖² R] / E[‖g‖²]
        squares = probabilities * scores.square().sum(1)
        close(best, squares @ psi[0] / squares.sum())
    least = variance(probabilities, grads - best * scores)
    for b in [*np.linspace(-3, 10, 53), best - 1e-3, best + 1e-3, float(probabilities @ psi[0])]:
        assert variance(probabilities, grads - b * scores) > least
    assert least < 0.6 * variance(probabilities, grads)
    scores, grads = torch.tensor([[1], [2e-4]]), torch.tensor([[1], [6e-4]])  # ratios 1 and 3, in float32,
    close(reinforce.optimal_baseline(scores, grads), [3, 1], 1e-3)  # where a sum minus the own term fails


def test_weights_are_constants_and_shapes_and_flags_are_checked():
    agent, x = new_agent(reinforce, DISCRETE, 2), torch.randn(4, 5).double()
    (grad,) = torch.autograd.grad(reinforce.pseudo_loss(x.requires_grad_(), x), x)
    close(grad, -x / 5)
    for loss, *rest in ((reinforce.pseudo_loss, x), (reinforce.critic_loss, agent, x[:, :2])):
        with pytest.raises(AssertionError):
            loss(*rest, x[:1])
    for baseline in ("average", "optimal"):
        with pytest.raises(ValueError, match=f"--baseline {baseline} .*--num-envs"):
            reinforce.Args(num_envs=1, baseline=baseline)


class Target(gym.Env):
    """Pays minus the squared distance from the best action for x in ±½, which is seen; one step."""

    observation_space = spaces.Box(-0.5, 0.5, (1,))

    def __init__(self, space):
        self.action_space = space

    def best(self, x):
        return 1 + 2 * x if isinstance(self.action_space, spaces.Box) else 5 + (x[..., 0] > 0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.5, 0.5, 1).astype(np.float32)
        return self.x, {}

    def step(self, action):
        return self.x, -float((action - self.best(self.x)).item() ** 2), True, False, {}


gym.register("reinforce/TargetBox-v0", Target, kwargs={"space": spaces.Box(-1, 3, (1,))})
gym.register("reinforce/TargetDiscrete-v0", Target, kwargs={"space": spaces.Discrete(2, start=5)})


def real_train(tmp_path, **flags):
    return reinforce.train(reinforce.Args(**{"run_dir": str(tmp_path / "run"), "device": "cpu"} | flags))


def by_hand(args, logprobs, rewards, lengths, values, params):
    """Weights minus baseline, (T, N): a matrix of factors of r_u in Ψ_t, then step by step."""
    t, start = np.arange(len(rewards)), args.discount_from == "start"
    mask = t[:, None] < lengths
    factors = GAMMA ** (t + 0 * t[:, None] if start else np.maximum(t - t[:, None], 0))
    psi = factors * ((t >= t[:, None]) | (args.weight == "trajectory")) @ rewards.numpy()
    scores, grads = [], []  # of each episode
    for i, _ in enumerate(lengths):
        for rows, w in ((scores, mask), (grads, mask * psi)):
            total = (torch.from_numpy(w[:, i]) * logprobs[:, i]).sum()
            rows.append(vector(torch.autograd.grad(total, params, retain_graph=True)).numpy())
    b = np.zeros_like(psi)
    for t, i in np.argwhere(mask):
        others = [j for j in range(len(lengths)) if j != i]
        if args.baseline == "average":
            b[t, i] = np.mean([psi[: lengths[j], j].mean() for j in others])
        elif args.baseline == "time":
            b[t, i] = np.mean([psi[t, j] for j in others if lengths[j] > t] or [0.0])
        elif args.baseline == "optimal":
            b[t, i] = sum(scores[j] @ grads[j] for j in others) / sum(scores[j] @ scores[j] for j in others)
        elif args.baseline == "value":
            b[t, i] = values[t, i] * (GAMMA**t if start else 1.0)
    return torch.from_numpy((psi - b) * mask)


CHANGES = [{"weight": weight, "discount_from": start, "baseline": name} for weight, start, name in CHOICES]
CHANGES += [{"anneal_lr": False, "update_epochs": 3, "importance": importance} for importance in IMPORTANCES]
CHANGES += [{"normalize_obs": True, "normalize_advantages": False, "baseline": "value", "critic_epochs": 5}]


def test_where_all_episodes_are_alike_no_rounding_is_normalised():
    weights, _ = reinforce.episode_weights(-torch.ones(500, 8), 0.99, "reward_to_go", "now")
    assert (weights == reinforce.time_baseline(weights, torch.ones(500, 8, dtype=torch.bool))).all()


@SPACES
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_run_can_be_retraced_by_a_second_road(space, changes):
    """Each environment runs one whole episode, from a fresh reset; then steps of policy and critic."""
    flags = {"num_envs": 4, "total_timesteps": 60, "critic_epochs": 2, "learning_rate": 0.02} | changes
    args = reinforce.Args(env_id=f"Tabular{type(space).__name__}-v0", device="cpu", gamma=GAMMA, **flags)
    agent = new_agent(reinforce, space, normalize_obs=args.normalize_obs)
    other, start = copy.deepcopy(agent), 0
    iterations = watch(reinforce, agent, "reinforce_loss", args)
    params = [x for name, x in other.named_parameters() if not name.startswith("critic")]
    actor = torch.optim.Adam(params, eps=1e-5)
    critic = torch.optim.Adam(other.critic.parameters(), args.critic_learning_rate, eps=1e-5)
    assert len(iterations) > 3
    for k, iteration in enumerate(iterations):
        obs, actions, _, given, mask, _ = iteration.batches[0][0]
        T, lengths, now = len(obs), mask.sum(0).tolist(), as_seen(args, other, iterations, k)
        x, _, rewards, _, _, dones, _, running, _ = now
        close(torch.stack([running, dones]), torch.stack([mask, mask & (mask.cumsum(0) == mask.sum(0))]))
        assert (obs.argmax(-1) // S == torch.arange(T)[:, None])[mask].all()  # the time that the state shows
        values, rows = other.critic(x).squeeze(-1).detach(), []
        old = distribution(other, x).log_prob(actions)
        advantages = by_hand(args, old, rewards, lengths, values.numpy(), params)
        if args.normalize_advantages:
            std, mean = torch.std_mean(advantages[mask], correction=0)
            advantages = (advantages - mean) / std * mask
        close(given * mask, advantages, 1e-7)
        actor.param_groups[0]["lr"] = rate = args.learning_rate * (1 - start / 60 * args.anneal_lr)
        close(iteration.rates, (rate, rate))
        for _ in range(args.update_epochs):
            pi = distribution(other, x)
            logratio = ((pi.log_prob(actions) - old) * mask).detach()
            products = {"trajectory": logratio.sum(0), "causal": logratio.cumsum(0), "first_order": logratio}
            loss = -(products[args.importance].exp() * advantages * pi.log_prob(actions)).sum() / 4
            kl = (logratio.exp() - 1 - logratio)[mask].mean()
            actor.zero_grad()
            loss.backward()
            grad_norm = vector(x.grad for x in params).norm()
            rows.append([x.item() for x in (loss, pi.entropy()[mask].mean(), kl, grad_norm)])
            actor.step()
        assert (kl > 1e-7) == (args.update_epochs > 1)
        returns = torch.stack([sum(GAMMA ** (u - t) * rewards[u] for u in range(t, T)) for t in range(T)])
        expected = dict(zip(reinforce.METRICS, np.mean(rows, 0), strict=True))  # means over the steps
        expected["charts/discounted_return"] = returns[0].mean().item()
        for _ in range(args.critic_epochs if args.baseline == "value" else 0):
            error = (returns - other.critic(x).squeeze(-1))[mask]
            critic.zero_grad()
            error.square().mean().backward()
            critic.step()
            explained = 1 - np.var((returns - values)[mask].numpy()) / np.var(returns[mask].numpy())
            expected["losses/value_loss"] = error.square().mean().item()
            expected["losses/explained_variance"] = explained
        assert iteration.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
        start += sum(lengths)  # only those that were taken
    close(tuple(agent.parameters()), tuple(other.parameters()), 1e-6)


@pytest.mark.parametrize("kind", ["Discrete", "Box"])
def test_demonstrations_are_cloned_once(kind, tmp_path, monkeypatch, capsys):
    """In the environment's units, all rows of the file, before any reward is used; a bad file is refused."""
    name, file = f"reinforce/Target{kind}-v0", tmp_path / "file.npz"
    flags = {"env_id": name, "demonstrations": str(file), "normalize_obs": True, "total_timesteps": 1}
    x = np.linspace(-0.5, 0.5, 600)[:, None]
    good = {"obs": x, "actions": gym.make(name).unwrapped.best(x)}
    np.savez(file, **good)
    half, word, actions = file.read_bytes()[:1000], np.full((600, 1), "x"), good["actions"]
    bad = [{"obs": x}, *(good | {"obs": y} for y in (x[:7], word, x[..., None], x[:0], x * np.nan))]
    wrong = actions[:7], word, np.array([actions]), actions[:0], actions * np.nan
    bad += [good | {"actions": y} for y in wrong]
    for data in (b"", b"hello", half, *bad, *[good | {"actions": actions + 2}] * (kind == "Discrete")):
        if isinstance(data, bytes):
            file.write_bytes(data)
        else:
            np.savez(file, **data)
        with pytest.raises(SystemExit) as stopped:
            real_train(tmp_path / "bad", **flags)
        error = capsys.readouterr().err
        assert (stopped.value.code, error.count("\n"), str(file) in error) == (2, 1, True)
        assert not (tmp_path / "bad").exists()
    np.savez(file, **good)
    for resume in (False, True):
        real_train(tmp_path, cloning_steps=500, resume=resume, **flags)
        monkeypatch.setattr(reinforce, "clone", None)  # which would undo what a resumed run has learnt
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["agent"]["obs_norm.count"].unique() == 600 + 8
    assert float(capsys.readouterr().out.split("without any reward\nevaluated return ")[1].split()[0]) > -0.06
