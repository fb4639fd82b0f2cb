"""Proves what trpo.py adds to npg.py, and takes whole runs of both again with loops and a dense Fisher."""
# ruff: noqa: B023, F401  (closures that are called at once, a fixture of test_npg.py)

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from second_road import as_seen, close, distribution, lambda_loop, new_agent, vector, watch
from tabular import BOX, MDP, SPACES, linear
from test_npg import dense_fisher, float64, params_of, shipped_loss
from torch.distributions import kl_divergence
from torch.nn.utils import vector_to_parameters

import npg
import trpo

TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.linspace(-0.6, 0.7, 24).double().reshape(12, 2) * torch.tensor([[1.0, -1.0]])
CHANGE = torch.tensor([[1.5, -0.5], [-1.0, 1.0], [0.3, -1.2]]).double().repeat(4, 1)


def compare(theta, gamma, start):
    """Shipped surrogate of all trajectories, its gradient; J(π) − J(π_old), its gradient; the lemma's sum."""
    pi, pi_old, batch = theta.requires_grad_().softmax(-1), THETA.softmax(-1), TIMED.batch()
    values = [obs @ TIMED.values(pi_old, gamma)[0].flatten() for obs in (batch.obs, batch.next_obs)]
    ends = batch.terminated, batch.terminated | batch.truncated
    advantages = trpo.gae(batch.rewards, *values, *ends, gamma, 0.0)
    time, envs = torch.arange(3)[:, None], SimpleNamespace(discrete=True, obs_dim=12, action_dim=2)
    weights = batch.mask * start**time * TIMED.probabilities(pi_old)
    new, old = trpo.Agent(envs, trpo.Args()), trpo.Agent(envs, trpo.Args())
    new.actor, old.actor = linear(theta), linear(THETA)
    loss, _ = shipped_loss(trpo, new, old, batch.obs, batch.actions, weights.numel() * weights * advantages)
    exact = TIMED.objective(pi, gamma) - TIMED.objective(pi_old, gamma)
    lemma = TIMED.probabilities(pi) @ (gamma**time * advantages * batch.mask).sum(0)
    grads = torch.autograd.grad(exact - loss, [new.actor.weight, theta], retain_graph=True)
    return -loss, grads[0].T, exact, grads[1], lemma


def test_the_surrogate_is_the_difference_of_returns_to_first_order():
    """J(π') − J(π) = E_{τ~π'}[Σ_t γ^t A^π(s_t, a_t)]; the surrogate lacks the new states, a square."""
    for gamma, start in ((1.0, 1.0), (0.8, 0.8), (0.8, 1.0)):
        *_, exact, _, lemma = compare(THETA + CHANGE, gamma, start)
        close(lemma, exact)
        value, grad, _, exact_grad, _ = compare(THETA.clone(), gamma, start)
        close(value, 0)
        assert ((grad - exact_grad).norm() < 1e-10) == (gamma == start)  # step t must count γ^t times
        assert (grad - exact_grad).norm() < 0.5 * exact_grad.norm()
    left_out, (values, q_values) = [], TIMED.values(THETA.softmax(-1), 1.0)
    for size in (1.0, 1e-2, 1e-3):
        new = THETA + size * CHANGE
        states = TIMED.occupancy(new.softmax(-1)) - TIMED.occupancy(THETA.softmax(-1))
        left_out.append(TIMED.surrogate(new.softmax(-1), states, q_values - values[:-1].unsqueeze(-1)))
        surrogate, _, exact, *_ = compare(new, 1.0, 1.0)
        close(exact - surrogate, left_out[-1])
    assert left_out[0].abs() > 0.01
    assert 80 < left_out[1] / left_out[2] < 120


def search(gain, kl, step=(1.7, -0.4)):
    """A line search; `gain(t)` is the surrogate, `kl(t)` the KL, t steps away from the start."""
    start, step, trials = torch.tensor([0.3, -0.0]), torch.tensor(step), []
    theta = start.clone()

    def loss():
        trials.append(((theta - start)[0] / step[0]).nan_to_num().item())
        return 1.5 - torch.tensor(gain(trials[-1])), [torch.tensor(math.inf), torch.tensor(kl(trials[-1]))]

    fraction = trpo.line_search(loss, theta, step, 0.01, 0.8, 6)
    close(theta, start + fraction * step if fraction else start, 0)
    assert theta.signbit().tolist() == [False, True]  # −0 stays what it is, too
    return fraction, trials


def test_the_line_search_takes_the_first_good_trial_or_none():
    for k, gain, kl in (
        (0, lambda t: t, lambda t: 0.01 * t**2),
        (3, lambda t: t, lambda t: 0.03 * t**2),  # three times too far
        (2, lambda t: t * (0.7 - t), lambda t: 0.0),  # grows for t < 0.7 only
        (2, lambda t: 1.0 if abs(t - 0.64) < 1e-9 else -abs(t), lambda t: 0.0),  # one good trial
        (1, lambda t: t, lambda t: math.nan if t > 0.9 else 0.0),
    ):
        assert search(gain, kl) == (0.8**k, pytest.approx([0, *0.8 ** np.arange(k + 1)]))
    gains = [(gain, 0.0) for gain in (-1.0, 0.0, math.nan, math.inf, -math.inf)]
    for gain, kl in [*gains, (1.0, 0.02), (1.0, math.nan), (1.0, math.inf)]:
        failed = search(lambda t, gain=gain: gain if t else 0.0, lambda t, kl=kl: kl)
        assert failed == (0, pytest.approx([0, *0.8 ** np.arange(6)]))
    for before, *step in ((0.5, 1.0, math.nan), (0.5, 1.0, math.inf), (0.5, 0.0, 0.0), (math.nan, 1.0, 1.0)):
        assert search(lambda t, before=before: 1.0 if t else before, lambda t: 0.0, step)[0] == 0


def test_dual_ascent_by_hand():
    for multiplier, kl, expected in ((1.0, 0.05, 1.3), (1.0, 0.01, 0.9), (0.05, 0.0, 0.0), (0.0, 0.03, 0.1)):
        close(trpo.dual_ascent(torch.tensor(multiplier), torch.tensor(kl), 0.02, 10.0), expected)


def follow(module, space, **flags):
    """The flags, the agent as it begins, and what the shipped train() does."""
    tiny = {"env_id": f"Tabular{type(space).__name__}-v0", "num_envs": 2, "num_steps": 20, "device": "cpu"}
    tiny |= {"total_timesteps": 160, "num_minibatches": 4, "hidden_size": 3, "critic_epochs": 2}
    args = module.Args(**tiny | flags)
    agent = new_agent(module, space, hidden_size=3, normalize_obs=args.normalize_obs)
    return args, copy.deepcopy(agent), watch(module, agent, "surrogate_loss", args)


def reference_step(args, agent, x, measure, left, dual):
    """Moves the policy as the papers say; returns what is logged of it."""
    params, flags, (before, *_) = params_of(agent), vars(args), measure()
    theta, g, before = vector(params), vector(torch.autograd.grad(before, params)), before.item()
    if flags.get("constraint") == "dual":
        fraction, alpha = 1.0, left * args.learning_rate
        dual.adam.param_groups[0]["lr"] = alpha
        for _ in range(args.update_epochs):
            dual.adam.zero_grad()
            objective, *_, kl = measure()
            (dual.lam * (kl - args.max_kl) - objective).backward()
            dual.adam.step()
        dual.lam = max(0.0, dual.lam + args.dual_step_size * (measure()[-1].item() - args.max_kl))
    else:
        F = dense_fisher(agent, x, params)
        direction = torch.linalg.solve(F + args.damping * torch.eye(len(F)), g)
        alpha = left * (2 * args.max_kl / (direction @ F @ direction)).sqrt().item()
        alpha = left * args.step_size if flags.get("step_rule") == "fixed" else alpha
        for fraction in [*0.8 ** np.arange(flags.get("max_trials", 1)), 0.0]:
            vector_to_parameters(theta + fraction * alpha * direction, params)
            objective, *_, kl = measure()
            if "step_rule" in flags or (objective > before and kl <= left**2 * args.max_kl):
                break
    objective, gain, entropy, approx_kl, kl = measure()
    return [-gain, entropy, approx_kl, kl, g.norm(), objective - before, fraction, fraction * alpha]


LONG = {"max_kl": 1.0, "max_trials": 3, "damping": 1e-2, "total_timesteps": 800, "ent_coef": 0.05}
DUAL = {"constraint": "dual", "learning_rate": 0.03, "update_epochs": 5}
RUNS = [
    (npg, {}), (npg, {"step_rule": "fixed", "ent_coef": 0.3}), (npg, {"anneal_lr": False, "damping": 1.0}),
    (npg, {"normalize_advantages": False, "normalize_obs": True, "normalize_rewards": True}),
    (trpo, {"normalize_obs": True, "normalize_rewards": True, "anneal_lr": False}),
    (trpo, LONG), (trpo, DUAL | {"ent_coef": 0.1, "normalize_obs": True}),
]  # fmt: skip


@SPACES
@pytest.mark.parametrize(("module", "flags"), RUNS, ids=str)
def test_a_run_is_taken_again_by_a_second_road(module, flags, space):
    """Parameters and log of every iteration; an accepted step of TRPO is within its region, and improves."""
    args, agent, iterations = follow(module, space, **{"cg_iterations": 80} | flags)
    params, critic_adam = params_of(agent), torch.optim.Adam(agent.critic.parameters(), eps=1e-5)
    dual = SimpleNamespace(adam=torch.optim.Adam(params, eps=1e-5), lam=1.0)
    for k, iteration in enumerate(iterations):
        left, shipped = 1 - args.anneal_lr * k / len(iterations), iteration.agent
        now = as_seen(args, agent, iterations, k)
        values, next_values = (agent.critic(x).detach().squeeze(-1) for x in (now.obs, now.next_obs))
        arrays = now.rewards, values, next_values, now.terminated, now.dones
        advantages = lambda_loop(*(x.numpy() for x in arrays), args.gamma, args.gae_lambda)
        advantages = torch.from_numpy(advantages)
        x, actions, advantages, values = (y.flatten(0, 1) for y in (now.obs, now.actions, advantages, values))
        returns, old = advantages + values, distribution(copy.deepcopy(agent).requires_grad_(False), x)
        explained = 1 - advantages.var() / returns.var()
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)

        def measure():
            pi = distribution(agent, x)
            change, entropy = pi.log_prob(actions) - old.log_prob(actions), pi.entropy().mean()
            gain, approx_kl = (change.exp() * advantages).mean(), (change.exp() - 1 - change).mean()
            return gain + args.ent_coef * entropy, gain, entropy, approx_kl, kl_divergence(old, pi).mean()

        expected = reference_step(args, agent, x, measure, left, dual)
        close(vector(params_of(shipped)), vector(params), 1e-4)
        vector_to_parameters(vector(params_of(shipped)), params)  # lest small differences grow
        critic_adam.param_groups[0]["lr"], losses = left * args.critic_learning_rate, []
        for rows in (rows for order in iteration.orders for rows in order.chunk(4)):
            losses.append((agent.critic(x[rows]).squeeze(-1) - returns[rows]).square().mean())
            critic_adam.zero_grad()
            losses[-1].backward()
            critic_adam.step()
        close(vector(shipped.critic.parameters()), vector(agent.critic.parameters()), 1e-5)
        close(iteration.rates[1], left * args.critic_learning_rate)
        metrics = iteration.metrics
        assert ("losses/multiplier" in metrics) == (getattr(args, "constraint", "") == "dual")
        expected = [*expected, sum(losses) / len(losses), explained, dual.lam][: len(metrics)]
        for value, reference in zip(metrics.values(), expected, strict=True):
            close(value, reference, 1e-6 + 1e-4 * abs(value))
        if flags is LONG and metrics["losses/accepted_fraction"]:
            assert metrics["losses/kl"] <= left**2
            assert metrics["losses/improvement"] > 0
    assert flags is not LONG or {0.0, 1.0} < {x.metrics["losses/accepted_fraction"] for x in iterations}


@pytest.mark.parametrize("bad", [(1, -1), (math.nan, math.nan), (math.inf, 1), (0, 0)], ids=str)
@pytest.mark.parametrize(("module", "flags"), [(npg, {}), (npg, {"step_rule": "fixed"}), (trpo, {})], ids=str)
def test_without_a_good_direction_there_is_no_step(bad, module, flags, monkeypatch):
    """The policy stays bit for bit what it was, the log shows it, and the run goes on and fits the critic."""
    monkeypatch.setattr(module, "natural_gradient", lambda _, g, *__: (bad[0] * g, bad[1] * g @ g))
    _, old, iterations = follow(module, BOX, **flags)
    for new, log in ((x.agent, x.metrics) for x in iterations):
        assert all(map(torch.equal, params_of(old), params_of(new)))
        assert not torch.equal(vector(old.critic.parameters()), vector(new.critic.parameters()))
        assert not any(log[f"losses/{x}"] for x in ("accepted_fraction", "step_size", "kl", "improvement"))
