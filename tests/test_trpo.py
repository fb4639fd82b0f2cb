"""Proves that trpo.py maximises what it claims, within the trust region: surrogate, line search, dual, whole runs.

That the surrogate is J to first order is exact: the shipped functions get every trajectory of the MDP in tabular.py.
KL, Fisher-vector product, conjugate gradient and step size are those of npg.py, word for word, and proved in
test_npg.py; networks, statistics, rollouts, `gae` and `make_update` those of ppo.py.
"""

import inspect
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pretend_cuda import pretend_cuda
from tabular import CONTINUES, MDP, A, linear
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

import npg
import trpo

Agent = trpo.Agent  # also where a test puts something else in its place
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["categorical", "gaussian"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def new_agent(space: gym.Space) -> trpo.Agent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (3,)), action_space=space)
    return Agent(env, 3, -0.3)


def random_agent(space: gym.Space) -> trpo.Agent:
    """In float64, with parameters that are all far from 0, so that no part of a formula can hide."""
    agent = new_agent(space).double()
    for param in agent.parameters():
        param.data = 0.5 * torch.randn_like(param)
    return agent


def vector(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def bits(x: Tensor) -> list[int]:
    return x.detach().view(torch.int64 if x.dtype == torch.float64 else torch.int32).tolist()


def policy_of(actor: nn.Module, obs: Tensor) -> Distribution:
    """π(·|s) as torch.distributions has it; for the tests, nothing of it is shipped."""
    out = actor.net(obs)
    if isinstance(actor, trpo.GaussianActor):
        return Independent(Normal(out, actor.log_std.exp()), 1)
    return Categorical(logits=out)


# -- the surrogate -----------------------------------------------------------------------------------------------------


def case_of(space: gym.Space) -> tuple[trpo.Agent, trpo.Agent, Tensor, Tensor, Tensor]:
    """π, π_old, obs, actions and advantages."""
    obs, advantages = torch.randn(4, 5, 3).double(), torch.randn(4, 5).double()
    actions = torch.randint(3, (4, 5)) if space is DISCRETE else torch.randn(4, 5, 2).double()
    return random_agent(space), random_agent(space), obs, actions, advantages


def shipped_loss(agent: trpo.Agent, old: trpo.Agent, obs: Tensor, actions: Tensor, advantages: Tensor, **flags: Any):
    with torch.no_grad():
        old_logprobs, dist = old.actor(obs, actions)[0], trpo.distribution(old.actor, obs)
    return trpo.surrogate_loss(agent, obs, actions, old_logprobs, advantages, *dist, **{"ent_coef": 0.0} | flags)


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@BOTH
def test_surrogate_and_metrics(space: gym.Space, ent_coef: float):
    agent, old, *batch = case_of(space)
    loss, metrics = shipped_loss(agent, old, *batch, ent_coef=ent_coef)
    pi, pi_old = policy_of(agent.actor, batch[0]), policy_of(old.actor, batch[0])
    logratios = (pi.log_prob(batch[1]) - pi_old.log_prob(batch[1])).flatten().tolist()
    pairs = zip(logratios, batch[2].flatten().tolist(), strict=True)
    policy_loss = -np.mean([np.exp(logratio) * a for logratio, a in pairs])
    expected = {
        "policy_loss": policy_loss, "entropy": pi.entropy().mean(), "kl": kl_divergence(pi_old, pi).mean(),
        "approx_kl": np.mean([np.exp(x) - 1 - x for x in logratios]),
    }  # fmt: skip
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        close(metrics[name], value)
    close(loss, policy_loss - ent_coef * expected["entropy"])
    assert abs(metrics["kl"] - kl_divergence(pi, pi_old).mean()) > 0.01  # the other way round it is another number


@BOTH
def test_the_gradient_of_the_surrogate_is_the_policy_gradient(space: gym.Space):
    """At π_old: that of mean log π(a|s) A; elsewhere it is another one."""
    agent, other, obs, actions, advantages = case_of(space)
    params = list(agent.actor.parameters())
    plain = trpo.flat_grad((policy_of(agent.actor, obs).log_prob(actions) * advantages).mean(), params)
    close(-trpo.flat_grad(shipped_loss(agent, agent, obs, actions, advantages)[0], params), plain)
    away = -trpo.flat_grad(shipped_loss(agent, other, obs, actions, advantages)[0], params)
    assert (away - plain).norm() > 0.1 * plain.norm()


@BOTH
def test_losses_train_the_actor_alone_and_mind_shapes(space: gym.Space):
    agent, old, obs, actions, advantages = case_of(space)
    dist = trpo.distribution(old.actor, obs)
    old_logprobs = old.actor(obs, actions)[0].detach()
    batch = (obs, actions, old_logprobs, advantages, *(x.detach() for x in dist))
    loss, metrics = trpo.surrogate_loss(agent, *batch, ent_coef=0.1)
    grads = torch.autograd.grad(loss + 0.7 * metrics["kl"], list(agent.parameters()), allow_unused=True)
    for (name, _), grad in zip(agent.named_parameters(), grads, strict=True):
        assert (grad is not None and grad.abs().sum() > 0) == name.startswith("actor"), name
    with pytest.raises(AssertionError):
        trpo.surrogate_loss(agent, obs, actions, old_logprobs, advantages[:, :1], *dist, ent_coef=0.0)


# -- the surrogate and J, exactly --------------------------------------------------------------------------------------

TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64).repeat(4, 1)
THETA = THETA + torch.linspace(-0.6, 0.7, 24, dtype=torch.float64).reshape(12, 2)
CHANGE = torch.tensor([[1.5, -0.5], [-1.0, 1.0], [0.3, -1.2]], dtype=torch.float64).repeat(4, 1)


def tabular_agent(theta: Tensor) -> Any:
    actor = trpo.CategoricalActor(1, A, 1)
    actor.net = linear(theta)
    return SimpleNamespace(actor=actor)


def shipped_advantages(theta: Tensor, gamma: float) -> Tensor:
    """δ_t = A(s_t, a_t) + noise of mean 0 from the shipped `gae` with the true V, (T, K) of all trajectories."""
    batch, values = TIMED.batch(), TIMED.values(theta.softmax(-1), gamma)[0].flatten()
    dones = batch.terminated | batch.truncated
    return trpo.gae(
        batch.rewards, batch.obs @ values, batch.next_obs @ values, batch.terminated, dones, gamma, 0.0
    )  # fmt: skip


def expected_surrogate(agent: Any, theta: Tensor, gamma: float = 1.0, start: float = 1.0) -> Tensor:
    """Σ_τ p(τ) Σ_t start^t ρ_t A_t of π_old = π_theta: minus the shipped loss; the weights undo its mean over steps."""
    batch, probabilities = TIMED.batch(), TIMED.probabilities(theta.softmax(-1))
    weighted = batch.mask.numel() * batch.mask * probabilities * shipped_advantages(theta, gamma)
    weighted = weighted * start ** torch.arange(len(weighted)).double().unsqueeze(1)
    return -shipped_loss(agent, tabular_agent(theta), batch.obs, batch.actions, weighted)[0]


def exact_difference(new: Tensor, old: Tensor, gamma: float = 1.0) -> Tensor:
    return TIMED.objective(new.softmax(-1), gamma) - TIMED.objective(old.softmax(-1), gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_performance_difference_lemma(gamma: float):
    """J(π') − J(π) = E_{τ~π'}[Σ_t γ^t A^π(s_t, a_t)], with the shipped advantages of every trajectory."""
    advantages, mask, new = shipped_advantages(THETA, gamma), TIMED.batch().mask, THETA + CHANGE
    discounts = gamma ** torch.arange(len(mask)).double()
    sums = (discounts.unsqueeze(1) * advantages * mask).sum(0)
    close(TIMED.probabilities(new.softmax(-1)) @ sums, exact_difference(new, THETA, gamma))
    close(TIMED.probabilities(THETA.softmax(-1)) @ sums, 0)
    assert exact_difference(new, THETA, gamma).abs() > 0.1


def test_the_surrogate_is_the_difference_to_first_order():
    """Value and gradient are those of J(π') − J(π) at π' = π, and what it leaves out falls with the square."""
    agent = tabular_agent(THETA)
    value = expected_surrogate(agent, THETA)
    close(value, 0)
    theta = THETA.clone().requires_grad_()
    exact = torch.autograd.grad(TIMED.objective(theta.softmax(-1), 1.0), theta)[0]
    close(torch.autograd.grad(value, agent.actor.net.weight)[0].T, exact)
    assert exact.norm() > 0.5
    errors = []
    for size in (1e-1, 1e-2, 1e-3):
        new = THETA + size * CHANGE
        errors.append((expected_surrogate(tabular_agent(new), THETA) - exact_difference(new, THETA)).abs().item())
    assert errors[0] > 1e-4
    assert 80 < errors[0] / errors[1] < 120
    assert 80 < errors[1] / errors[2] < 120


def test_without_the_discount_of_late_steps_it_is_another_gradient():
    """With step t counted γ^t times the gradient is that of J; as shipped, it is off, though it points the same way."""
    theta = THETA.clone().requires_grad_()
    exact = torch.autograd.grad(TIMED.objective(theta.softmax(-1), 0.8), theta)[0]
    found = {}
    for start in (0.8, 1.0):
        agent = tabular_agent(THETA)
        value = expected_surrogate(agent, THETA, 0.8, start)
        found[start] = torch.autograd.grad(value, agent.actor.net.weight)[0].T
    close(found[0.8], exact)
    assert (found[1.0] - exact).norm() > 0.1 * exact.norm()
    assert torch.cosine_similarity(found[1.0].flatten(), exact.flatten(), 0) > 0.9


def test_what_the_surrogate_leaves_out_is_the_change_of_the_states():
    """It is Σ_t Σ_s (d'_t(s) − d_t(s)) Σ_a π'(a|s) A_t(s,a), by dynamic programming."""
    new = THETA + CHANGE
    pi, old = new.softmax(-1), THETA.softmax(-1)
    values, q_values = TIMED.values(old, 1.0)
    change = TIMED.occupancy(pi) - TIMED.occupancy(old)
    assert CONTINUES.sum() > 0
    left_out = TIMED.surrogate(pi, change, q_values - values[:-1].unsqueeze(-1))
    close(exact_difference(new, THETA) - expected_surrogate(tabular_agent(new), THETA), left_out)
    assert left_out.abs() > 0.01


def test_trpo_differs_from_npg_in_step_5_alone():
    """So what test_npg.py proves of rollouts, advantages and the critic holds here, too."""
    steps = [re.split(r"# (\d)\. ", inspect.getsource(module.train)) for module in (npg, trpo)]
    texts = [dict(zip(each[1::2], each[2::2], strict=True)) for each in steps]
    assert [number for number in texts[0] if texts[0][number] != texts[1][number]] == ["1", "5"]  # 1: Adam's rate


# -- line search -------------------------------------------------------------------------------------------------------


class Search(NamedTuple):
    """A line search along one step, of two parameters; `t` is how far along it a trial is, in steps."""

    fraction: float
    theta: Tensor
    trials: list[float]


START, STEP = torch.tensor([0.3, -0.0]).double(), torch.tensor([1.7, -0.4]).double()


def search(gain: Callable, kl: Callable, max_kl: float = 0.01, step: Tensor = STEP, max_trials: int = 10) -> Search:
    """`gain(t)` is the surrogate, 0 at t = 0."""
    theta, trials = nn.Parameter(START.clone()), []

    def loss() -> tuple[Tensor, dict[str, Tensor]]:
        t = ((theta - START)[0] / STEP[0]).item()
        trials.append(t)
        loss = torch.tensor(1.5 - gain(t)).double()
        return loss, {"kl": torch.tensor(kl(t)).double(), "other": loss}

    fraction = trpo.line_search(loss, theta, step, max_kl, 0.8, max_trials)
    return Search(fraction, theta.data, trials)


def test_a_good_full_step_is_taken_at_once():
    result = search(lambda t: t, lambda t: 0.01 * t**2)
    assert result.fraction == 1.0
    close(result.theta, START + STEP, 0)
    assert result.trials == pytest.approx([0, 1])


def test_a_step_that_is_three_times_too_far_is_shortened():
    """KL = 3 δ t²: t = 0.8^k is within δ from k = 3 on, where the surrogate alone would have taken the full step."""
    result = search(lambda t: t, lambda t: 0.03 * t**2)
    assert result.fraction == 0.8**3
    close(result.theta, START + 0.8**3 * STEP, 0)
    assert result.trials == pytest.approx([0, 1, 0.8, 0.64, 0.512])


def test_a_step_must_improve():
    """The surrogate grows for t < 0.7 only; the KL alone would allow all."""
    result = search(lambda t: t * (0.7 - t), lambda t: 0.0)
    assert result.fraction == 0.8**2
    close(result.theta, START + 0.8**2 * STEP, 0)


def test_only_the_third_trial_is_good():
    third = 0.64
    for gain, kl in (
        (lambda t: 1.0 if t == pytest.approx(third) else -abs(t), lambda t: 0.0),
        (lambda t: t, lambda t: 0.0 if t == pytest.approx(third) else 1.0),
    ):
        result = search(gain, kl)
        assert result.fraction == 0.8**2
        close(result.theta, START + 0.8**2 * STEP, 0)
        assert len(result.trials) == 4


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("gain", "kl", "step"),
    [
        (lambda t: -t, lambda t: 0.0, STEP), (lambda t: 0.0, lambda t: 0.0, STEP), (lambda t: t, lambda t: 0.02, STEP),
        (lambda t: NAN if t else 0.0, lambda t: 0.0, STEP), (lambda t: INF if t else 0.0, lambda t: 0.0, STEP),
        (lambda t: -INF if t else 0.0, lambda t: 0.0, STEP), (lambda t: t, lambda t: NAN, STEP),
        (lambda t: t, lambda t: INF, STEP), (lambda t: NAN, lambda t: 0.0, STEP),
        (lambda t: t, lambda t: 0.0, torch.tensor([1.0, NAN]).double()),
        (lambda t: t, lambda t: 0.0, torch.tensor([1.0, INF]).double()), (lambda t: t, lambda t: 0.0, 0 * STEP),
    ],
    ids=[
        "worse", "equal", "too far", "nan loss", "inf gain", "inf loss", "nan kl", "inf kl", "nan before", "nan step",
        "inf step", "no step",
    ],
)  # fmt: skip
def test_a_failed_search_restores_every_bit(gain: Callable, kl: Callable, step: Tensor):
    result = search(gain, kl, step=step, max_trials=6)
    assert result.fraction == 0.0
    assert bits(result.theta) == bits(START)  # also the sign of −0
    assert len(result.trials) == 7


@BOTH
def test_the_host_waits_once_a_trial(space: gym.Space):
    agent, old, *batch = case_of(space)
    with pretend_cuda() as gpu:
        agent, old = agent.to("cuda"), old.to("cuda")
        obs, actions, advantages = (x.to("cuda") for x in batch)
        theta = trpo.flatten(list(agent.actor.parameters()))
        start, step = theta.detach().clone(), 0.1 * torch.randn(theta.shape, dtype=torch.float64).to("cuda")

        def loss() -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = shipped_loss(agent, old, obs, actions, advantages)
            return 0 * value - (theta - start).square().sum(), metrics

        for max_kl, trials in ((1e9, 1), (0.0, 7)):
            gpu.waits.clear()
            fraction = trpo.line_search(loss, theta, step, max_kl, 0.8, 7)
            assert len(gpu.waits) == trials
            assert fraction == (1.0 if trials == 1 else 0.0)


# -- the shipped loop --------------------------------------------------------------------------------------------------


class Counting(gym.Env):
    """Pays for an action that suits the observation; an episode is cut after 7 steps, or terminates after 4."""

    def __init__(self, action_space: gym.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-9, 9, (3,)), action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time, self.cut, self.obs = 0, self.np_random.random() < 0.5, self.np_random.normal(1, 1, 3)
        return np.float32(self.obs), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        reward = float(self.obs[int(action)] if np.ndim(action) == 0 else 1 - np.abs(action - self.obs[:2]).sum())
        self.obs = self.np_random.normal(1, 1, 3)
        return np.float32(self.obs), reward, self.time == 4 and not self.cut, self.time == 7, {}


gym.register("trpo/Counting-v0", Counting, kwargs={"action_space": DISCRETE})
gym.register("trpo/CountingBox-v0", Counting, kwargs={"action_space": BOX})


class Iteration(NamedTuple):
    """What train() did between two rollouts."""

    old: nn.Module  # actors
    new: nn.Module
    obs: Tensor  # as the networks see them
    actions: Tensor
    advantages: Tensor
    steps: list[Tensor]  # given to the line search
    updates: list[tuple]  # parameters and gradient before and after each gradient step
    metrics: dict[str, float]


def follow(space: gym.Space, patches: dict[str, Any] | None = None, **flags: Any) -> list[Iteration]:
    """The shipped train() in float64, written down; `patches` take the place of functions of trpo.py."""
    collect, gae, end = trpo.Collector.collect, trpo.gae, trpo.Run.end_iteration
    line_search, agents, iterations, seen = trpo.line_search, [], [], SimpleNamespace()

    def spy_agent(*args: Any) -> trpo.Agent:
        agents.append(Agent(*args).double())
        for param in agents[0].actor.parameters():
            param.data.add_(0.3 * torch.randn_like(param))
        return agents[0]

    def frozen(actor: nn.Module) -> nn.Module:
        other = new_agent(space).double().actor
        other.load_state_dict(actor.state_dict())
        return other.requires_grad_(False)

    def spy_collect(collector: Any, agent: trpo.Agent, *args: Any) -> Any:
        rollout, ended = collect(collector, agent, *args)
        rollout = trpo.Rollout(*(x.double() if x.is_floating_point() else x for x in rollout))
        seen.batch = [agent.obs_norm(rollout.obs).flatten(0, 1), rollout.actions.flatten(0, 1)]
        seen.old, seen.steps, seen.updates = frozen(agent.actor), [], []
        return rollout, ended

    def spy_gae(*args: Any) -> Tensor:
        advantages = gae(*args)
        seen.advantages = (advantages - advantages.mean()).flatten() / advantages.numpy().std()
        return advantages

    def spy_search(loss: Callable, theta: Tensor, step: Tensor, *args: Any, **kwargs: Any) -> float:
        seen.steps.append(step.clone())
        return line_search(loss, theta, step, *args, **kwargs)

    def spy_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before and after each step of each optimizer; those of the critic are not kept."""
        (theta,) = optimizer.param_groups[0]["params"]
        if theta.data_ptr() == next(agents[0].actor.parameters()).data_ptr():
            seen.updates.append((theta.detach().clone(), theta.grad.clone()))

    def spy_end(run: trpo.Run, steps: int, ended: list, metrics: dict[str, float]) -> None:
        now = frozen(agents[0].actor)
        iterations.append(
            Iteration(seen.old, now, *seen.batch, seen.advantages, seen.steps, seen.updates, metrics)
        )  # fmt: skip
        end(run, steps, ended, metrics)

    tiny = {"num_envs": 2, "num_steps": 20, "total_timesteps": 160, "hidden_size": 3, "critic_epochs": 2}
    tiny |= {"num_minibatches": 2, "eval_episodes": 0, "checkpoint_every": 0, "device": "cpu", "update_epochs": 5}
    env_id = "trpo/Counting-v0" if space is DISCRETE else "trpo/CountingBox-v0"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(trpo, "Agent", spy_agent)
        patch.setattr(trpo.Collector, "collect", spy_collect)
        patch.setattr(trpo, "gae", spy_gae)
        patch.setattr(trpo, "line_search", spy_search)
        patch.setattr(trpo.Run, "end_iteration", spy_end)
        patch.setattr(trpo.Run, "log", lambda *_: None)  # slow
        for name, function in (patches or {}).items():
            patch.setattr(trpo, name, function)
        hooks = [register_optimizer_step_pre_hook(spy_step), register_optimizer_step_post_hook(spy_step)]
        trpo.train(trpo.Args(run_dir=directory, env_id=env_id, **tiny | flags))
        for hook in hooks:
            hook.remove()
    return iterations


def surrogate_of(actor: nn.Module, each: Iteration, ent_coef: float = 0.0) -> Tensor:
    """Of the batch of an iteration, by torch.distributions."""
    pi = policy_of(actor, each.obs)
    ratio = (pi.log_prob(each.actions) - policy_of(each.old, each.obs).log_prob(each.actions)).exp()
    return (ratio * each.advantages).mean() + ent_coef * pi.entropy().mean()


def kl_of(each: Iteration) -> float:
    return kl_divergence(policy_of(each.old, each.obs), policy_of(each.new, each.obs)).mean().item()


@pytest.mark.parametrize("ent_coef", [0.0, 0.05])
@BOTH
def test_every_step_of_a_run_is_within_the_trust_region_and_improves(space: gym.Space, ent_coef: float):
    """Found again by torch.distributions; the steps are so long that some are shortened, and some do not succeed."""
    flags = {"max_kl": 2.0, "max_trials": 3, "damping": 1e-3, "total_timesteps": 40 * 40, "ent_coef": ent_coef}
    iterations = follow(space, **flags)
    fractions = [each.metrics["losses/accepted_fraction"] for each in iterations]
    assert {0.0, 0.8, 1.0} <= {round(fraction, 10) for fraction in fractions}
    for k, (each, fraction) in enumerate(zip(iterations, fractions, strict=True)):
        old, new = (vector(actor.parameters()) for actor in (each.old, each.new))
        assert len(each.steps) == 1
        if fraction == 0:
            assert bits(old) == bits(new)
            assert each.metrics["losses/kl"] == each.metrics["losses/improvement"] == 0
            assert each.metrics["charts/learning_rate"] == 0
            continue
        assert min(abs(fraction - x) for x in (1, 0.8, 0.64)) < 1e-10
        close(new, old + fraction * each.steps[0])
        improvement = surrogate_of(each.new, each, ent_coef) - surrogate_of(each.old, each, ent_coef)
        assert improvement > 0
        close(each.metrics["losses/improvement"], improvement, 1e-7)
        assert kl_of(each) <= 2.0 * (1 - k / 40) ** 2
        assert each.metrics["losses/kl"] == pytest.approx(kl_of(each), rel=1e-9)
        close(each.metrics["losses/policy_loss"], -surrogate_of(each.new, each), 1e-7)


@BOTH
def test_the_search_begins_with_the_natural_step(space: gym.Space):
    """√(2δ / xᵀFx) x, where F x is found by differences of the gradient of the KL of torch.distributions."""
    for k, each in enumerate(follow(space, cg_iterations=80, damping=0.3, ent_coef=0.1)):
        live = new_agent(space).double().actor
        live.load_state_dict(each.old.state_dict())
        params = list(live.parameters())
        flat = trpo.flatten(params)
        theta, g = flat.detach().clone(), vector(torch.autograd.grad(surrogate_of(live, each, 0.1), params))
        (step,) = each.steps
        small = 1e-4 * step / step.norm()
        kl_grads = []
        for point in (theta + small, theta - small):
            flat.data.copy_(point)
            kl = kl_divergence(policy_of(each.old, each.obs), policy_of(live, each.obs)).mean()
            kl_grads.append(vector(torch.autograd.grad(kl, params)))
        fisher_step = (kl_grads[0] - kl_grads[1]) * step.norm() / 2e-4
        max_kl = 0.02 * (1 - k / 4) ** 2
        assert (step @ fisher_step / 2).item() == pytest.approx(max_kl, rel=1e-5)
        right = fisher_step + 0.3 * step  # (F + damping I) α x = α g
        close(right / right.norm(), g / g.norm(), 1e-4)
        assert each.metrics["losses/grad_norm"] == pytest.approx(g.norm().item(), rel=1e-6)
        alpha = each.metrics["losses/accepted_fraction"] * right.norm() / g.norm()
        assert each.metrics["charts/learning_rate"] == pytest.approx(alpha.item(), rel=1e-4)


def times(factor: float) -> Callable:
    shipped = trpo.fisher_vector_product

    def product(*args: Any) -> Callable:
        return lambda v: factor * shipped(*args)(v)

    return product


SHIPPED_LOSS = trpo.surrogate_loss


def without_gradient(*args: Any, **kwargs: Any) -> Any:
    loss, metrics = SHIPPED_LOSS(*args, **kwargs)
    return 0 * loss, metrics


@pytest.mark.parametrize(
    "patches",
    [
        {"fisher_vector_product": times(-1.0)}, {"fisher_vector_product": times(NAN)},
        {"fisher_vector_product": times(INF)}, {"surrogate_loss": without_gradient},
    ],
    ids=["negative", "nan", "inf", "no gradient"],
)  # fmt: skip
@BOTH
def test_without_a_good_direction_there_is_no_step(space: gym.Space, patches: dict):
    """The policy stays bit for bit what it was, the log shows it, and the run goes on."""
    iterations = follow(space, patches, total_timesteps=80)
    assert len(iterations) == 2
    for each in iterations:
        assert bits(vector(each.old.parameters())) == bits(vector(each.new.parameters()))
        assert each.metrics["losses/accepted_fraction"] == each.metrics["charts/learning_rate"] == 0
        assert each.metrics["losses/kl"] == 0


# -- the dual ----------------------------------------------------------------------------------------------------------


def test_dual_ascent_by_hand():
    for multiplier, kl, expected in ((1.0, 0.05, 1.3), (1.0, 0.01, 0.9), (0.05, 0.0, 0.0), (0.0, 0.03, 0.1)):
        given = torch.tensor([multiplier, kl], dtype=torch.float64)
        close(trpo.dual_ascent(*given, 0.02, 10.0), expected)


DUAL = {"constraint": "dual", "learning_rate": 0.03, "dual_step_size": 5.0}


@BOTH
def test_the_steps_of_the_dual_can_be_taken_by_a_second_road(space: gym.Space):
    """loss.backward() and plain Adam on −(L − λ (KL − ε)); λ begins with 1 and follows the KL."""
    iterations, multiplier, optimizer = follow(space, **DUAL, ent_coef=0.1), 1.0, None
    for k, each in enumerate(iterations):
        assert len(each.updates) == 10
        assert each.steps == []
        for (before, grad), (after, _) in zip(each.updates[::2], each.updates[1::2], strict=True):
            live = optimizer.live if optimizer else new_agent(space).double().actor
            optimizer = optimizer or torch.optim.Adam(live.parameters(), eps=1e-5)
            optimizer.live, optimizer.param_groups[0]["lr"] = live, 0.03 * (1 - k / 4)
            nn.utils.vector_to_parameters(before.clone(), live.parameters())
            live.zero_grad()
            kl = kl_divergence(policy_of(each.old, each.obs), policy_of(live, each.obs)).mean()
            (multiplier * (kl - 123.0) - surrogate_of(live, each, 0.1)).backward()
            close(vector(param.grad for param in live.parameters()), grad, 1e-6)
            optimizer.step()
            close(vector(live.parameters()), after, 1e-6)
        close(each.metrics["losses/kl"], kl_of(each), 1e-9)
        multiplier = max(0.0, multiplier + 5.0 * (kl_of(each) - 0.02))
        assert each.metrics["losses/multiplier"] == pytest.approx(multiplier, rel=1e-5)
        assert each.metrics["charts/learning_rate"] == pytest.approx(0.03 * (1 - k / 4))


@BOTH
def test_the_multiplier_rises_exactly_where_the_constraint_is_broken(space: gym.Space):
    iterations = follow(space, **DUAL, anneal_lr=False, total_timesteps=40 * 40)
    last, directions = 1.0, set()
    for each in iterations:
        multiplier, kl = each.metrics["losses/multiplier"], each.metrics["losses/kl"]
        assert multiplier >= 0
        if multiplier > 0:
            assert (multiplier > last) == (kl > 0.02)
            directions.add(kl > 0.02)
        last = multiplier
    assert directions == {False, True}


@pytest.mark.parametrize("max_kl", [0.003, 0.03])
@BOTH
def test_the_mean_kl_of_the_dual_settles_at_the_bound(space: gym.Space, max_kl: float):
    """As λ settles: its change is the sum of KL − ε."""
    flags = {"constraint": "dual", "anneal_lr": False, "learning_rate": 0.003, "dual_step_size": 0.3 / max_kl}
    iterations = follow(space, **flags, max_kl=max_kl, update_epochs=20, num_steps=60, total_timesteps=80 * 120)
    kls = np.array([each.metrics["losses/kl"] for each in iterations])
    assert kls[40:].mean() == pytest.approx(max_kl, rel=0.15)
    assert abs(kls[:5].mean() / max_kl - 1) > 0.15  # with λ = 1


DUAL_RUN = {
    "constraint": "dual", "env_id": "trpo/CountingBox-v0", "num_envs": 2, "num_steps": 20, "total_timesteps": 160,
    "checkpoint_every": 80, "num_minibatches": 2, "eval_episodes": 0, "device": "cpu", "max_kl": 1e-3,
}  # fmt: skip


def same_checkpoints(*runs: Path) -> bool:
    saved = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    for part in ("agent", "optimizer", "dual", "critic_optimizer"):
        tensors = [[x for x in tree_leaves(each[part]) if isinstance(x, Tensor)] for each in saved]
        assert len(tensors[0]) >= (1 if part == "dual" else 3)
        if not all(map(torch.equal, *tensors)):
            return False
    return True


def test_the_multiplier_and_the_moments_of_the_dual_survive_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that goes on from the checkpoint of the middle ends with the same bits."""
    save, whole, resumed = trpo.Run.save, tmp_path / "whole", tmp_path / "resumed"

    def keep(run: trpo.Run) -> None:
        save(run)
        if run.step == 80:
            resumed.mkdir()
            shutil.copy(run.path, resumed)

    with monkeypatch.context() as patch:
        patch.setattr(trpo.Run, "save", keep)
        trpo.train(trpo.Args(run_dir=str(whole), **DUAL_RUN))
    assert not same_checkpoints(whole, resumed)
    assert torch.load(resumed / "checkpoint.pt", weights_only=True)["dual"]["multiplier"] != 1
    trpo.train(trpo.Args(run_dir=str(resumed), resume=True, **DUAL_RUN))
    assert same_checkpoints(whole, resumed)


def test_on_a_pretended_gpu_the_dual_is_the_same_and_does_not_wait(tmp_path: Path):
    waits = []
    trpo.train(trpo.Args(run_dir=str(tmp_path / "cpu"), **DUAL_RUN))
    for epochs in (20, 40):
        with pretend_cuda() as gpu:
            flags = DUAL_RUN | {"device": "cuda", "update_epochs": epochs}
            trpo.train(trpo.Args(run_dir=str(tmp_path / f"cuda{epochs}"), **flags))
        waits.append(len(gpu.waits))
    assert waits[0] == waits[1]
    assert same_checkpoints(tmp_path / "cpu", tmp_path / "cuda20")


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


gym.register("trpo/Target-v0", Target)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("constraint", ["line_search", "dual"])
def test_learns_a_continuous_action(constraint: str, broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The threshold is one that an update with a wrong sign misses; the policy starts near −1/3."""
    estimate = trpo.gae
    if broken:
        monkeypatch.setattr(trpo, "gae", lambda *x: -estimate(*x))
    args = trpo.Args(
        env_id="trpo/Target-v0", total_timesteps=6_000, num_envs=4, num_steps=25, hidden_size=16, max_kl=0.05,
        constraint=constraint, learning_rate=0.01, device="cpu", eval_episodes=200, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (trpo.train(args)["eval/episodic_return"] > -0.02) == (not broken)


def test_learns_cartpole(tmp_path: Path):
    args = trpo.Args(total_timesteps=15_000, device="cpu", eval_episodes=10, run_dir=str(tmp_path / "run"))
    assert trpo.train(args)["eval/episodic_return"] > 200  # at random 20, with a wrong sign 9
