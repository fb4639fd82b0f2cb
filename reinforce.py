# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium[classic-control,mujoco]==1.4.0",
#   "mujoco==3.8.1",
#   "numpy==2.4.6",
#   "tyro==1.0.17",
#   "tensorboard==2.21.0",
# ]
# ///
"""REINFORCE: make the actions of a good episode more likely and those of a bad one less, in proportion to the return.

Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning"; Sutton et
al. 1999, "Policy Gradient Methods for Reinforcement Learning with Function Approximation" (the causal form, theorem 1).

The objective is J(θ) = E[Σ_t γ^t r_t] over whole episodes τ = (s_0, a_0, r_0, s_1, ...) drawn from p_θ. The dynamics do
not depend on θ, so ∇ log p_θ(τ) = Σ_t ∇ log π_θ(a_t|s_t), and since ∇p = p ∇ log p,

    ∇J(θ) = E[Σ_t ∇ log π_θ(a_t|s_t) Ψ_t] ≈ (1/N) Σ_i Σ_t ∇ log π_θ(a_it|s_it) (Ψ_it − b).

    repeat:
        1. run N whole episodes with π_θ
        2. weight each action: Ψ_t is the return of the whole trajectory, or only the reward-to-go Σ_{t'≥t} ...
        3. subtract a baseline b that does not depend on the action: the same expectation, a smaller variance
        4. one Adam step on the pseudo-loss −(1/N) Σ_i Σ_t log π_θ(a_it|s_it) (Ψ_it − b), a weighted log-likelihood;
           update_epochs > 1 takes further steps on the same episodes, which came from β, with importance weights
        5. if the baseline is a value function, fit V(s_t) to the rewards-to-go by least squares
        6. update the observation statistics, then log, evaluate and save

Discount. `start` weights the reward at t' with γ^t', as J does: exactly ∇J. `now`, which everybody uses, weights it
with γ^(t'−t) for the action at t (earlier rewards, if kept, count in full). It drops γ^t, so late actions count as much
as early ones, but it is the gradient of no function (Nota and Thomas 2019). With γ = 1 both are the same.

Baseline. `average`, `time` (one for each t) and `optimal` (of all constants the one with the least variance: for g =
∇ log p_θ(τ) and the return R it is E[‖g‖²R] / E[‖g‖²]) are taken over the other N − 1 episodes. An episode in its own
baseline would bias the gradient by a factor 1 − 1/N. `value` is V(s_t), fitted to earlier batches; it does not see how
much time is left, so where all episodes run into the limit `time` is the better one.

Importance. `trajectory`, Π_t π_θ/β over the episode, is unbiased for a fixed θ, but its variance grows exponentially.
`causal`, Π_{t'≤t} π_θ/β, has the states of π_θ but leaves Ψ that of β. `first_order`, π_θ/β at t alone, also leaves the
states those of β; at θ = β all three agree.

Time limits are the horizon of the objective: nothing is bootstrapped. Each environment runs exactly one episode in an
iteration, and those that end early wait: the first N episodes to end would too often be short ones.

`--demonstrations FILE` first clones recorded behaviour by maximum likelihood, the pseudo-loss with all weights 1.

Compare with actor_critic.py, which replaces the return by a critic's estimate and needs no whole episodes.

    python reinforce.py
    python reinforce.py --env-id InvertedPendulum-v5 --total-timesteps 1000000 --baseline time --normalize-obs \
        --log-std-init -0.5
"""

import math
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, NoReturn
from zipfile import BadZipFile, ZipFile

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium import spaces
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Args:
    """Flags of the command line; the defaults solve CartPole-v1."""

    # Experiment
    env_id: str = "CartPole-v1"  # Gymnasium environment with Box or Discrete observations and actions
    seed: int = 1  # of everything random: networks, actions, environments
    total_timesteps: int = 200_000  # environment steps over all environments, rounded up to a whole iteration
    num_envs: int = 8  # environments that are stepped together, N
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:N
    num_threads: int = 1  # CPU threads of PyTorch; one is fastest for small networks
    compile: bool = False  # compile loss, gradient and clipping into one graph (takes half a minute first)
    run_dir: str = ""  # where the run is written (default: runs/<env-id>/<script>/seed<seed>__<date-time>)
    resume: bool = False  # go on from the checkpoint in --run-dir if there is one
    checkpoint_every: int = 100_000  # environment steps between checkpoints, after which all episodes restart; 0: off
    eval_every: int = 0  # environment steps between evaluations of the greedy policy; 0: at the end alone
    eval_episodes: int = 20  # episodes of one evaluation; 0: no evaluation

    # Algorithm
    weight: Literal["trajectory", "reward_to_go"] = "reward_to_go"  # rewards that weight an action: all, or later ones
    discount_from: Literal["now", "start"] = "now"  # discount γ^(t'-t) from the action, or γ^t' from the start: exact
    baseline: Literal["none", "average", "optimal", "time", "value"] = "value"  # subtracted from the weights
    update_epochs: int = 1  # passes over each batch
    importance: Literal["trajectory", "causal", "first_order"] = "trajectory"  # weights from the second pass on
    learning_rate: float = 2e-3  # the optimizer's step size
    anneal_lr: bool = True  # lower the learning rate linearly: full in the first iteration, 0 after the last
    gamma: float = 0.99  # discount γ
    critic_learning_rate: float = 2e-3  # Adam's step size for V
    critic_epochs: int = 20  # passes over each batch in the regression of V
    normalize_advantages: bool = False  # shift and scale the advantages of each update to mean 0 and deviation 1
    normalize_obs: bool = False  # shift and scale observations by their running mean and deviation
    hidden_size: int = 64  # width of the two hidden layers of each network
    log_std_init: float = 0.0  # log σ at the start, in units in which the action bounds are ±1
    demonstrations: str = ""  # .npz file with arrays obs and actions, to be cloned before the first step
    cloning_steps: int = 1000  # gradient steps of the cloning, each on 256 random rows

    def __post_init__(self) -> None:
        check_flags(self)
        if self.num_envs == 1 and self.baseline in ("average", "optimal", "time"):
            raise ValueError(f"--baseline {self.baseline} is a mean over other episodes; it needs --num-envs 2 or more")


def make_envs(env_id: str, num_envs: int) -> list[gym.Env]:
    """A plain list of environments; observations come out flat (Box reshaped, Discrete one-hot)."""
    try:
        envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
    except (gym.error.Error, ImportError) as error:
        fail(f"--env-id {env_id}: {error}")
    obs_space, action_space = envs[0].observation_space, envs[0].action_space
    if not isinstance(obs_space, spaces.Box | spaces.Discrete):
        fail(f"{env_id} has observations {obs_space}; Box and Discrete are supported, here and in the sibling scripts")
    is_box = isinstance(action_space, spaces.Box) and action_space.dtype.kind == "f"
    if not is_box and not isinstance(action_space, spaces.Discrete):
        fail(f"{env_id} has actions {action_space}; Discrete and Box of floats are supported, here and in the siblings")
    flat = isinstance(obs_space, spaces.Box) and len(obs_space.shape) == 1
    return envs if flat else [gym.wrappers.FlattenObservation(env) for env in envs]


def mlp(fan_in: int, hidden_size: int, fan_out: int, gain: float) -> nn.Sequential:
    """tanh network with two hidden layers; orthogonal weights with gains √2, √2 and `gain`, zero biases."""
    layers = [nn.Linear(fan_in, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, fan_out)]
    for layer, layer_gain in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class CategoricalActor(nn.Module):
    """Softmax policy over discrete actions: π(a|s) = exp z_a(s) / Σ_b exp z_b(s)."""

    def __init__(self, obs_dim: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.net = mlp(obs_dim, hidden_size, num_actions, 0.01)

    def noise(self, *shape: int) -> Tensor:
        """Gumbel noise −log E with E ~ Exp(1), (*shape, A): argmax_a (z_a + noise_a) is a draw from π."""
        return -torch.empty(*shape, self.num_actions).exponential_().log()

    @staticmethod
    def choose(logits: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions (B,) from logits (B, A); noise 0 gives the most likely ones."""
        return (logits + noise).argmax(-1)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and the entropy −Σ_a π(a|s) log π(a|s), of the shape of `actions`."""
        logprobs = self.net(obs).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy


class GaussianActor(nn.Module):
    """Gaussian policy over continuous actions: π(·|s) = N(μ(s), diag σ²), where log σ is a parameter."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden_size, action_dim, 0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init))

    def noise(self, *shape: int) -> Tensor:
        """σ ε with ε ~ N(0, 1), (*shape, action_dim): μ + noise is a draw from π."""
        return torch.randn(*shape, len(self.log_std)) * self.log_std.detach().exp().cpu()

    @staticmethod
    def choose(mean: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
        """Actions (B, action_dim) from means (B, action_dim); noise 0 gives the most likely ones."""
        return mean + noise

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) = −½ Σ_d z_d² − Σ_d log(σ_d √(2π)) with z = (a − μ) / σ, and the entropy Σ_d log(σ_d √(2πe))."""
        z = (actions - self.net(obs)) / self.log_std.exp()
        log_normalizer = self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std)
        logprobs = -0.5 * z.square().sum(-1) - log_normalizer
        return logprobs, (log_normalizer + 0.5 * len(self.log_std)).expand_as(logprobs)


class Critic(nn.Module):
    """State value V(s): (..., obs_dim) to (...)."""

    def __init__(self, obs_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.net = mlp(obs_dim, hidden_size, 1, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


class RunningNorm(nn.Module):
    """(x − mean) / √(variance + 1e-8), clipped to ±10, with the moments of all rows so far; before any of them, x."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))  # of (), a graph forgets what it wrote
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("limit", torch.full(shape, torch.finfo(torch.float32).max))  # inf is no good number

    def update(self, x: Tensor) -> None:
        """Adds the rows of x (..., *shape) to the moments (Chan et al. 1979, eq. 2.1)."""
        x = x.to(self.mean.dtype).reshape(-1, *self.mean.shape)
        var, mean = torch.var_mean(x, 0, correction=0)
        self.count.add_(len(x))
        weight, delta = len(x) / self.count, mean - self.mean
        self.var.lerp_(var + (1 - weight) * delta**2, weight)
        self.mean.lerp_(mean, weight)
        self.scale.copy_((self.var + 1e-8).rsqrt())
        self.shift.copy_(-self.mean * self.scale)
        self.limit.fill_(10.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).clamp(-self.limit, self.limit)


class Agent(nn.Module):
    """The policy, the critic, and the statistics that normalise what both of them see."""

    settled_after = 100_000  # observations

    def __init__(self, env: gym.Env, hidden_size: int, log_std_init: float) -> None:
        super().__init__()
        obs_dim, space = env.observation_space.shape[0], env.action_space
        self.obs_norm = RunningNorm(obs_dim)
        if isinstance(space, spaces.Discrete):
            self.actor = CategoricalActor(obs_dim, int(space.n), hidden_size)
        else:
            self.actor = GaussianActor(obs_dim, math.prod(space.shape), hidden_size, log_std_init)
        self.critic = Critic(obs_dim, hidden_size)

    def update_obs_norm(self, obs: Tensor) -> None:
        """Adds raw observations (..., obs_dim) to the statistics; once these are settled, no network's output changes.

        The first layers make up for it: W' = W scale / scale', b' = b + W' scale' (mean' − mean), as the last one does
        in Pop-Art (van Hasselt et al. 2016, proposition 1). Else new statistics would move the policy, and no clipping
        nor bound on the KL would know. Inputs beyond the clip of ±10 aside, and the slope where a deviation grows more
        than tenfold at once, as that of an input at rest does. At first outputs do change: kept from the first batch
        on, they made two trials on Hopper-v5 (trpo.py, a2c.py) end lower.
        """
        norm = self.obs_norm
        settled, mean, scale = norm.count >= self.settled_after, norm.mean.clone(), norm.scale.clone()
        norm.update(obs)
        ratio = torch.where(settled, scale / norm.scale, 1.0).clamp(max=10.0)
        moved = (settled * (norm.mean - mean) * norm.scale).to(scale.dtype)
        with torch.no_grad():
            for layer in {self.actor.net[0], self.critic.net[0]}:  # one, if they share it
                layer.weight.mul_(ratio)
                layer.bias.add_(layer.weight @ moved)

    def policy(self) -> Callable[[np.ndarray, np.ndarray | float], np.ndarray]:
        """act(obs, noise): the current policy, frozen, in NumPy; from raw observations (N, obs_dim) to actions.

        For the few rows of an environment step this is several times faster than PyTorch, and nothing has to go to a
        GPU and back. Actions are in the policy's units; `action_map` turns them into the environment's.
        """
        norm, net = self.obs_norm, self.actor.net
        tensors = (norm.scale, norm.shift, -norm.limit, norm.limit, *net.parameters())
        scale, shift, low, high, w1, b1, w2, b2, w3, b3 = (x.detach().cpu().numpy().T.copy() for x in tensors)

        def act(obs: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
            x = np.minimum(np.maximum(obs * scale + shift, low), high)
            return self.actor.choose(np.tanh(np.tanh(x @ w1 + b1) @ w2 + b2) @ w3 + b3, noise)

        return act


def discounted_sum(x: Tensor, discounts: Tensor) -> Tensor:
    """y_t = x_t + c_t y_{t+1} with y_T = 0, along the first axis, for x and discounts c of one shape (T, ...).

    Takes log2 T passes in place of T steps: after pass k, y_t holds its first 2^k terms and c_t the product of as many
    discounts (Hillis and Steele 1986).
    """
    assert x.shape == discounts.shape
    y, c, reach = x, discounts, 1
    while reach < len(x):
        later_y, later_c = (pad(z[reach:], (0, 0) * (x.dim() - 1) + (0, reach)) for z in (y, c))
        y, c, reach = y + c * later_y, c * later_c, 2 * reach
    return y


def start_discount(rewards: Tensor, gamma: float, discount_from: str) -> Tensor:
    """The factor of step t, (T, 1): γ^t if J is discounted from the start, 1 if each action discounts from now on."""
    steps = torch.arange(len(rewards), dtype=rewards.dtype, device=rewards.device).unsqueeze(1)
    return gamma**steps if discount_from == "start" else torch.ones_like(steps)


def past_rewards(rewards: Tensor) -> Tensor:
    """Σ_{t'<t} r_t' (T, N): what causality leaves out. No action can change it: it adds nothing but variance."""
    return rewards.cumsum(0) - rewards


def leave_one_out(x: Tensor) -> Tensor:
    """Σ_{j≠i} x_j over the last axis, the episodes, for each i."""
    return x @ (1 - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def average_baseline(weights: Tensor, mask: Tensor) -> Tensor:
    """b_i: the mean over the other episodes of their mean weight; (N,) from (T, N)."""
    means = (weights * mask).sum(0) / mask.sum(0)
    return leave_one_out(means) / (len(means) - 1)


def time_baseline(weights: Tensor, mask: Tensor) -> Tensor:
    """b_ti: the mean weight at t over the other episodes that still run then, 0 if none does; (T, N) from (T, N)."""
    return leave_one_out(weights * mask) / leave_one_out(mask.to(weights.dtype)).clamp(min=1)


def optimal_baseline(scores: Tensor, grads: Tensor) -> Tensor:
    """b_i = Σ_{j≠i} ⟨g_j, h_j⟩ / Σ_{j≠i} ‖g_j‖²: of all constants the one with the least variance of h − b g.

    scores g_j = Σ_t ∇ log π(a_t|s_t) and grads h_j = Σ_t ∇ log π(a_t|s_t) Ψ_t are (N, parameters); b is (N,). Where Ψ
    is the return R of the trajectory, h = R g and b estimates E[‖g‖² R] / E[‖g‖²].
    """
    return leave_one_out((scores * grads).sum(1)) / leave_one_out((scores * scores).sum(1)).clamp(min=1e-30)


def episode_gradients(actor: nn.Module, obs: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """Row i is Σ_t w_ti ∇ log π(a_ti|s_ti), the gradient of one episode alone: (N, parameters)."""

    def weighted_likelihood(params: dict[str, Tensor], obs: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
        logprobs, _ = torch.func.functional_call(actor, params, (obs, actions))
        return (weights * logprobs).sum()

    params = {name: param.detach() for name, param in actor.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(weighted_likelihood), (None, 1, 1, 1))(params, obs, actions, weights)
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


def importance_weights(logratio: Tensor, importance: str) -> Tensor:
    """Products of π_θ/β (T, N), from log π_θ − log β (T, N), which is 0 after the end of an episode; constants."""
    logratio = logratio.detach()
    if importance == "trajectory":
        return logratio.sum(0, keepdim=True).exp().expand_as(logratio)
    return (logratio.cumsum(0) if importance == "causal" else logratio).exp()


def pseudo_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """−(1/N) Σ_i Σ_t w_ti log π(a_ti|s_ti), from (T, N): minus its gradient is the estimate of ∇J; w is constant."""
    assert logprobs.shape == weights.shape
    return -(weights.detach() * logprobs).sum(0).mean()


def reinforce_loss(
    agent: Agent, obs: Tensor, actions: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    importance: str,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The pseudo-loss of masked episodes under the policy as it is now, and what to log of it."""
    logprobs, entropy = agent.actor(obs, actions)
    logratio = (logprobs - old_logprobs) * mask
    policy_loss = pseudo_loss(logprobs, importance_weights(logratio, importance) * advantages * mask)
    approx_kl, entropy = (((x * mask).sum() / mask.sum()) for x in (logratio.exp() - 1 - logratio, entropy))
    return policy_loss, {"policy_loss": policy_loss, "entropy": entropy, "approx_kl": approx_kl}


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    """mean (V(s) − G)² over (B,); G is a constant."""
    assert values.shape == returns.shape
    return mse_loss(values, returns.detach())


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 − Var(G − V) / Var(G): 1 for a perfect critic, 0 for a constant one."""
    return 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)


class Episodes(NamedTuple):
    """One episode of each of N environments; T is the length of the longest."""

    obs: Tensor  # s_t (T, N, obs_dim), raw; after its end an episode repeats its last state
    actions: Tensor  # a_t (T, N) or (T, N, action_dim), in the policy's units, not clipped
    rewards: Tensor  # r_t (T, N), received for a_t; 0 after the end
    mask: Tensor  # (T, N), true while the episode runs


def run_episodes(envs: list[gym.Env], agent: Agent, seeds: list[int | None], step: int = 0) -> Episodes:
    """Runs one whole episode in each environment, after `step` other steps; those that end early wait."""
    act, to_env, rows = agent.policy(), action_map(envs[0].action_space), []
    obs = np.array([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)], np.float32)
    running = np.ones(len(envs), bool)
    while running.any():
        if len(rows) % 128 == 0:
            noise = agent.actor.noise(128, len(envs)).numpy()  # for 128 steps at once
        actions = act(obs, noise[len(rows) % 128])
        if not math.isfinite(actions.sum()):  # MuJoCo would not survive it
            check_finite(step + sum(row[3].sum() for row in rows), {"obs": obs, "actions": actions})
        env_actions, mask = to_env(actions), running.copy()
        next_obs, rewards = obs.copy(), np.zeros(len(envs), np.float32)
        for i in np.flatnonzero(running):
            next_obs[i], rewards[i], terminated, truncated, _ = envs[i].step(env_actions[i])
            running[i] = not (terminated or truncated)
        rows.append((obs, actions, rewards, mask))
        obs = next_obs
    return Episodes(*(torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True)))


def load_demonstrations(path: str, env: gym.Env) -> tuple[Tensor, Tensor]:
    """Recorded observations (K, obs_dim) and actions; the file has the environment's units, this gives the policy's."""
    obs_space, space = env.observation_space, env.action_space
    try:
        file = np.load(path, allow_pickle=False)
        obs, actions = file["obs"].astype(np.float32), file["actions"]
    except (OSError, EOFError, LookupError, ValueError, BadZipFile, zlib.error) as error:
        fail(f"--demonstrations {path} is not an .npz file with arrays obs and actions ({error})")
    if isinstance(space, spaces.Box) and actions.dtype.kind in "fiu":
        actions = actions.astype(space.dtype)
    fits = obs.size and obs.shape[1:] == obs_space.shape and actions.shape[:1] == obs.shape[:1]
    if not fits or not all(map(space.contains, actions)):
        fail(f"--demonstrations {path} has obs {obs.shape} and actions {actions.shape} that do not fit {env.spec.id}")
    if not np.isfinite(obs).all():
        fail(f"--demonstrations {path} has observations that are not finite")
    scale, shift = action_units(space)
    actions = torch.as_tensor((actions - shift) / scale)
    return torch.from_numpy(obs), actions.long() if isinstance(space, spaces.Discrete) else actions.float().flatten(1)


def clone(agent: Agent, obs: Tensor, actions: Tensor, steps: int, learning_rate: float) -> None:
    """Behavioural cloning: maximises the likelihood of the recorded actions, with 256 random rows a step."""
    # An optimiser of its own: Adam's memory of these small gradients would make the first policy step far too large
    optimizer = torch.optim.Adam(agent.actor.parameters(), lr=learning_rate)
    for _ in range(steps):
        rows = torch.randint(len(obs), (256,)).to(obs.device)
        logprobs, _ = agent.actor(obs[rows], actions[rows])
        optimizer.zero_grad()
        pseudo_loss(logprobs[None], torch.ones_like(logprobs)[None]).backward()
        optimizer.step()


def train(args: Args) -> dict[str, float]:
    """Runs REINFORCE; gives the last value of each metric, the final evaluation among them."""
    device = set_up(args.device, args.num_threads, args.seed)
    envs = make_envs(args.env_id, args.num_envs)
    agent = Agent(envs[0], args.hidden_size, args.log_std_init).to(device)
    params, critic_params = list(agent.actor.parameters()), list(agent.critic.parameters())
    optimizer = torch.optim.Adam([flatten(params)], lr=args.learning_rate, eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam([flatten(critic_params)], lr=args.critic_learning_rate, eps=1e-5, fused=True)

    def critic_loss(obs: Tensor, returns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = value_loss(agent.critic(obs), returns)
        return loss, {"value_loss": loss}

    loss = partial(reinforce_loss, agent, importance=args.importance)
    update = make_update(loss, params, optimizer, math.inf, args.compile)
    update_critic = make_update(critic_loss, critic_params, critic_optimizer, math.inf, args.compile)
    demonstrations = load_demonstrations(args.demonstrations, envs[0]) if args.demonstrations else None
    with Run(args, agent=agent, optimizer=optimizer, critic_optimizer=critic_optimizer) as run:
        if demonstrations and run.step == 0:
            obs, actions = (x.to(device) for x in demonstrations)
            if args.normalize_obs:
                agent.update_obs_norm(obs)
            clone(agent, agent.obs_norm(obs), actions, args.cloning_steps, args.learning_rate)
            run.log(0, run.evaluate())
            print(f"cloned, without any reward: return {run.metrics.get('eval/episodic_return', math.nan):.1f}")
            run.clock = time.perf_counter()  # the speed is that of the steps with the environments
        while run.step < args.total_timesteps:
            learning_rate = args.learning_rate * (1 - args.anneal_lr * run.step / args.total_timesteps)
            optimizer.param_groups[0]["lr"] = learning_rate

            # 1. one whole episode in each environment
            streams = [(0, run.iteration, i) for i in range(args.num_envs)]
            seeds = [env_seed(args.seed, *stream) if run.fresh_start else None for stream in streams]
            episodes = run_episodes(envs, agent, seeds, run.step)
            check_finite(run.step, episodes._asdict())
            lengths, episodic_returns = episodes.mask.sum(0), episodes.rewards.double().sum(0)
            rows = episodes.mask.flatten().nonzero().squeeze(1).to(device)  # the steps that were taken
            obs, actions, rewards, mask = (x.to(device) for x in episodes)
            raw_obs, obs = obs, agent.obs_norm(obs)

            # 2. the weight of each action
            discount = start_discount(rewards, args.gamma, args.discount_from)
            returns = discounted_sum(rewards, torch.full_like(rewards, args.gamma))  # reward-to-go G_t
            weights = discount * returns
            if args.weight == "trajectory":
                weights = weights + past_rewards(discount * rewards)
            metrics = {"charts/discounted_return": returns[0].mean()}

            # 3. minus a baseline
            if args.baseline == "none":
                advantages = weights
            elif args.baseline == "average":
                advantages = weights - average_baseline(weights, mask)
            elif args.baseline == "optimal":
                scores = episode_gradients(agent.actor, obs, actions, mask.float())
                grads = episode_gradients(agent.actor, obs, actions, weights * mask)
                advantages = weights - optimal_baseline(scores, grads)
            elif args.baseline == "time":
                advantages = weights - time_baseline(weights, mask)
            else:
                with torch.no_grad():
                    values = agent.critic(obs)
                advantages = weights - discount * values
                taken = values.flatten()[rows], returns.flatten()[rows]
                metrics["losses/explained_variance"] = explained_variance(*taken)
            if args.normalize_advantages:
                taken = advantages.flatten()[rows]
                advantages = (advantages - taken.mean()) / (taken.std(correction=0) + 1e-8)
            if args.num_envs > 1:  # empirical variance of the gradient estimate, summed over the parameters
                grads = episode_gradients(agent.actor, obs, actions, advantages * mask)
                metrics["losses/gradient_variance"] = grads.var(0).sum() / args.num_envs

            # 4. policy steps on the pseudo-loss
            with torch.no_grad():
                old_logprobs, _ = agent.actor(obs, actions)
            batch = (obs, actions, old_logprobs, advantages, mask)
            metrics |= mean_metrics([update(*batch) for _ in range(args.update_epochs)])

            # 5. fit V to the rewards-to-go
            if args.baseline == "value":
                batch = (obs.flatten(0, 1)[rows], returns.flatten()[rows])
                fits = mean_metrics([update_critic(*batch) for _ in range(args.critic_epochs)])
                metrics["losses/value_loss"] = fits["losses/value_loss"]

            # 6. update the statistics, log, evaluate, save
            if args.normalize_obs:
                agent.update_obs_norm(raw_obs.flatten(0, 1)[rows])
            ends = torch.minimum(lengths, lengths.unsqueeze(1)).sum(1)  # steps that all had taken when one ended
            ended = sorted(zip(ends.tolist(), episodic_returns.tolist(), lengths.tolist(), strict=True))
            metrics["charts/learning_rate"] = learning_rate
            run.end_iteration(int(lengths.sum()), ended, {name: float(value) for name, value in metrics.items()})
        return run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing, the same text in every script: flags, devices, seeds, evaluation, gradient steps, the run and its checkpoint
# ---------------------------------------------------------------------------------------------------------------------
SCRIPT = Path(__file__).stem
FREE_FLAGS = {"device", "num_threads", "run_dir", "resume"}  # a resumed run may have other ones


def fail(message: str, status: int = 2) -> NoReturn:
    """Exits with one sentence on stderr; status 2 is for bad input, 1 for a run that went wrong."""
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    raise SystemExit(status)


def check_flags(args: Any) -> None:
    """Raises ValueError, in one sentence, for the first number that is out of its flag's range."""
    for name, value in vars(args).items():
        if isinstance(value, bool | str):
            continue
        zero = isinstance(value, float) or name in ("seed", "eval_episodes") or name.endswith("_every")
        low = -100 if name == "log_std_init" else 0 if zero else 1
        high = 1 if name in ("gamma", "gae_lambda") else 2**31 - 1 if name == "num_threads" else 2**63 - 1
        if not low <= value <= high:
            limit = f"at most {high}" if value > high else f"at least {low}"
            raise ValueError(f"--{name.replace('_', '-')} must be {limit}, not {value}")


def set_up(device: str, num_threads: int, seed: int) -> torch.device:
    """Sets PyTorch's threads and the CPU generator from which all noise is drawn; returns the device."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda|cuda:(0|[1-9]\d*)", chosen):
        fail(f"--device must be auto, cpu, cuda or cuda:N, not {device}")
    if chosen != "cpu" and int(chosen[5:] or 0) >= torch.cuda.device_count():
        fail(f"--device {device} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    return torch.device(chosen)


def env_seed(seed: int, *stream: int) -> int:
    """The seed of a stream: (0, iteration, index) for training, (1, episode) for evaluation; 32 well-mixed bits."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1)[0])


def action_units(space: gym.Space) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) such that the environment's action is scale x the policy's + shift.

    Discrete: 0 is the first action. Box: [-1, 1] is stretched to the bounds where both are finite.
    """
    if isinstance(space, spaces.Discrete):
        return np.int64(1), space.start
    finite = np.isfinite(space.low) & np.isfinite(space.high)
    low, high = np.where(finite, space.low, -1), np.where(finite, space.high, 1)
    return (high - low) / 2, (high + low) / 2


def action_map(space: gym.Space) -> Callable[[np.ndarray], Sequence]:
    """From the policy's actions, (N,) or (N, action_dim), to the environment's, clipped to the bounds of a Box."""
    scale, shift = action_units(space)
    if isinstance(space, spaces.Discrete):
        return lambda actions: (actions + shift).tolist()  # environments check a plain int much faster
    low, high, shape = space.low, space.high, (-1, *space.shape)
    return lambda actions: np.minimum(np.maximum(actions.reshape(shape) * scale + shift, low), high)


def evaluate(agent: Any, env: gym.Env, seed: int, episodes: int) -> tuple[float, float]:
    """Mean return (undiscounted, as the environment pays it) and length of the greedy policy over whole episodes.

    The episodes are the same ones at every call. Nothing that training reads is written, and no noise is drawn.
    """
    act, to_env, total, length = agent.policy(), action_map(env.action_space), 0.0, 0
    for episode in range(episodes):
        (obs, _), done = env.reset(seed=env_seed(seed, 1, episode)), False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(to_env(act(np.float32(obs)[None], 0.0))[0])
            total, length, done = total + float(reward), length + 1, terminated or truncated
    return total / episodes, length / episodes


def flatten(params: list[nn.Parameter]) -> nn.Parameter:
    """One vector of all parameters, which become views of it: what is done to the vector is done to them."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    nn.utils.vector_to_parameters(flat.data, params)
    return flat


def average(x: Tensor) -> Tensor:
    """The mean of x over the processes of torchrun; x itself where there is but one."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def agree(signum: int, ended: list) -> tuple[int, list]:
    """A signal that came to any of the processes of torchrun, and the episodes that ended in all of them, in order."""
    everything = [(signum, ended)]
    if dist.is_initialized():
        everything *= dist.get_world_size()
        dist.all_gather_object(everything, (signum, ended))
    signums, lists = zip(*everything, strict=True)
    return max(signums), sorted(episode for each in lists for episode in each)


def make_update(
    loss: Callable, params: list[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float, compile: bool
) -> Callable:
    """Returns update(*batch): one step of the optimizer, which holds flatten(params), along the clipped gradient.

    `loss(*batch)` is a scalar and a dict of metrics. These come back with the gradient's norm, still on the device.
    """
    (flat,) = optimizer.param_groups[0]["params"]

    def gradient(*batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(*batch)
        grad = average(torch.cat([grad.flatten() for grad in torch.autograd.grad(value, params)]))
        grad_norm = grad.norm()
        metrics = {f"losses/{name}": metric.detach() for name, metric in metrics.items()}
        return grad * (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0), metrics | {"losses/grad_norm": grad_norm}

    best, graphs = gradient, compile and flat.is_cuda
    if compile:
        torch._dynamo.config.trace_autograd_ops = True  # else autograd.grad would cut the graph in two
        best = torch.compile(gradient, options={"size_asserts": False, "triton.cudagraphs": graphs})

    def update(*batch: Tensor) -> dict[str, Tensor]:
        nonlocal best
        try:
            flat.grad, metrics = best(*batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"--compile does not work here, going on without: {str(error).splitlines()[0]}", file=sys.stderr)
            flat.grad, metrics = (best := gradient)(*batch)
        optimizer.step()
        return {name: metric.clone() for name, metric in metrics.items()} if graphs else metrics  # else overwritten

    return update


def mean_metrics(metrics: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each metric over the updates (and processes), copied from the device in one go."""
    means = average(torch.stack([torch.stack([update[name] for update in metrics]).mean() for name in metrics[0]]))
    return dict(zip(metrics[0], means.tolist(), strict=True))


def check_finite(step: int, values: dict) -> None:
    """Ends the run at the first number that is not finite, before it can reach a checkpoint; `step` tells where."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_finite(step, {f"{name} {key}": x for key, x in value.items()})
        elif isinstance(value, Tensor | np.ndarray | float) and not torch.as_tensor(value).isfinite().all():
            fail(f"{name} is not finite after step {step:,}; the last checkpoint stays as it was", status=1)


class Run:
    """A run directory (TensorBoard events and checkpoint.pt), the progress line and the signals.

    `parts` is everything with a state_dict; a checkpoint holds it, the flags, the counters and the generator's state.
    After a periodic checkpoint `fresh_start` asks for new episodes, in the run that goes on as in one that resumes: so
    no environment needs saving, and the two agree bit for bit.
    """

    def __init__(self, args: Any, **parts: Any) -> None:
        self.args, self.parts, self.eval_env = args, parts, make_envs(args.env_id, 1)[0]
        self.step = self.iteration = self.signal = 0
        self.fresh_start, self.metrics, self.last_return = True, {}, math.nan
        name = f"seed{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        self.dir = Path(args.run_dir or Path("runs", args.env_id, SCRIPT, name))
        self.path = self.dir / "checkpoint.pt"
        if args.resume and not args.run_dir:
            fail("--resume needs --run-dir, the run to continue")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            used = any(self.dir.iterdir())
        except OSError as error:
            fail(f"--run-dir {self.dir} cannot be used ({error.strerror})")
        if used and not args.resume:
            fail(f"{self.dir} is not empty: add --resume to continue the run in it, or name another --run-dir")
        if self.path.exists():
            self.load()

    def load(self) -> None:
        """Takes everything from the checkpoint, or refuses it."""
        try:
            with ZipFile(self.path) as file:
                if file.testzip():
                    raise BadZipFile  # PyTorch does not look at the checksums
            saved = dict(torch.load(self.path, map_location="cpu", weights_only=True))
            now, then = asdict(self.args) | {"script": SCRIPT}, saved["args"] | {"script": saved["script"]}
            names = [name for name in now | then if name not in FREE_FLAGS]  # one that only one of them has differs
            changed = [name for name in names if now.get(name) != then.get(name)]
            if changed:
                differences = ", ".join(f"{name} (was {then.get(name)}, is {now.get(name)})" for name in changed)
                fail(f"{self.path} can only be continued with its own flags; these differ: {differences}")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step, self.iteration = saved["step"], saved["iteration"]
            torch.set_rng_state(saved["rng"])
        except (OSError, BadZipFile, UnpicklingError, RuntimeError, LookupError, TypeError, ValueError):
            fail(f"{self.path} is damaged, or not a checkpoint of this project")

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then renames it: a kill at any moment leaves one that is whole."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        check_finite(self.step, state)
        state |= {"script": SCRIPT, "args": asdict(self.args), "step": self.step, "iteration": self.iteration}
        state |= {"rng": torch.get_rng_state(), "versions": {m.__name__: str(m.__version__) for m in (torch, gym, np)}}
        self.writer.flush()  # after a resume no event up to this step may be missing
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def __enter__(self) -> "Run":
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)  # drops what came after the checkpoint
        flags = asdict(self.args).items()
        self.writer.add_text("flags", "\n".join(f"    --{name.replace('_', '-')} {value}" for name, value in flags))
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.clock, self.first_step, self.compiling = time.perf_counter(), self.step, self.args.compile
        self.shown = -math.inf
        print(f"{SCRIPT} on {self.args.env_id}, from step {self.step:,}, in {self.dir}", flush=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.close()
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def on_signal(self, signum: int, _: Any) -> None:
        """Notes the first signal, which is acted on at the end of the iteration; a second one kills the process."""
        self.signal = signum
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a point to each curve, all in one event; the x axis is the number of environment steps."""
        self.metrics |= metrics
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self.writer.file_writer.add_summary(Summary(value=points), step)

    def end_iteration(self, steps: int, ended: list[tuple[int, float, int]], metrics: dict[str, float]) -> None:
        """Counts the steps and logs; evaluates and saves when it is time; exits if a signal came."""
        check_finite(self.step, metrics)
        stop, ended = agree(self.signal, ended)  # read once: no exit without a checkpoint
        for offset, episodic_return, length in ended:
            self.last_return = episodic_return
            point = {"charts/episodic_return": episodic_return, "charts/episodic_length": length}
            self.log(self.step + offset, point)
        before, self.step, self.iteration = self.step, self.step + steps, self.iteration + 1
        now = time.perf_counter()
        self.speed = (self.step - self.first_step) / (now - self.clock)
        self.log(self.step, metrics | {"charts/SPS": self.speed})
        if self.compiling:  # what comes before the second update does not count, unless it is all there is
            if "losses/grad_norm" in metrics:
                print(f"the first update compiled: {now - self.clock:.1f} s", flush=True)
                self.compiling = False
            self.clock, self.first_step = now, self.step
        self.show_progress()
        finished, every = self.step >= self.args.total_timesteps, self.args.eval_every
        if finished or (every and self.step // every > before // every):
            self.log(self.step, self.evaluate())
        every = self.args.checkpoint_every
        self.fresh_start = bool(every) and self.step // every > before // every
        if self.fresh_start or finished or stop:
            self.save()
        if stop:
            fail(f"stopped at step {self.step:,}; add --run-dir {self.dir} --resume to continue", 128 + stop)
        self.clock += time.perf_counter() - now  # nor do evaluations and checkpoints

    def show_progress(self) -> None:
        """Refreshes a line on a terminal; elsewhere prints one at every tenth of the run."""
        done = min(1.0, self.step / self.args.total_timesteps)
        terminal = sys.stdout.isatty()
        now, pause = (time.perf_counter(), 0.2) if terminal else (math.floor(10 * done), 1)
        if now >= self.shown + pause or done == 1:
            self.shown, left = now, max(0, self.args.total_timesteps - self.step) / self.speed
            line = f"{done:4.0%}  step {self.step:,}  {self.speed:,.0f} steps/s  {left:,.0f} s left"
            line += f"  return {self.last_return:.1f}"
            print(f"{line}\x1b[K" if terminal else line, end="\r" if terminal and done < 1 else "\n", flush=True)

    def evaluate(self) -> dict[str, float]:
        """The greedy policy's return and length."""
        if not self.args.eval_episodes:
            return {}
        result = evaluate(self.parts["agent"], self.eval_env, self.args.seed, self.args.eval_episodes)
        return dict(zip(("eval/episodic_return", "eval/episodic_length"), result, strict=True))

    def finish(self) -> dict[str, float]:
        """Prints how good the policy has become; returns the last value of each metric."""
        self.metrics = self.metrics or self.evaluate()  # empty if a finished run was resumed
        if self.args.eval_episodes:
            value, threshold = self.metrics["eval/episodic_return"], self.eval_env.spec.reward_threshold
            line = f"evaluated return {value:.1f} over {self.args.eval_episodes} episodes"
            if threshold is not None:
                line += f", {'solved' if value >= threshold else 'not solved'} (needs {threshold:g})"
            print(line)
        print(f"tensorboard --logdir {self.args.run_dir or 'runs'}")
        return self.metrics


# ---------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
