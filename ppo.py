r"""Proximal policy optimization: many small gradient steps on a batch, held near the policy that took it.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), Algorithm 1.
GAE: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".

    for each iteration:
        1. anneal the learning rate
        2. run the policy π_old for T steps in each of N environments
        3. divide the rewards by the running deviation of the discounted return
        for each epoch:
            4. δ_t = r_t + γ V(s'_t) − V(s_t),  A_t = Σ_l (γλ)^l δ_{t+l}  (PPO eq. 11),  G_t = A_t + V(s_t)
            5. for each minibatch: an Adam step on −L_clip + vf_coef (V − G)² − ent_coef H  (PPO eq. 9), where
               L_clip = mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),  ρ = π_θ(a|s) / π_old(a|s)  (PPO eq. 7)
        6. update the observation statistics, by less as the rate falls, so π can follow; log, evaluate, save

Beyond the paper: advantages are computed anew in every epoch with the newest critic (the paper: once) and
normalised in every minibatch; the gradient's norm is clipped; rewards are normalised by default (CartPole's
V, near 100, would take all of that norm), observations can be.

Compare with a2c.py: one step on the whole batch, with log π A in the place of L_clip.

    python ppo.py
    python ppo.py --env-id HalfCheetah-v5 --total-timesteps 1000000 --num-envs 4 --num-steps 512 \
        --num-minibatches 16 --update-epochs 10 --learning-rate 7e-4 --ent-coef 0.004 --log-std-init -0.5 \
        --normalize-obs --compile
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
    total_timesteps: int = 100_000  # environment steps, over all environments
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

    num_steps: int = 256  # steps of each environment in a batch, T
    learning_rate: float = 1e-3  # Adam's step size
    anneal_lr: bool = True  # lower the step sizes linearly, to 0 at the end
    gamma: float = 0.99  # discount γ
    gae_lambda: float = 0.95  # λ of GAE: 0 is one step, 1 is Monte Carlo
    update_epochs: int = 10  # passes over each batch
    num_minibatches: int = 16  # in a pass; must divide num_steps x num_envs
    clip_coef: float = 0.2  # ε: nothing is gained by moving the ratio out of [1 - ε, 1 + ε]
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # a longer gradient is scaled down to this norm
    target_kl: float = 0.0  # no further epoch after one with a mean approx_kl above this; 0: off
    normalize_advantages: bool = True  # to mean 0 and deviation 1 in each minibatch
    normalize_obs: bool = False  # by the running mean and deviation
    normalize_rewards: bool = True  # by the running deviation of the discounted return
    hidden_size: int = 64  # width of the two hidden layers
    log_std_init: float = 0.0  # log σ of a Gaussian policy at the start; the bounds of actions are ±1

    def __post_init__(self) -> None:
        check_ranges(self)
        rows, rest = divmod(self.num_steps * self.num_envs, self.num_minibatches)
        if rest or (rows == 1 and self.normalize_advantages):
            raise ValueError("--num-minibatches must divide num_steps x num_envs, into more than single rows")


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


def gae(rewards, values, next_values, terminated, dones, gamma: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016, eq. 16), all (T, N), terminated and dones bool.

    δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t),  A_t = δ_t + γ λ (1 − done_t) A_{t+1}.
    A time limit or the batch's end cuts the sum, but the last δ looks ahead; nothing comes after termination.
    """
    assert rewards.shape == values.shape == next_values.shape == terminated.shape == dones.shape
    td_errors = rewards + gamma * next_values * ~terminated - values
    columns = td_errors.T.tolist()  # plain floats: faster than small tensors
    for column, done in zip(columns, dones.T.tolist(), strict=True):
        for t in reversed(range(len(column) - 1)):
            column[t] += gamma * gae_lambda * (not done[t]) * column[t + 1]
    return torch.tensor(columns, dtype=values.dtype, device=values.device).T


def clipped_surrogate(logratio: Tensor, advantages: Tensor, clip_coef: float) -> tuple[Tensor, ...]:
    """−mean min(ρ A, clip(ρ, 1−ε, 1+ε) A), ρ = exp(logratio) (PPO eq. 7), for (B,) and (B,).

    Also returns approx_kl = mean((ρ − 1) − log ρ), an estimate of KL(π_old‖π_θ) that is never negative, and
    the fraction of samples whose ratio left the interval.
    """
    assert logratio.shape == advantages.shape
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        return policy_loss, (ratio - 1 - logratio).mean(), ((ratio - 1).abs() > clip_coef).float().mean()


def ppo_loss(agent, obs, actions, old_logprobs, advantages, returns, args: Args) -> tuple[Tensor, list]:
    """−L_clip + vf_coef mean (V − G)² − ent_coef H (PPO eq. 9, negated: it is minimised), and what to log."""
    if args.normalize_advantages:
        std, mean = torch.std_mean(advantages, correction=0)
        advantages = (advantages - mean) / (std + 1e-8)
    logprobs, entropy = agent.policy(obs, actions)
    values, entropy = agent.value(obs), entropy.mean()
    assert values.shape == returns.shape
    policy_loss, approx_kl, clipfrac = clipped_surrogate(logprobs - old_logprobs, advantages, args.clip_coef)
    value_loss = nn.functional.mse_loss(values, returns)
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    return loss, [policy_loss, value_loss, entropy, approx_kl, clipfrac]


def flat_gradient(loss: Tensor, metrics: list, params: list, max_norm: float) -> tuple[Tensor, Tensor]:
    """The gradient as one vector, scaled down to max_norm if longer; metrics and its norm as another."""
    grad = torch.cat([x.flatten() for x in torch.autograd.grad(loss, params)])
    metrics = torch.stack([x.detach() for x in (*metrics, grad.norm())])
    return grad * (max_norm / (metrics[-1] + 1e-6)).clamp(max=1), metrics


METRICS = (  # in the order in which `train` has their values
    "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac",
    "losses/grad_norm", "losses/explained_variance",
)  # fmt: skip


def train(args: Args) -> dict[str, float]:
    """Runs PPO; returns the last value of each metric, the evaluated return among them."""
    device = set_up(args)
    with Run() as run:
        envs = Envs(run, args, args.num_envs)
        agent = Agent(envs, args).to(device)
        return_norm = RunningNorm().to(device)
        params = list(agent.parameters())
        flat = flatten(params)  # the parameters are views of it
        optimizer = torch.optim.Adam([flat], lr=args.learning_rate, eps=1e-5, fused=True)
        run.start(args, envs, agent=agent, return_norm=return_norm, optimizer=optimizer)

        def gradient(*minibatch: Tensor) -> tuple[Tensor, Tensor]:
            return flat_gradient(*ppo_loss(agent, *minibatch, args), params, args.max_grad_norm)

        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # otherwise autograd.grad cuts the graph in two
            gradient = torch.compile(gradient, mode="reduce-overhead")  # with CUDA graphs on a GPU

        while run.step < args.total_timesteps and not run.signal:
            # 1. anneal the learning rate
            left = 1 - args.anneal_lr * run.step / args.total_timesteps
            learning_rate = args.learning_rate * left
            optimizer.param_groups[0]["lr"] = learning_rate

            # 2. run the policy
            act, steps = agent.in_numpy(), []
            for noise in agent.noise(args.num_steps, args.num_envs):  # t = 0 ... T - 1
                obs = envs.obs
                actions = act(obs, noise)
                steps.append((obs, actions, *envs.step(actions)))
            obs, actions, rewards, next_obs, terminated, dones, discounted_returns = (
                torch.from_numpy(np.array(x)).to(device) for x in zip(*steps, strict=True)
            )
            ends = dones.clone()  # where s'_t is not s_{t+1} of the batch
            ends[-1] = True
            last_obs = next_obs[ends]
            with torch.no_grad():  # not by `act`, whose rounding differs: ρ is 1 at first
                old_logprobs, _ = agent.policy(obs, actions)

            # 3. scale the rewards
            if args.normalize_rewards:
                return_norm.update(discounted_returns)
                rewards = rewards * return_norm.scale

            metrics = []
            for epoch in range(args.update_epochs):
                # 4. advantages and returns, with the newest critic
                with torch.no_grad():
                    values = agent.value(obs)
                    next_values = values.roll(-1, 0).masked_scatter(ends, agent.value(last_obs))  # V(s'_t)
                advantages = gae(rewards, values, next_values, terminated, dones, args.gamma, args.gae_lambda)
                returns = advantages + values
                if epoch == 0:  # the critic has not seen this batch yet
                    explained = 1 - (returns - values).var(correction=0) / (returns.var(correction=0) + 1e-8)

                # 5. one step for each minibatch
                batch = [x.flatten(0, 1) for x in (obs, actions, old_logprobs, advantages, returns)]
                shuffled = torch.randperm(len(batch[0])).to(device)
                for minibatch in zip(*(x[shuffled].chunk(args.num_minibatches) for x in batch), strict=True):
                    flat.grad, step_metrics = gradient(*minibatch)
                    optimizer.step()
                    metrics.append(step_metrics.clone())  # a CUDA graph overwrites them
                means = torch.stack(metrics[-args.num_minibatches :]).mean(0)
                if args.target_kl and means[METRICS.index("losses/approx_kl")] > args.target_kl:
                    break

            # 6. update the statistics (not before: π_old and π_θ have to see the same), log, evaluate, save
            if args.normalize_obs:
                agent.obs_norm.update(obs, left)
            row = torch.cat([torch.stack(metrics).mean(0), explained[None]])
            run.end_iteration(METRICS, [row], learning_rate)
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
