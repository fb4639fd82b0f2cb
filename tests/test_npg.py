"""Proves that npg.py steps along F⁻¹g as far as it claims: KL, Fisher matrix, conjugate gradient, step, whole runs.

The Fisher matrix is written down three times without the shipped product: as the expected outer product of the scores,
exact for both classes of policies, as the Hessian of the KL of torch.distributions, and through whole runs of train(),
whose steps are found again with dense matrices. Networks, statistics, rollouts, `gae` and `make_update` are those of
ppo.py, `surrogate_loss` that of trpo.py, word for word, and proved in their tests.
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pretend_cuda import pretend_cuda
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call

import npg

Agent = npg.Agent  # also where a test puts something else in its place
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1, 1, (2,))
BOTH = pytest.mark.parametrize("space", [DISCRETE, BOX], ids=["categorical", "gaussian"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def new_agent(space: gym.Space, hidden_size: int = 3, obs_dim: int = 3) -> npg.Agent:
    env = SimpleNamespace(observation_space=spaces.Box(-1, 1, (obs_dim,)), action_space=space)
    return Agent(env, hidden_size, -0.3)


def random_agent(space: gym.Space) -> npg.Agent:
    """In float64, with parameters that are all far from 0, so that no part of a formula can hide."""
    agent = new_agent(space).double()
    for param in agent.parameters():
        param.data = 0.7 * torch.randn_like(param)
    return agent


def random_batch(space: gym.Space, size: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """obs, actions and advantages."""
    obs, advantages = torch.randn(size, 3).double(), torch.randn(size).double()
    return obs, torch.randint(3, (size,)) if space is DISCRETE else torch.randn(size, 2).double(), advantages


def vector(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def policy_of(actor: nn.Module, obs: Tensor) -> Distribution:
    """π(·|s) as torch.distributions has it; for the tests, nothing of it is shipped."""
    out = actor.net(obs)
    if isinstance(actor, npg.GaussianActor):
        return Independent(Normal(out, actor.log_std.exp()), 1)
    return Categorical(logits=out)


def mean_kl(old: nn.Module, new: nn.Module, obs: Tensor) -> Tensor:
    return kl_divergence(policy_of(old, obs), policy_of(new, obs)).mean()


# -- the dense Fisher matrix -------------------------------------------------------------------------------------------


def actions_and_weights(pi: Distribution) -> list[tuple[Tensor, Tensor]]:
    """Actions (B,) or (B, 2), each with weights (B,), so that Σ w f(a) is E[f(a)].

    For two Gaussian dimensions these are Gauss-Hermite nodes, exact for polynomials up to degree 5 in each: the outer
    product of two scores has degree 4.
    """
    if isinstance(pi, Categorical):
        return [(torch.full(pi.batch_shape, a), pi.probs[..., a]) for a in range(3)]
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(3))
    weights, found = weights / weights.sum(), []
    for i, j in itertools.product(range(3), repeat=2):
        actions = pi.base_dist.loc + pi.base_dist.scale * torch.stack([nodes[i], nodes[j]])
        found.append((actions, (weights[i] * weights[j]).expand(pi.batch_shape)))
    return found


def dense_fisher(actor: nn.Module, obs: Tensor) -> Tensor:
    """Mean over s of E_a[∇ log π(a|s) ∇ log π(a|s)ᵀ], score by score."""
    params, fisher, pi = list(actor.parameters()), 0.0, policy_of(actor, obs)
    for actions, weights in actions_and_weights(pi):
        for logprob, weight in zip(pi.log_prob(actions.detach()), weights.detach(), strict=True):
            score = vector(torch.autograd.grad(logprob, params, retain_graph=True))
            fisher = fisher + weight * torch.outer(score, score) / len(obs)
    return fisher


def unpack(theta: Tensor, actor: nn.Module) -> dict[str, Tensor]:
    parts = theta.split([param.numel() for param in actor.parameters()])
    return {f"actor.{name}": x.view_as(p) for (name, p), x in zip(actor.named_parameters(), parts, strict=True)}


class Kl(nn.Module):
    """KL(π_old‖π) of an actor by torch.distributions, as a function of its parameters."""

    def __init__(self, actor: nn.Module, obs: Tensor) -> None:
        super().__init__()
        self.actor, self.obs, self.old = actor, obs, policy_of(actor, obs)

    def forward(self) -> Tensor:
        return kl_divergence(self.old, policy_of(self.actor, self.obs)).mean()

    def at(self, theta: Tensor) -> Tensor:
        return functional_call(self, unpack(theta, self.actor), ())


def shipped_fisher(actor: nn.Module, obs: Tensor) -> Tensor:
    params = list(actor.parameters())
    product = npg.fisher_vector_product(actor, obs, params)
    return torch.stack([product(unit) for unit in torch.eye(vector(params).numel(), dtype=torch.float64)], 1)


@BOTH
def test_the_fisher_vector_product_is_the_expected_outer_product_of_scores(space: gym.Space):
    actor, (obs, *_) = random_agent(space).actor, random_batch(space)
    fisher = dense_fisher(actor, obs)
    product = npg.fisher_vector_product(actor, obs, list(actor.parameters()))
    for _ in range(5):
        v = torch.randn(len(fisher)).double()
        close(product(v), fisher @ v)
        close(product(2 * v), 2 * product(v))
        assert v @ product(v) > 0
    close(shipped_fisher(actor, obs.reshape(3, 4, 3)), fisher)  # time first, as a rollout


@BOTH
def test_the_fisher_matrix_is_the_hessian_of_the_kl(space: gym.Space):
    """At π_old; of KL(π_old‖π), and of KL(π‖π_old) too."""
    agent, (obs, *_) = random_agent(space), random_batch(space)
    actor, theta, fisher = agent.actor, vector(agent.actor.parameters()), shipped_fisher(agent.actor, obs)
    kl = Kl(actor, obs)
    kl.old = policy_of(random_copy(actor), obs)
    close(torch.autograd.functional.hessian(kl.at, theta), fisher)
    close(torch.autograd.functional.jacobian(kl.at, theta), torch.zeros_like(theta))
    reverse = Kl(actor, obs)
    reverse.forward = lambda: kl_divergence(policy_of(actor, obs), kl.old).mean()
    close(torch.autograd.functional.hessian(reverse.at, theta), fisher)


def random_copy(actor: nn.Module) -> nn.Module:
    """The same actor, of other tensors: constants to the derivatives of the first."""
    agent = new_agent(BOX if isinstance(actor, npg.GaussianActor) else DISCRETE).double()
    agent.actor.load_state_dict(actor.state_dict())
    return agent.actor.requires_grad_(False)


@BOTH
def test_the_fisher_matrix_is_symmetric_and_positive(space: gym.Space):
    actor, (obs, *_) = random_agent(space).actor, random_batch(space)
    fisher = shipped_fisher(actor, obs)
    close(fisher, fisher.T)
    eigenvalues = torch.linalg.eigvalsh(fisher)
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() > 0.1


# -- KL ----------------------------------------------------------------------------------------------------------------


@BOTH
def test_kl_is_that_of_torch_distributions(space: gym.Space):
    old, new, (obs, *_) = random_agent(space).actor, random_agent(space).actor, random_batch(space)
    for shape in ((12,), (4, 3)):
        seen = obs.reshape(*shape, 3)
        kl = npg.kl_divergence(npg.distribution(old, seen), npg.distribution(new, seen))
        expected = mean_kl(old, new, seen)
        close(kl, expected)
        assert (kl - mean_kl(new, old, seen)).abs() > 0.01  # the other way round it is another number
        for one, other in zip(*(torch.autograd.grad(x, list(new.parameters())) for x in (kl, expected)), strict=True):
            close(one, other)
        assert npg.kl_divergence(npg.distribution(new, seen), npg.distribution(new, seen)) == 0


def test_kl_by_hand():
    log = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).double().log()
    close(npg.categorical_kl(log[:1], log[1:]), [0.5 * np.log(2) + 0.5 * np.log(2 / 3)])
    mean, sigma = torch.zeros(1, 2).double(), torch.tensor([1.0, 2.0]).double()
    # dimensions: σ 1 → 2 and μ 0 → 3; σ 2 → 1 and μ 0 → −1: log 2 + (1 + 9)/8 − 1/2, −log 2 + (4 + 1)/2 − 1/2
    close(npg.gaussian_kl(mean, sigma.log(), mean + torch.tensor([3.0, -1.0]), sigma.flip(0).log()), [1.25 + 2.5 - 1])


@pytest.mark.parametrize("change", [1e-3, 1e-5])
def test_a_small_kl_survives_float32(change: float):
    """It is 3/2 change² for a change of both log σ and μ / σ; log σ² and σ² themselves would lose it in rounding."""
    mean, log_std = torch.zeros(1, 1), torch.full((1,), -1.0)
    exact = npg.gaussian_kl(*(x.double() for x in (mean, log_std, mean + change * log_std.exp(), log_std + change)))
    kl = npg.gaussian_kl(mean, log_std, mean + change * log_std.exp(), log_std + change)
    assert kl.item() == pytest.approx(exact.item(), rel=0.1)
    assert kl.item() == pytest.approx(1.5 * change**2, rel=0.1)


# -- conjugate gradient ------------------------------------------------------------------------------------------------


def positive_matrix(n: int, smallest: float = 0.1) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n).double())
    return q @ torch.diag(torch.linspace(smallest, 3, n).double()) @ q.T


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_conjugate_gradient_solves_the_equations(n: int):
    A, b = positive_matrix(n), torch.randn(n).double()
    close(npg.conjugate_gradient(lambda v: A @ v, b, n, 1e-12), torch.linalg.solve(A, b), 1e-8)


def test_conjugate_gradient_is_the_best_in_the_krylov_space():
    """Of all combinations of b, A b, ..., A^(k−1) b it has the smallest error, measured by A, after k iterations."""
    A, b = positive_matrix(8), torch.randn(8).double()
    solution, errors = torch.linalg.solve(A, b), []
    for k in range(1, 8):
        basis = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(k)], 1)
        best = basis @ torch.linalg.solve(basis.T @ A @ basis, basis.T @ b)
        x = npg.conjugate_gradient(lambda v: A @ v, b, k)
        close(x, best, 1e-8)
        errors.append((x - solution) @ A @ (x - solution))
    assert all(a > b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradient_stops_at_the_residual(dtype: torch.dtype):
    """Many more iterations than needed change nothing, with a b of any size; each calls the product once."""
    A, b = positive_matrix(9, 1.0).to(dtype), torch.randn(9, dtype=dtype)
    for scale in (1e-12, 1.0, 1e12):
        results = [npg.conjugate_gradient(lambda v: A @ v, scale * b, k, 1e-3) for k in range(30)]
        residuals = [((A @ x - scale * b).norm() / (scale * b).norm()).item() for x in results]
        last = next(k for k, residual in enumerate(residuals) if residual <= 1e-3)
        assert 2 < last < 9
        assert all(torch.equal(x, results[last]) for x in results[last:])
        assert not torch.equal(results[last], results[last - 1])
    calls = []
    npg.conjugate_gradient(lambda v: calls.append(v) or A @ v, b, 30)
    assert len(calls) == 30


def test_conjugate_gradient_of_nothing_is_nothing():
    A = positive_matrix(4)
    assert torch.equal(npg.conjugate_gradient(lambda v: A @ v, torch.zeros(4).double(), 5), torch.zeros(4).double())


@pytest.mark.parametrize("eigenvalues", [[-1.0, -2, -3], [1.0, 2, -0.5], [0.0, 0, 0]])
def test_a_curvature_that_is_not_positive_gives_nan(eigenvalues: list[float]):
    A = torch.diag(torch.tensor(eigenvalues).double())
    assert npg.conjugate_gradient(lambda v: A @ v, torch.ones(3).double(), 5).isnan().all()


# -- the natural gradient ----------------------------------------------------------------------------------------------


def gradient_of(agent: npg.Agent, batch: tuple, params: list[Tensor]) -> Tensor:
    obs, actions, advantages = batch
    with torch.no_grad():
        old, (old_logprobs, _) = npg.distribution(agent.actor, obs), agent.actor(obs, actions)
    loss, _ = npg.surrogate_loss(agent, obs, actions, old_logprobs, advantages, *old, ent_coef=0.0)
    return -npg.flat_grad(loss, params)


@pytest.mark.parametrize("iterations", [3, 80])
@pytest.mark.parametrize("damping", [0.01, 0.5])
@BOTH
def test_direction_and_curvature(space: gym.Space, damping: float, iterations: int):
    agent, batch = random_agent(space), random_batch(space)
    params = list(agent.actor.parameters())
    g, F = gradient_of(agent, batch, params), dense_fisher(agent.actor, batch[0])
    product = npg.fisher_vector_product(agent.actor, batch[0], params)
    x, curvature = npg.natural_gradient(product, g, iterations, damping)
    solution = torch.linalg.solve(F + damping * torch.eye(len(F)), g)
    if iterations == 80:
        close(x, solution, 1e-4 * solution.norm())
    else:
        assert (x - solution).norm() > 1e-3 * solution.norm()
    # At the end, what is left of the residual is not orthogonal
    close(curvature, x @ F @ x, 1e-9 if iterations == 3 else 1e-6 * curvature.item())


def test_step_size_by_hand():
    close(npg.kl_step_size(torch.tensor(8.0).double(), 0.04), 0.1)


def tabular_actor(space: gym.Space, A: Tensor | None = None) -> nn.Module:
    """π with a row of numbers for each of 3 one-hot observations; these, and log σ, are A φ, or φ itself."""
    base = npg.GaussianActor if space is BOX else npg.CategoricalActor
    n, size = 2 if space is BOX else 3, 8 if space is BOX else 9

    class Actor(base):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_actions, self.A = n, torch.eye(size).double() if A is None else A
            self.phi = nn.Parameter(torch.linalg.solve(self.A, torch.linspace(-0.9, 1.1, size).double()))

        def net(self, obs: Tensor) -> Tensor:
            return obs @ (self.A @ self.phi)[: 3 * n].reshape(3, n)

        log_std = property(lambda self: (self.A @ self.phi)[3 * n :])

    return Actor()


ONE_HOT = torch.eye(3).double()[torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 2])]


@BOTH
def test_with_a_table_of_parameters_the_step_is_that_of_the_lecture(space: gym.Space):
    """α = √(2ε / gᵀF⁻¹g) and x = F⁻¹g without damping; a softmax has a null space, where g has no part."""
    actor, (_, *batch) = tabular_actor(space), random_batch(space)
    agent, params = SimpleNamespace(actor=actor), [actor.phi]
    g, F = gradient_of(agent, (ONE_HOT, *batch), params), dense_fisher(actor, ONE_HOT)
    assert torch.linalg.matrix_rank(F) == (8 if space is BOX else 6)
    natural = torch.linalg.pinv(F) @ g
    x, curvature = npg.natural_gradient(npg.fisher_vector_product(actor, ONE_HOT, params), g, 20, 0.0)
    close(x, natural, 1e-4 * natural.norm())
    close(npg.kl_step_size(curvature, 0.03), (2 * 0.03 / (g @ natural)).sqrt(), 1e-6)


@BOTH
def test_the_natural_step_does_not_depend_on_the_parameters(space: gym.Space):
    """With θ = A φ, the step in φ leads to the same policy as that in θ; the plain step, or damping, does not."""
    obs, actions, advantages = ONE_HOT, *random_batch(space)[1:]
    size = 8 if space is BOX else 9
    A = torch.randn(size, size).double() + 2 * torch.eye(size)
    new = {"natural": [], "plain": [], "damped": []}
    for actor in (tabular_actor(space), tabular_actor(space, A)):
        params, start = [actor.phi], actor.phi.detach().clone()
        g = gradient_of(SimpleNamespace(actor=actor), (obs, actions, advantages), params)
        product = npg.fisher_vector_product(actor, obs, params)
        x, curvature = npg.natural_gradient(product, g, 60, 0.0)
        damped, damped_curvature = npg.natural_gradient(product, g, 60, 0.1)
        for kind, step in (
            ("damped", npg.kl_step_size(damped_curvature, 0.1) * damped),
            ("natural", npg.kl_step_size(curvature, 0.1) * x),
            ("plain", npg.kl_step_size(g @ product(g), 0.1) * g),  # of the same length
        ):
            actor.phi.data = start + step
            new[kind].append(vector(npg.distribution(actor, obs)))
    close(*new["natural"], 1e-4)
    assert (new["plain"][0] - new["plain"][1]).abs().max() > 0.05
    assert (new["damped"][0] - new["damped"][1]).abs().max() > 0.01


@pytest.mark.parametrize("damping", [0.0, 0.1])
@BOTH
def test_the_kl_of_a_step_tends_to_what_it_should_be(space: gym.Space, damping: float):
    agent, batch, errors = random_agent(space), random_batch(space, 200), []
    params = list(agent.actor.parameters())
    theta, g = npg.flatten(params).data, gradient_of(agent, batch, params)
    x, curvature = npg.natural_gradient(npg.fisher_vector_product(agent.actor, batch[0], params), g, 10, damping)
    start, old = theta.clone(), random_copy(agent.actor)
    for max_kl in (1e-2, 1e-4, 1e-6, 1e-8):
        theta.copy_(start + npg.kl_step_size(curvature, max_kl) * x)
        errors.append(abs(mean_kl(old, agent.actor, batch[0]).item() / max_kl - 1))
    assert all(small < 0.2 * large for large, small in itertools.pairwise(errors))  # with √ε, or faster
    assert errors[-1] < 1e-3


@BOTH
def test_the_host_does_not_wait_for_the_conjugate_gradient(space: gym.Space):
    agent, batch = random_agent(space), random_batch(space)
    with pretend_cuda() as gpu:
        agent, batch = agent.to("cuda"), [x.to("cuda") for x in batch]
        params = list(agent.actor.parameters())
        g, product = gradient_of(agent, batch, params), npg.fisher_vector_product(agent.actor, batch[0], params)
        x, curvature = npg.natural_gradient(product, g, 10, 0.1)
        step = npg.kl_step_size(curvature, 0.01) * x
        assert gpu.waits == []
        assert step.cpu().isfinite().all()
        assert len(gpu.waits) == 1


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


gym.register("npg/Counting-v0", Counting, kwargs={"action_space": DISCRETE})
gym.register("npg/CountingBox-v0", Counting, kwargs={"action_space": BOX})


class Iteration(NamedTuple):
    """What train() did between two rollouts."""

    actors: list[nn.Module]  # before and after
    critics: list[nn.Module]
    normalized: Tensor  # obs as the networks see them
    rollout: npg.Rollout
    gae: list[tuple]  # arguments, as arrays, and result
    fits: list[tuple]  # the critic's minibatches, with the parameters of the actor then, and the learning rate
    metrics: dict[str, float]


RUNS: dict[str, list[Iteration]] = {}


def run_train(space: gym.Space, **flags: Any) -> list[Iteration]:
    """`follow`, once for each set of arguments."""
    key = f"{space} {flags}"
    RUNS[key] = RUNS.get(key) or follow(space, **flags)
    return RUNS[key]


def follow(space: gym.Space, patches: dict[str, Any] | None = None, **flags: Any) -> list[Iteration]:
    """The shipped train() in float64, written down; `patches` take the place of functions of npg.py."""
    collect, make_update, gae, end = npg.Collector.collect, npg.make_update, npg.gae, npg.Run.end_iteration
    agents, iterations, seen = [], [], SimpleNamespace(gae=[], fits=[])

    def spy_agent(*args: Any) -> npg.Agent:
        agents.append(Agent(*args).double())
        for param in agents[0].actor.parameters():
            param.data.add_(0.3 * torch.randn_like(param))
        agents[0].update_obs_norm = partial(spy_update_obs_norm, agents[0].update_obs_norm)
        return agents[0]

    def spy_update_obs_norm(update_obs_norm: Callable, obs: Tensor) -> None:
        seen.after = [frozen(agents[0].actor), frozen(agents[0].critic)]  # the new statistics change their parameters
        update_obs_norm(obs)

    def frozen(net: nn.Module) -> nn.Module:
        return copy_of(net).requires_grad_(False)

    def spy_collect(collector: Any, agent: npg.Agent, *args: Any) -> Any:
        rollout, ended = collect(collector, agent, *args)
        rollout = npg.Rollout(*(x.double() if x.is_floating_point() else x for x in rollout))
        seen.rollout, seen.before = rollout, [frozen(agent.actor), frozen(agent.critic)]
        seen.normalized, seen.gae, seen.fits = agent.obs_norm(rollout.obs), [], []
        return rollout, ended

    def spy_gae(*args: Any) -> Tensor:
        seen.gae.append((args, gae(*args)))
        return seen.gae[-1][1]

    def spy_make_update(loss: Any, params: list, optimizer: torch.optim.Optimizer, *rest: Any) -> Callable:
        update = make_update(loss, params, optimizer, *rest)

        def spy_update(*batch: Tensor) -> dict[str, Tensor]:
            seen.fits.append((batch, vector(agents[0].actor.parameters()), optimizer.param_groups[0]["lr"]))
            return update(*batch)

        return spy_update

    def spy_end(run: npg.Run, steps: int, ended: list, metrics: dict[str, float]) -> None:
        if not flags.get("normalize_obs"):
            seen.after = [frozen(agents[0].actor), frozen(agents[0].critic)]
        pairs = zip(seen.before, seen.after, strict=True)
        iterations.append(Iteration(*pairs, seen.normalized, seen.rollout, seen.gae, seen.fits, metrics))
        end(run, steps, ended, metrics)

    tiny = {"num_envs": 2, "num_steps": 20, "total_timesteps": 160, "hidden_size": 3, "critic_epochs": 2}
    tiny |= {"cg_iterations": 80, "num_minibatches": 2, "eval_episodes": 0, "checkpoint_every": 0, "device": "cpu"}
    env_id = "npg/Counting-v0" if space is DISCRETE else "npg/CountingBox-v0"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(npg, "Agent", spy_agent)
        patch.setattr(npg.Collector, "collect", spy_collect)
        patch.setattr(npg, "make_update", spy_make_update)
        patch.setattr(npg, "gae", spy_gae)
        patch.setattr(npg.Run, "end_iteration", spy_end)
        for name, function in (patches or {}).items():
            patch.setattr(npg, name, function)
        npg.train(npg.Args(run_dir=directory, env_id=env_id, **tiny | flags))
    return iterations


def copy_of(net: nn.Module) -> nn.Module:
    agent = new_agent(BOX if hasattr(net, "log_std") else DISCRETE).double()
    other = agent.critic if isinstance(net, npg.Critic) else agent.actor
    other.load_state_dict(net.state_dict())
    return other


RULES = pytest.mark.parametrize(
    "flags",
    [
        {}, {"step_rule": "fixed"}, {"anneal_lr": False, "max_kl": 0.3}, {"damping": 1.0, "ent_coef": 0.3},
        {"normalize_advantages": False, "normalize_obs": True, "normalize_rewards": True},
    ],
    ids=str,
)  # fmt: skip


@RULES
@BOTH
def test_the_steps_of_a_run_can_be_taken_by_a_second_road(space: gym.Space, flags: dict):
    """With the dense Fisher matrix, a linear solver and torch.distributions: the same parameters, the same log."""
    args = npg.Args(**flags)
    iterations = run_train(space, **flags)
    assert len(iterations) == 4
    for k, each in enumerate(iterations):
        (old, new), obs, actions = each.actors, each.normalized.flatten(0, 1), each.rollout.actions.flatten(0, 1)
        ((_, advantages),) = each.gae
        advantages = advantages.flatten()
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.numpy().std()
        live = copy_of(old)
        pi, params = policy_of(live, obs), list(live.parameters())
        objective = (pi.log_prob(actions) * advantages).mean() + args.ent_coef * pi.entropy().mean()
        g = vector(torch.autograd.grad(objective, params, retain_graph=True))
        F = dense_fisher(live, obs)
        x = torch.linalg.solve(F + args.damping * torch.eye(len(F)), g)
        left = 1 - args.anneal_lr * k / 4
        alpha = left * (args.step_size if args.step_rule == "fixed" else (2 * args.max_kl / (x @ F @ x)).sqrt())
        close(vector(new.parameters()), vector(old.parameters()) + alpha * x, 1e-5)
        assert (alpha * x).norm() > 0.01
        entropies = [policy_of(actor, obs).entropy().mean() for actor in each.actors]
        logratio = policy_of(new, obs).log_prob(actions) - policy_of(old, obs).log_prob(actions)
        surrogate = (logratio.exp() * advantages).mean()
        growth = surrogate - advantages.mean() + args.ent_coef * (entropies[1] - entropies[0])
        expected = {
            "losses/policy_loss": -surrogate, "losses/entropy": entropies[1], "losses/grad_norm": g.norm(),
            "losses/improvement": growth,
            "losses/kl": mean_kl(old, new, obs), "losses/approx_kl": (logratio.exp() - 1 - logratio).mean(),
            "losses/accepted_fraction": 1.0, "charts/learning_rate": alpha,
        }  # fmt: skip
        for tag, value in expected.items():
            assert each.metrics[tag] == pytest.approx(torch.as_tensor(value).item(), rel=1e-4, abs=1e-7), tag


@RULES
def test_the_critic_is_fitted_after_the_policy_step(flags: dict):
    """On G = A + V(s) with the critic as it was, in minibatches that take each transition once an epoch."""
    orders = set()
    for k, each in enumerate(run_train(BOX, **flags)):
        ((arguments, advantages),) = each.gae
        before, after = each.critics
        close(arguments[1], before(each.normalized))
        returns = (advantages + arguments[1]).flatten()
        obs = each.normalized.flatten(0, 1)
        assert len(each.fits) == 4
        for epoch in (each.fits[:2], each.fits[2:]):
            rows = [tuple(row.tolist()) for (o, y), _, _ in epoch for row in torch.cat([o, y.unsqueeze(1)], 1)]
            assert sorted(rows) == sorted(tuple(row.tolist()) for row in torch.cat([obs, returns.unsqueeze(1)], 1))
            orders.add(tuple(rows))
        left = 1 - npg.Args(**flags).anneal_lr * k / 4
        for _, theta, learning_rate in each.fits:
            close(theta, vector(each.actors[1].parameters()))
            assert learning_rate == pytest.approx(2e-3 * left)
        assert (vector(before.parameters()) - vector(after.parameters())).norm() > 1e-4
        values = arguments[1].flatten()
        explained = 1 - np.var((returns - values).detach().numpy()) / np.var(returns.detach().numpy())
        assert each.metrics["losses/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert len(orders) == 8


def test_advantages_are_those_of_the_rollout():
    """With V of the true successors, and rewards that are scaled by the newest statistics."""
    flags = {"normalize_advantages": False, "normalize_obs": True, "normalize_rewards": True}
    discounted, seen = [], []
    for each in run_train(BOX, **flags):
        (((rewards, _, next_values, terminated, dones, gamma, lam), _),) = each.gae
        discounted.append(each.rollout.discounted_returns.flatten())
        close(rewards, each.rollout.rewards / (torch.cat(discounted).numpy().var() + 1e-8) ** 0.5, 1e-6)
        mean, var = (torch.cat(seen).mean(0), torch.cat(seen).var(0, correction=0)) if seen else (0.0, torch.ones(3))
        close(next_values, each.critics[0]((each.rollout.next_obs - mean) / (var + 1e-8).sqrt()), 1e-5)
        assert torch.equal(terminated, each.rollout.terminated)
        assert torch.equal(dones, each.rollout.dones)
        assert terminated.any()
        assert (dones & ~terminated).any()
        assert (gamma, lam) == (0.99, 0.95)
        seen.append(each.rollout.obs.flatten(0, 1))


def times(factor: float) -> Callable:
    shipped = npg.fisher_vector_product

    def product(*args: Any) -> Callable:
        return lambda v: factor * shipped(*args)(v)

    return product


def without_gradient(*args: Any, **kwargs: Any) -> Any:
    loss, metrics = SHIPPED_LOSS(*args, **kwargs)
    return 0 * loss, metrics


SHIPPED_LOSS = npg.surrogate_loss


@pytest.mark.parametrize(
    ("patches", "flags"),
    [
        ({"fisher_vector_product": times(-1.0)}, {}), ({"fisher_vector_product": times(float("nan"))}, {}),
        ({"fisher_vector_product": times(-1.0)}, {"step_rule": "fixed", "damping": 0.0}),
        ({"fisher_vector_product": times(-1e-3)}, {"damping": 10.0}),  # a small x, but its curvature is negative
        ({"fisher_vector_product": times(float("inf"))}, {"step_rule": "fixed"}),
        ({"surrogate_loss": without_gradient}, {}), ({"surrogate_loss": without_gradient}, {"step_rule": "fixed"}),
        ({"kl_step_size": lambda curvature, _: curvature / 0}, {}),
    ],
    ids=["negative", "nan", "fixed negative", "hidden", "fixed inf", "no gradient", "fixed no gradient", "endless"],
)  # fmt: skip
@BOTH
def test_without_a_good_direction_there_is_no_step(space: gym.Space, patches: dict, flags: dict):
    """The policy stays bit for bit what it was, and the log counts it; the run goes on, and fits the critic."""
    iterations = follow(space, patches, total_timesteps=80, **flags)
    assert len(iterations) == 2
    for each in iterations:
        before, after = (vector(actor.parameters()) for actor in each.actors)
        assert torch.equal(before.view(torch.int64), after.view(torch.int64))
        assert each.metrics["losses/accepted_fraction"] == 0
        assert each.metrics["losses/kl"] == each.metrics["losses/approx_kl"] == each.metrics["losses/improvement"] == 0
        assert each.metrics["charts/learning_rate"] == 0
        assert not torch.equal(*(vector(critic.parameters()) for critic in each.critics))


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


gym.register("npg/Target-v0", Target)


@pytest.mark.parametrize("broken", [False, True])
def test_learns_a_continuous_action(broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The threshold is one that an update with a wrong sign misses; the policy starts near −1/3."""
    estimate = npg.gae
    if broken:
        monkeypatch.setattr(npg, "gae", lambda *x: -estimate(*x))
    args = npg.Args(
        env_id="npg/Target-v0", total_timesteps=6_000, num_envs=4, num_steps=25, hidden_size=16, max_kl=0.05,
        device="cpu", eval_episodes=200, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert (npg.train(args)["eval/episodic_return"] > -0.02) == (not broken)


def test_learns_cartpole(tmp_path: Path):
    args = npg.Args(total_timesteps=15_000, device="cpu", eval_episodes=10, run_dir=str(tmp_path / "run"))
    assert npg.train(args)["eval/episodic_return"] > 200  # at random 20, with a wrong sign 9
