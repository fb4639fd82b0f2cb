r"""REINFORCE: make actions more likely, or less, in proportion to the return of their episode.

Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning".
Sutton et al. 1999, "Policy Gradient Methods for Reinforcement Learning with Function Approximation".

The objective is J(θ) = E[Σ_t γ^t r_t] over whole episodes τ drawn from p_θ. The dynamics do not depend on θ,
so ∇ log p_θ(τ) = Σ_t ∇ log π_θ(a_t|s_t), and since ∇p = p ∇ log p,

    ∇J(θ) = E[Σ_t ∇ log π_θ(a_t|s_t) Ψ_t] ≈ (1/N) Σ_i Σ_t ∇ log π_θ(a_it|s_it) (Ψ_it − b)

    for each iteration:
        1. anneal the learning rate
        2. run the policy for one whole episode in each of N environments
        3. Ψ_t is the return of the whole episode (weight trajectory), or G_t of what follows (reward_to_go)
        4. subtract a baseline b that does not depend on the action: the same expectation, less variance. The
           mean of the others (average; at each t: time), the best constant (optimal), or V(s) (value)
        5. update_epochs Adam steps on −(1/N) Σ_i Σ_t log π_θ(a_it|s_it) (Ψ_it − b), after the first weighted
           by π_θ/π_old: its product over the episode (importance trajectory), up to t (causal), at t alone
           (first_order); for `value` then critic_epochs Adam steps on mean (V(s_t) − G_t)²
        6. update the observation statistics, by less as the rate falls, so π can follow; log, evaluate, save

Discount: `start` weights the reward at t' with γ^t', as J does. `now`, which everybody uses, weights it with
γ^(t'−t) for the action at t: late actions count as much as early ones, but it is the gradient of no function
(Nota and Thomas 2019, "Is the Policy Gradient a Gradient?"). A time limit is the horizon of J: nothing is
bootstrapped. Each environment runs one episode: the first N to end would too often be short ones.

Beyond the papers: Adam; advantages are normalised by default (by the batch: a little bias), observations can
be; --demonstrations FILE first clones recorded behaviour: step 5 with all weights 1. While all episodes fail
alike, the default baseline `time` makes all advantages 0, `value` noise.

Compare with actor_critic.py, which puts a critic's estimate for the return and needs no whole episodes.

    python reinforce.py
    python reinforce.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --baseline value \
        --learning-rate 5e-3 --gamma 0.99 --log-std-init -1 --normalize-obs
"""

import math
import os
import random
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete, flatdim
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class Args:
    """Flags of the command line; the defaults solve CartPole-v1."""

    env_id: str = "CartPole-v1"  # Gymnasium environment; module:Name-v0 imports the module first
    seed: int = 1  # of everything random
    total_timesteps: int = 200_000  # environment steps, over all environments
    num_envs: int = 8  # environments, N
    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or cuda:1
    num_threads: int = 1  # of PyTorch on the CPU; NumPy's: OPENBLAS_NUM_THREADS
    compile: bool = False  # compile the gradient; takes half a minute
    run_dir: str = ""  # default: runs/<env-id>/<script>/seed<seed>__<date-time>
    resume: bool = False  # go on from the checkpoint in --run-dir if there is one
    checkpoint_every: int = 100_000  # environment steps; episodes restart after a checkpoint; 0: off
    eval_every: int = 0  # environment steps; 0: at the end alone
    eval_episodes: int = 20  # of the greedy policy; 0: no evaluation
    max_episode_steps: int = 0  # time limit; 0: the environment's own

    weight: Literal["trajectory", "reward_to_go"] = "reward_to_go"  # of an action: all rewards, or later ones
    discount_from: Literal["now", "start"] = "now"  # γ^(t'-t) from the action, or γ^t' as in J
    baseline: Literal["none", "average", "optimal", "time", "value"] = "time"  # subtracted from the weights
    update_epochs: int = 1  # steps on each batch
    importance: Literal["trajectory", "causal", "first_order"] = "trajectory"  # from the second step on
    learning_rate: float = 2e-3  # Adam's step size for the policy
    anneal_lr: bool = True  # lower learning_rate linearly, to 0 at the end
    gamma: float = 0.999  # discount γ
    critic_learning_rate: float = 2e-3  # Adam's step size for V
    critic_epochs: int = 20  # steps of V on each batch
    normalize_advantages: bool = True  # to mean 0 and deviation 1 in each batch
    normalize_obs: bool = False  # by the running mean and deviation
    hidden_size: int = 64  # width of the two hidden layers
    log_std_init: float = 0.0  # log σ of a Gaussian policy at the start; the bounds of actions are ±1
    demonstrations: str = ""  # .npz file of obs and actions to clone first, as of benchmark/play.py --record
    cloning_steps: int = 1000  # gradient steps of the cloning, each on 256 rows

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_envs == 1 and self.baseline in ("average", "optimal"):
            raise ValueError(f"--baseline {self.baseline} is a mean over other episodes; --num-envs is 1")


class Agent(nn.Module):
    """Policy π(a|s) and state value V(s) of raw observations; two networks that share no parameter."""

    def __init__(self, envs, args: Args) -> None:
        super().__init__()
        self.discrete = envs.discrete
        self.obs_norm = RunningNorm(envs.obs_dim) if args.normalize_obs else nn.Identity()
        self.actor = mlp(envs.obs_dim, args.hidden_size, envs.action_dim, gain=0.01)
        log_std = torch.full((envs.action_dim,), args.log_std_init)
        self.log_std = nn.Buffer(log_std) if self.discrete else nn.Parameter(log_std)  # Discrete: its length
        self.critic = mlp(envs.obs_dim, args.hidden_size, 1, gain=1.0)

    def value(self, obs: Tensor) -> Tensor:
        """V(s): (..., obs_dim) to (...)."""
        return self.critic(self.obs_norm(obs)).squeeze(-1)

    def policy(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log π(a|s) and the entropy H of π(·|s), (...), for obs (..., obs_dim), unclipped actions."""
        output = self.actor(self.obs_norm(obs))  # logits z(s), or means μ(s)
        if self.discrete:  # π(a|s) = exp z_a / Σ_b exp z_b,  H = −Σ_b π(b|s) log π(b|s)
            log_pi = output.log_softmax(-1)
            return log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)
        # N(μ, diag σ²):  log π = −½ Σ_d ((a_d − μ_d)/σ_d)² − Σ_d log(σ_d √(2π)),  H = Σ_d log(σ_d √(2πe))
        log_normalizer = self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std)
        logprobs = -0.5 * ((actions - output) / self.log_std.exp()).square().sum(-1) - log_normalizer
        return logprobs, (log_normalizer + 0.5 * len(self.log_std)).expand_as(logprobs)

    def noise(self, *shape: int) -> np.ndarray:
        """Gumbel noise n = −log E, E ~ Exp(1): argmax_a (z_a + n_a) samples π; or n ~ N(0, 1) for μ + σ n."""
        noise = torch.empty(*shape, len(self.log_std))  # drawn on the CPU, whatever the device
        return (-noise.exponential_().log() if self.discrete else noise.normal_()).numpy()

    def in_numpy(self):
        """Returns act(obs, noise), valid until an update: the actor again, in NumPy; noise 0: greedy."""
        tensors = *self.actor.parameters(), self.log_std.exp(), *[*self.obs_norm.buffers()][-2:]
        w1, b1, w2, b2, w3, b3, sigma, *norm = to_numpy(*tensors)  # 9 µs for few rows, PyTorch 43

        def act(obs, noise):  # (N, obs_dim) to (N,) if Discrete, else to (N, action_dim)
            x = ((obs - norm[0]) * norm[1]).clip(-10, 10) if norm else obs
            output = np.tanh(np.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
            return (output + noise).argmax(-1) if self.discrete else output + sigma * noise

        return act


def rewards_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + γ G_{t+1}, (T, N)."""
    returns = rewards.clone()
    for t in reversed(range(len(rewards) - 1)):
        returns[t] += gamma * returns[t + 1]
    return returns


def episode_weights(rewards: Tensor, gamma: float, weight: str, discount_from: str) -> tuple[Tensor, Tensor]:
    """Ψ_t (T, N), and the factor of step t, (T, 1): γ^t if J is discounted from the start, else 1."""
    steps = torch.arange(len(rewards), dtype=rewards.dtype, device=rewards.device).unsqueeze(1)
    discount = gamma**steps if discount_from == "start" else torch.ones_like(steps)
    weights = discount * rewards_to_go(rewards, gamma)
    if weight == "trajectory":  # with the rewards before t (`now`: undiscounted): more variance
        weights = weights + (discount * rewards).cumsum(0) - discount * rewards
    return weights, discount


def leave_one_out(x: Tensor) -> Tensor:
    """Σ_{j≠i} x_j over the last axis, the episodes; i's own rewards would bias a baseline of i."""
    # in float64: with the baseline `time`, equal episodes have advantages of exactly 0
    return x.double() @ (1 - torch.eye(x.shape[-1], dtype=torch.double, device=x.device))


def average_baseline(weights: Tensor, mask: Tensor) -> Tensor:
    """b_i: the mean over the other episodes of their mean weight; (N,) from (T, N)."""
    means = (weights * mask).sum(0) / mask.sum(0)
    return (leave_one_out(means) / (len(means) - 1)).to(means.dtype)


def time_baseline(weights: Tensor, mask: Tensor) -> Tensor:
    """b_ti: the mean weight at t over the other episodes that still run then, 0 if none does; (T, N)."""
    return (leave_one_out(weights * mask) / leave_one_out(mask).clamp(min=1)).to(weights.dtype)


def optimal_baseline(scores: Tensor, grads: Tensor) -> Tensor:
    """b_i = Σ_{j≠i} ⟨g_j, h_j⟩ / Σ_{j≠i} ‖g_j‖²: of all constants the one with the least variance of h − b g.

    scores g_j = Σ_t ∇ log π(a_t|s_t) and grads h_j = Σ_t ∇ log π(a_t|s_t) Ψ_t are (N, parameters); b is (N,).
    Where Ψ is the return R of the trajectory, h = R g and b estimates E[‖g‖² R] / E[‖g‖²].
    """
    norms = leave_one_out((scores * scores).sum(1)).clamp(min=1e-30)
    return (leave_one_out((scores * grads).sum(1)) / norms).to(scores.dtype)


def episode_gradients(logprobs: Tensor, weights: Tensor, params: list[Tensor]) -> Tensor:
    """Row i is Σ_t w_ti ∇ log π(a_ti|s_ti), the gradient of one episode alone: (N, parameters)."""
    sums = (weights * logprobs).sum(0)
    one_each = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
    grads = torch.autograd.grad(sums, params, one_each, retain_graph=True, is_grads_batched=True)
    return torch.cat([grad.flatten(1) for grad in grads], 1)


def importance_weights(logratio: Tensor, importance: str) -> Tensor:
    """Products of π_θ/β (T, N), constants, from log π_θ − log β (T, N), which is 0 after an episode's end.

    trajectory, Π_t over the episode, is unbiased for a fixed θ, but its variance grows exponentially; causal,
    Π_{t'≤t}, has the states of π_θ but leaves Ψ that of β; first_order, at t alone, leaves the states β's.
    """
    logratio = logratio.detach()
    if importance == "trajectory":
        return logratio.sum(0, keepdim=True).exp().expand_as(logratio)
    return (logratio.cumsum(0) if importance == "causal" else logratio).exp()


def pseudo_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """−(1/N) Σ_i Σ_t w_ti log π(a_ti|s_ti), from (T, N): minus its gradient estimates ∇J; w is constant."""
    assert logprobs.shape == weights.shape
    return -(weights.detach() * logprobs).sum(0).mean()


def reinforce_loss(agent, obs, actions, old_logprobs, advantages, mask, importance) -> tuple[Tensor, list]:
    """The pseudo-loss of the steps in `mask`, all (T, N), under the present policy, and what to log."""
    logprobs, entropy = agent.policy(obs, actions)
    logratio = (logprobs - old_logprobs) * mask
    policy_loss = pseudo_loss(logprobs, importance_weights(logratio, importance) * advantages * mask)
    approx_kl, entropy = (((x * mask).sum() / mask.sum()) for x in (logratio.exp() - 1 - logratio, entropy))
    return policy_loss, [policy_loss, entropy, approx_kl]


def critic_loss(agent: Agent, obs: Tensor, returns: Tensor) -> Tensor:
    """mean (V(s) − G)², over (B,) or (T, N)."""
    values = agent.value(obs)
    assert values.shape == returns.shape
    return nn.functional.mse_loss(values, returns)


def flat_gradient(loss: Tensor, metrics: list, params: list, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient as one vector, scaled down to max_norm if longer; metrics and its norm as another."""
    grad = torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)])
    metrics = torch.stack([x.detach() for x in (*metrics, grad.norm())])
    return grad * (max_norm / (metrics[-1] + 1e-6)).clamp(max=1), metrics


def read_demonstrations(envs, args: Args, device: torch.device) -> tuple[Tensor, Tensor]:
    """Recorded (s, a), in the file in the environment's form: as (B, obs_dim) and the policy's actions."""
    try:
        with open(args.demonstrations, "rb") as stream, np.load(stream) as file:
            obs, actions = file["obs"], file["actions"]
        for rows, space in ((obs, envs.obs_space), (actions, envs.space)):
            if not len(obs) or rows.shape != (len(obs), *space.shape) or not np.isfinite(rows).all():
                raise ValueError(f"{rows.shape} numbers are not {len(obs)} of {space}, or not finite")
        if envs.discrete and not all(action in envs.space for action in actions):
            raise ValueError(f"there are actions that are not in {envs.space}")
    except Exception as error:
        fail(f"--demonstrations {args.demonstrations}: {error}")
    obs = np.array([envs.row(x) for x in obs], np.float32)
    if envs.discrete:
        actions = actions - envs.space.start
    else:
        actions = ((actions - envs.shift) / envs.scale).reshape(len(obs), -1)
    return torch.from_numpy(obs).to(device), torch.from_numpy(actions).to(device)


def clone(agent: Agent, obs: Tensor, actions: Tensor, args: Args) -> None:
    """Behavioural cloning: maximises mean log π(a|s) over recorded (s, a)."""
    if args.normalize_obs:
        agent.obs_norm.update(obs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    for _ in range(args.cloning_steps):
        rows = torch.randint(len(obs), (256,)).to(obs.device)
        logprobs, _ = agent.policy(obs[rows], actions[rows])
        optimizer.zero_grad()
        pseudo_loss(logprobs[None], torch.ones_like(logprobs)[None]).backward()
        optimizer.step()


METRICS = "losses/policy_loss", "losses/entropy", "losses/approx_kl", "losses/grad_norm"


def train(args: Args) -> dict[str, float]:
    """Runs REINFORCE; returns the last value of each metric, the evaluated return among them."""
    device = set_up(args)
    with Run() as run:
        envs = Envs(run, args, args.num_envs)
        agent = Agent(envs, args).to(device)
        params = [x for name, x in agent.named_parameters() if "critic" not in name]
        critic_params = list(agent.critic.parameters())
        flat, critic_flat = flatten(params), flatten(critic_params)  # parameters are views of them
        optimizer = torch.optim.Adam([flat], lr=args.learning_rate, eps=1e-5, fused=True)
        critic_optimizer = torch.optim.Adam([critic_flat], lr=args.critic_learning_rate, eps=1e-5, fused=True)
        recorded = read_demonstrations(envs, args, device) if args.demonstrations else None
        run.start(args, envs, agent=agent, optimizer=optimizer, critic_optimizer=critic_optimizer)
        if recorded and not run.path.exists():
            clone(agent, *recorded, args)
            say("cloned, without any reward")
            run.evaluate()

        def gradient(*batch: Tensor) -> tuple[Tensor, Tensor]:
            return flat_gradient(*reinforce_loss(agent, *batch, args.importance), params, math.inf)

        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # otherwise autograd.grad cuts the graph in two
            gradient = torch.compile(gradient, dynamic=True)  # episodes have all lengths

        while run.step < args.total_timesteps and not run.signal:
            # 1. anneal the learning rate
            left = 1 - args.anneal_lr * run.step / args.total_timesteps
            learning_rate = args.learning_rate * left
            optimizer.param_groups[0]["lr"] = learning_rate

            # 2. run one whole episode in each environment
            act, steps, running = agent.in_numpy(), [], np.ones(args.num_envs, bool)
            while running.any() and not run.signal:
                if len(steps) % 128 == 0:
                    noise = agent.noise(128, args.num_envs)
                if len(steps) == LONGEST:
                    fail(f"an episode has not ended after {LONGEST:,} steps: set --max-episode-steps")
                obs = envs.obs
                actions = act(obs, noise[len(steps) % 128])
                rewards, _, _, dones, _ = envs.step(actions, running)
                steps.append((obs, actions, rewards, running))
                running = running & ~dones
            if run.signal:
                break
            columns = zip(*steps, strict=True)
            obs, actions, rewards, mask = (torch.from_numpy(np.array(x)).to(device) for x in columns)
            returns = rewards_to_go(rewards, args.gamma)
            taken_obs, taken_returns = obs[mask], returns[mask]  # rows (B, ...) of the steps that were taken

            # 3. the weight of each action
            weights, discount = episode_weights(rewards, args.gamma, args.weight, args.discount_from)

            # 4. minus a baseline
            advantages = weights
            metrics = {"charts/discounted_return": returns[0].mean()}
            if args.baseline == "average":
                advantages = weights - average_baseline(weights, mask)
            elif args.baseline == "optimal":
                logprobs, _ = agent.policy(obs, actions)
                scores = episode_gradients(logprobs, mask.to(weights.dtype), params)
                grads = episode_gradients(logprobs, weights * mask, params)
                advantages = weights - optimal_baseline(scores, grads)
            elif args.baseline == "time":
                advantages = weights - time_baseline(weights, mask)
            elif args.baseline == "value":
                with torch.no_grad():
                    values = agent.value(obs)
                advantages = weights - discount * values
                rest = (taken_returns - values[mask]).var(correction=0)
                metrics["losses/explained_variance"] = 1 - rest / (taken_returns.var(correction=0) + 1e-8)
            if args.normalize_advantages and mask.sum() > 1:
                std, mean = torch.std_mean(advantages[mask], correction=0)
                advantages = (advantages - mean) / (std + 1e-8)

            # 5. steps of the policy, then of the critic
            with torch.no_grad():
                old_logprobs, _ = agent.policy(obs, actions)
            logged = []
            for _ in range(args.update_epochs):
                flat.grad, step_metrics = gradient(obs, actions, old_logprobs, advantages, mask)
                optimizer.step()
                logged.append(step_metrics)
            for _ in range(args.critic_epochs if args.baseline == "value" else 0):
                loss = critic_loss(agent, taken_obs, taken_returns)
                critic_flat.grad, _ = flat_gradient(loss, [], critic_params, math.inf)
                critic_optimizer.step()
                metrics["losses/value_loss"] = loss.detach()

            # 6. update the statistics, log, evaluate, save
            if args.normalize_obs:
                agent.obs_norm.update(taken_obs, left)
            metrics |= dict(zip(METRICS, torch.stack(logged).mean(0), strict=True))
            run.end_iteration([*metrics], [torch.stack([*metrics.values()])], learning_rate)
        return run.finish()


# ------------------------------------------------------------------------------------------------------------
# Below: tools, the same text in every script
SCRIPT = Path(globals().get("__file__", "notebook")).stem
LONGEST = 100_000  # steps of an episode that has to end


def mlp(fan_in: int, width: int, fan_out: int, gain: float) -> nn.Sequential:
    """tanh network with two hidden layers; orthogonal weights with gains √2, √2 and `gain`, zero biases."""
    layers = nn.Linear(fan_in, width), nn.Linear(width, width), nn.Linear(width, fan_out)
    for layer, layer_gain in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, layer_gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class RunningNorm(nn.Module):
    """(x − mean) / √(var + 1e-8), clipped to ±10, with running moments of rows; x − mean for var 0."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.count, self.mean64, self.var = (nn.Buffer(torch.zeros(shape).double()) for _ in range(3))
        self.mean, self.scale = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))

    def update(self, x: Tensor, pace: float = 1.0) -> None:
        """Merges rows x (..., *shape) into the moments (Chan et al. 1979, eq. 2.1), at the weight `pace`."""
        x = x.reshape(-1, *self.mean.shape).double()
        var, mean = torch.var_mean(x, 0, correction=0)
        self.count += len(x)
        weight = pace * len(x) / self.count
        self.var.lerp_(var + (1 - weight) * (mean - self.mean64) ** 2, weight)
        self.mean64.lerp_(mean, weight)
        self.mean.copy_(self.mean64)
        self.scale.copy_(torch.where(self.var > 0, (self.var + 1e-8).rsqrt(), 1))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale).clamp(-10, 10)


def flatten(params: list[nn.Parameter]) -> nn.Parameter:
    """One vector of which the parameters become views: an optimizer's step is then one kernel."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    nn.utils.vector_to_parameters(flat.data, params)
    return flat


def to_numpy(*tensors: Tensor) -> list[np.ndarray]:
    """As arrays; from a GPU they come over in one transfer, on the CPU they are views."""
    if tensors[0].is_cuda:
        parts = torch.cat([x.detach().ravel() for x in tensors]).cpu().split([x.numel() for x in tensors])
        tensors = [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
    return [x.detach().numpy() for x in tensors]


def say(line, stream="stdout"):
    """Prints; that the reader went away or the disk is full does not end the training."""
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, None)


def fail(sentence, status=2):
    """Exits; status 2 is for bad input, 1 for a run that went wrong."""
    say(f"{SCRIPT}: {' '.join(sentence.splitlines())[:2000]}", "stderr")
    raise SystemExit(status)


def check_ranges(args):
    """Raises ValueError for the first number that is out of its flag's range."""
    for name, field in args.__dataclass_fields__.items():
        most = {"gamma": 1, "gae_lambda": 1, "hidden_size": 10_000}.get(name, 2**31 - 1)
        least = field.type is int and not name.endswith(("seed", "_every", "_episodes", "_episode_steps"))
        least = {"log_std_init": -100, "max_grad_norm": 1e-6}.get(name, int(least))
        value = getattr(args, name)
        if type(value) not in (str, bool, int, float):  # no other number can be read from a checkpoint
            raise ValueError(f"--{name.replace('_', '-')} must be a plain number or text, not {value!r}")
        if not isinstance(value, str) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be from {least} to {most}, not {value}")


def set_up(args):
    """Returns the device; sets the threads and the seed of PyTorch, whose CPU generator draws all noise."""
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    compiled = vars(args).get("compile", False)
    try:
        (torch.compile(torch.neg) if compiled else torch.neg)(torch.zeros(1, device=device)).item()
    except Exception as error:
        fail(f"--device {device}{' --compile' * compiled} does not work here: {error}")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    return torch.device(device)


class Envs:
    """N copies of an environment, with flat observations, and actions whose bounds are ±1.

    A copy that ended restarts at once: `obs` (N, obs_dim) is what to act on next, `step` returns the true
    successors. `steps` counts those of all copies; `ended` lists (step, return, length) of episodes.
    """

    def __init__(self, stack, args, num_envs, first=0):
        self.name, self.gamma, self.steps, self.ended = args.env_id, args.gamma, 0, []
        self.first = first  # of these copies among those of several processes
        self.cwd = Path.cwd()  # until an environment changes it
        options = {"max_episode_steps": args.max_episode_steps or None, "disable_env_checker": True}
        try:
            self.envs = [stack.enter_context(gym.make(self.name, **options)) for _ in range(num_envs)]
        except (gym.error.Error, ImportError) as error:
            fail(f"--env-id {self.name}: {error}")
        self.obs_space, self.space = self.envs[0].observation_space, self.envs[0].action_space
        self.one_hot, self.discrete = isinstance(self.obs_space, Discrete), isinstance(self.space, Discrete)
        floats = isinstance(self.space, Box) and self.space.dtype.kind == "f"
        if not (self.one_hot or isinstance(self.obs_space, Box)) or not (self.discrete or floats):
            known = "Box or Discrete observations, Discrete actions (not in ddpg.py) or a Box of floats"
            fail(f"{known} are known; {self.name} has actions {self.space}, observations {self.obs_space}")
        self.obs_dim, self.action_dim = flatdim(self.obs_space), flatdim(self.space)
        if floats:
            low, high = self.space.low, self.space.high
            most = min(float(np.finfo(low.dtype).max), 1e30)  # from here on: no bound
            self.bounded = np.maximum(-low, high).max(initial=0) < most
            low = np.where(-low < most, low, np.where(high < most, high - 2, -1))
            high = np.where(high < most, high, low + 2)
            self.scale, self.shift = high / 2 - low / 2, high / 2 + low / 2

    def row(self, obs):
        """An observation as (obs_dim,): a Box flattened, a Discrete one-hot."""
        obs = np.asarray(obs)
        state = obs.item() - int(self.obs_space.start) if self.one_hot and obs.size == 1 else 0
        if obs.shape != self.obs_space.shape or (self.one_hot and state not in range(self.obs_dim)):
            what = obs if obs.shape == self.obs_space.shape else f"of shape {obs.shape}"
            fail(f"{self.name} returned an observation {what} for {self.obs_space}", 1)
        return np.arange(self.obs_dim) == state if self.one_hot else obs.ravel()

    def reset(self, *stream):
        """Starts new episodes, with seeds below 2³¹ that are made of the numbers in `stream`."""
        seeds = np.random.SeedSequence(stream).generate_state(self.first + len(self.envs))[self.first :] >> 1
        random.seed(int(seeds[0]))  # for environments that draw from these two
        np.random.seed(seeds[0])
        obs = [self.row(env.reset(seed=int(seed))[0]) for env, seed in zip(self.envs, seeds, strict=True)]
        self.obs = np.array(obs, np.float32)
        self.episodes = [(0.0, 0, 0.0)] * len(self.envs)  # return, length, r_t + γ r_{t-1} + γ² r_{t-2} + ...

    def step(self, actions, running=None):
        """Returns rewards (0 for copies not `running`), successors, terminated, dones, discounted returns."""
        if self.discrete:
            actions = actions + self.space.start
        else:
            if not np.isfinite(actions).all():
                fail(f"an observation, or an action of the policy, is not finite at step {self.steps:,}", 1)
            actions = actions.reshape(-1, *self.space.shape) * self.scale + self.shift
            actions = actions.clip(self.space.low, self.space.high)
        actions, next_obs = actions.astype(self.space.dtype), self.obs.copy()
        rewards, discounted_returns = np.zeros((2, len(self.envs)), np.float32)
        terminated, dones = np.zeros((2, len(self.envs)), bool)
        copies = range(len(self.envs)) if running is None else np.flatnonzero(running)
        self.steps += len(copies)
        for i in copies:
            action = actions[i] if self.discrete else actions[i, ...]  # an array, even of shape ()
            obs, reward, ended, truncated, _ = self.envs[i].step(action)
            next_obs[i], reward = self.row(obs), float(np.asarray(reward).item())
            total, length, discounted = self.episodes[i]
            self.episodes[i] = total + reward, length + 1, reward + self.gamma * discounted
            rewards[i], discounted_returns[i] = reward, self.episodes[i][2]
            terminated[i], dones[i] = bool(ended), bool(ended or truncated)
        found = {"an observation": (self.obs, next_obs), "a reward": rewards}
        if broken := [what for what, x in found.items() if not np.isfinite(x).all()]:
            fail(f"{self.name} returned {broken[0]} that is not finite at step {self.steps:,}", 1)
        self.obs = next_obs.copy()
        for i in dones.nonzero()[0]:
            self.ended.append((self.steps, *self.episodes[i][:2]))
            self.obs[i], self.episodes[i] = self.row(self.envs[i].reset()[0]), (0.0, 0, 0.0)
        return rewards, next_obs, terminated, dones, discounted_returns


class Run(ExitStack):
    """A run's directory, curves, checkpoint, evaluations and signals; closes what was opened."""

    def start(self, args, envs, **parts):
        """Begins in a new directory, or goes on from a checkpoint, which holds the state of all `parts`."""
        self.args, self.envs, self.parts, self.metrics, self.pending = args, envs, parts, {}, []
        self.step = self.iteration = self.signal = 0
        self.pid = os.getpid()
        name = time.strftime(f"seed{args.seed}__%Y-%m-%d_%H-%M-%S_{time.time_ns() % 10**9:09d}")
        self.dir = Path(args.run_dir or f"runs/{args.env_id}/{SCRIPT}/{name}")
        folder = envs.cwd / self.dir
        self.path = folder / "checkpoint.pt"
        if args.resume and not args.run_dir:
            fail("--resume needs --run-dir, the run to continue")
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.run_dir))
            if not os.access(folder, os.W_OK):
                raise PermissionError("it cannot be written")
            if any(folder.iterdir()) and not args.resume:
                raise FileExistsError("it is not empty; --resume continues its run")
            if self.path.exists():
                self.load()
            self.writer = self.enter_context(SummaryWriter(folder, purge_step=self.step + 1))
        except Exception as error:
            fail(f"--run-dir {self.dir} cannot be used: {type(error).__name__} {error}")
        self.writer.add_text("flags", "\n".join(f"    {flag} {value}" for flag, value in vars(args).items()))
        with suppress(ValueError):  # only the main thread can set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, signum, signal.signal(signum, self.on_signal))
        self.push(self.on_error)
        envs.steps = self.first_step = self.logged = self.step
        envs.reset(args.seed, 0, self.iteration)
        self.clock = time.perf_counter()
        say(f"{SCRIPT} on {args.env_id}, from step {self.step:,}, in {self.dir}")

    def on_signal(self, signum, _):
        """The first signal ends the run after this iteration; a second one kills the process."""
        self.signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != self.pid:  # an environment's process, forked from this one, ends
            os.kill(os.getpid(), signum)
        with suppress(OSError, ValueError, AttributeError):  # print() cannot be interrupted by itself
            os.write(sys.stdout.fileno(), b"stopping after this iteration; once more: at once\n")

    def on_error(self, _, error, __):
        """Says where it happened; once a signal has come, which ends environments' processes too, saves."""
        if isinstance(error, Exception):
            error.add_note(f"{self.args.env_id}, after step {self.envs.steps:,}")
            if self.signal:
                self.finish()
        if isinstance(error, SystemExit) and not error.code:
            fail(f"{self.args.env_id} ended the process after step {self.envs.steps:,}", 1)

    def load(self):
        """Takes everything from the checkpoint, or raises what is wrong with it."""
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        differing = vars(self.args).items() ^ saved["args"].items()  # of which only four may differ
        if changed := {flag for flag, _ in differing} - {"device", "num_threads", "run_dir", "resume"}:
            raise ValueError(f"it was begun with other values of {', '.join(sorted(changed))}")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step, self.iteration = saved["step"], saved["iteration"]
        torch.set_rng_state(saved["rng"])

    def save(self):
        """A kill at any moment leaves a whole checkpoint: the old one, or this."""
        self.writer.flush()  # a resumed run drops the events after this step, and needs those before it
        state = {"script": SCRIPT, "args": vars(self.args), "step": self.step, "iteration": self.iteration}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        with open(self.path.with_suffix(".tmp"), "wb") as file:
            torch.save(state | parts | {"rng": torch.get_rng_state()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)

    def log(self, step, metrics):
        """Adds a point to each curve; the x axis is the number of environment steps."""
        self.metrics |= metrics
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self.writer.file_writer.add_summary(Summary(value=points), step)

    def end_iteration(self, tags, rows, learning_rate, log_interval=1):
        """Counts steps; every log_interval of them logs the mean row, evaluates and saves if it is time."""
        args, before = self.args, self.logged
        self.step, self.iteration = self.envs.steps, self.iteration + 1
        self.pending += rows
        left = max(0, args.total_timesteps - self.step)
        if left and not self.signal and self.step < before + log_interval:
            return
        values = torch.stack(self.pending).mean(0).tolist() if self.pending else []
        means = dict(zip(tags, values, strict=bool(values)))
        if broken := [tag for tag, value in means.items() if not math.isfinite(value)]:
            fail(f"{broken[0]} is not finite at step {self.step:,}; the last checkpoint stays as it was", 1)
        for step, episodic_return, length in self.envs.ended:
            self.log(step, {"charts/episodic_return": episodic_return, "charts/episodic_length": length})
        speed = (self.step - self.first_step) / (time.perf_counter() - self.clock)
        self.log(self.step, means | {"charts/learning_rate": learning_rate, "charts/SPS": speed})
        self.envs.ended, self.pending, self.logged = [], [], self.step
        if 10 * self.step // args.total_timesteps > 10 * before // args.total_timesteps:
            done = min(1, self.step / args.total_timesteps)
            line = f"{done:4.0%}  step {self.step:,}  {speed:,.0f} steps/s  {left / speed:,.0f} s left"
            say(f"{line}  return {self.metrics.get('charts/episodic_return', math.nan):.1f}")
        if left and args.eval_every and self.step // args.eval_every > before // args.eval_every:
            self.evaluate()
        if args.checkpoint_every and self.step // args.checkpoint_every > before // args.checkpoint_every:
            self.save()
            self.envs.reset(args.seed, 0, self.iteration)  # as a resumed run does: no env has to be saved

    def evaluate(self):
        """Logs the mean return and length of greedy episodes, in an environment of their own."""
        if not self.args.eval_episodes or self.signal:
            return
        with ExitStack() as stack:
            stack.callback(random.setstate, random.getstate())  # of which the environment may draw
            stack.callback(np.random.set_state, np.random.get_state())
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            envs = Envs(stack, self.args, 1)
            envs.reset(self.args.seed, 1)
            act = self.parts["agent"].in_numpy()
            while len(envs.ended) < self.args.eval_episodes and envs.episodes[0][1] < LONGEST:
                envs.step(act(envs.obs, 0))
                if self.signal:
                    return
        cut = [(0, *episode[:2]) for episode in envs.episodes if episode[1] == LONGEST]
        _, value, length = np.mean(envs.ended + cut, 0).tolist()
        self.log(self.step, {"eval/episodic_return": value, "eval/episodic_length": length})
        hint = f", the last cut after {LONGEST:,} steps: see --max-episode-steps" if cut else ""
        say(f"evaluated return {value:.1f} over {len(envs.ended + cut)} episodes{hint}")

    def finish(self):
        """Saves, evaluates, and returns the last value of each metric."""
        self.save()
        self.evaluate()
        if self.signal:
            again = f"--run-dir {shlex.quote(str(self.dir))} --resume"
            fail(f"stopped at step {self.step:,}; add {again} to continue", 128 + self.signal)
        say(f"tensorboard --logdir {shlex.quote(self.args.run_dir or 'runs')}")
        return self.metrics


if __name__ == "__main__":
    with suppress(AttributeError):  # if closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # Greek letters, where the terminal has none
    train(tyro.cli(Args, description=__doc__))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.8.1",
#   "numpy==2.4.6", "tyro==1.0.17", "tensorboard==2.21.0"]
# ///
