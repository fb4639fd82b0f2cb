"""stable-baselines3 and sb3-contrib on the same environments, with the hyperparameters of their zoo.

    python -m benchmark.peers --algorithm ppo --env-id CartPole-v1 --run-dir runs/CartPole-v1/sb3-ppo/seed1
    python -m benchmark.run --scripts ppo sb3-ppo

It writes what a script writes (charts/episodic_return, charts/SPS, eval/episodic_return) and evaluates as a script
does: at the same steps, the same number of greedy episodes, from the same seeds. It cannot resume.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tyro

# DLR-RM/rl-baselines3-zoo at 22e3ff2 (April 2026), hyperparams/*.yml. Its MuJoCo entries are for -v4 (InvertedPendulum:
# -v2); where it has none, the defaults of stable-baselines3 stand: A2C and TRPO on InvertedPendulum. The budgets are
# not the zoo's but those of our scripts, so linear schedules end there.
RELU_256 = {"log_std_init": -2, "ortho_init": False, "activation_fn": "ReLU"}
RELU_256 |= {"net_arch": {"pi": [256, 256], "vf": [256, 256]}}
TRPO_MUJOCO = {
    "num_envs": 2, "normalize": True, "batch_size": 128, "n_steps": 1024, "gamma": 0.99, "gae_lambda": 0.95,
    "sub_sampling_factor": 1, "cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20, "learning_rate": 1e-3,
}  # fmt: skip
DDPG_MUJOCO = {
    "learning_starts": 10_000, "noise_std": 0.1, "train_freq": 1, "gradient_steps": 1, "learning_rate": 1e-3,
    "batch_size": 256, "policy_kwargs": {"net_arch": [400, 300]},
}  # fmt: skip
ZOO: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "num_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
        "ent_coef": 0.0, "learning_rate": "linear 1e-3", "clip_range": "linear 0.2",
    },
    ("ppo", "Pendulum-v1"): {
        "num_envs": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0,
        "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4,
    },
    ("ppo", "Acrobot-v1"): {
        "num_envs": 16, "normalize": True, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99, "n_epochs": 4,
        "ent_coef": 0.0,
    },
    ("ppo", "InvertedPendulum-v5"): {
        "num_envs": 1, "normalize": True, "n_steps": 32, "batch_size": 64, "gamma": 0.999, "learning_rate": 2.22425e-4,
        "ent_coef": 1.37976e-7, "clip_range": 0.4, "n_epochs": 5, "gae_lambda": 0.9, "max_grad_norm": 0.3,
        "vf_coef": 0.19816,
    },
    ("ppo", "HalfCheetah-v5"): {
        "num_envs": 1, "normalize": True, "n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-5,
        "ent_coef": 4.01762e-4, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8,
        "vf_coef": 0.58096, "policy_kwargs": RELU_256,
    },
    ("ppo", "Hopper-v5"): {
        "num_envs": 1, "normalize": True, "n_steps": 512, "batch_size": 32, "gamma": 0.999, "learning_rate": 9.80828e-5,
        "ent_coef": 0.00229519, "clip_range": 0.2, "n_epochs": 5, "gae_lambda": 0.99, "max_grad_norm": 0.7,
        "vf_coef": 0.835671, "policy_kwargs": RELU_256,
    },
    ("ppo", "Walker2d-v5"): {
        "num_envs": 1, "normalize": True, "n_steps": 512, "batch_size": 32, "gamma": 0.99, "learning_rate": 5.05041e-5,
        "ent_coef": 5.85045e-4, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.95, "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
    ("a2c", "CartPole-v1"): {"num_envs": 8, "ent_coef": 0.0},
    ("a2c", "Acrobot-v1"): {"num_envs": 16, "normalize": True, "ent_coef": 0.0},
    ("a2c", "Pendulum-v1"): {
        "num_envs": 8, "normalize": True, "ent_coef": 0.0, "max_grad_norm": 0.5, "n_steps": 8, "gae_lambda": 0.9,
        "vf_coef": 0.4, "gamma": 0.9, "use_rms_prop": True, "normalize_advantage": False,
        "learning_rate": "linear 7e-4", "use_sde": True, "policy_kwargs": {"log_std_init": -2, "ortho_init": False},
    },
    **{("a2c", env): {"num_envs": 1, "normalize": True} for env in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")},
    ("ddpg", "Pendulum-v1"): {
        "gamma": 0.98, "buffer_size": 200_000, "learning_starts": 10_000, "noise_std": 0.1, "gradient_steps": 1,
        "train_freq": 1, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": [400, 300]},
    },
    ("ddpg", "InvertedPendulum-v5"): {"train_freq": 1, "gradient_steps": 1, "noise_std": 0.1},  # the zoo's default
    **{("ddpg", env): DDPG_MUJOCO for env in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")},
    ("trpo", "CartPole-v1"): {
        "num_envs": 2, "n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "gamma": 0.99,
        "learning_rate": 1e-3, "n_critic_updates": 20,
    },
    ("trpo", "Pendulum-v1"): {
        "num_envs": 2, "n_steps": 1024, "gamma": 0.9, "n_critic_updates": 15, "use_sde": True, "sde_sample_freq": 4,
    },
    ("trpo", "Acrobot-v1"): {"num_envs": 2, "normalize": True, "n_steps": 1024},
    ("trpo", "HalfCheetah-v5"): TRPO_MUJOCO | {"target_kl": 0.04},
    **{("trpo", env): TRPO_MUJOCO for env in ("Hopper-v5", "Walker2d-v5")},
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """One run of a peer."""

    run_dir: str  # where its events are written
    algorithm: Literal["ppo", "a2c", "ddpg", "trpo"] = "ppo"  # of stable-baselines3 or sb3-contrib
    env_id: str = "CartPole-v1"  # Gymnasium environment
    seed: int = 1  # of everything random
    total_timesteps: int = 100_000  # environment steps over all environments
    eval_every: int = 5000  # environment steps between evaluations
    eval_episodes: int = 20  # episodes of one evaluation


def linear(value: Any) -> Any:
    """'linear x' becomes a schedule that falls from x to 0; anything else stays."""
    if not isinstance(value, str) or not value.startswith("linear "):
        return value
    start = float(value.split()[1])
    return lambda left: left * start


def make(
    algorithm: str, env_id: str, seed: int, num_envs: int = 1, normalize: bool = False, noise_std: float = 0.0,
    **settings: Any,
) -> Any:  # fmt: skip
    """A model of stable-baselines3 on the CPU; what is not set is its default."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    envs = make_vec_env(env_id, num_envs, seed=seed)
    if normalize:
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
    settings = {name: linear(value) for name, value in settings.items()}
    if "activation_fn" in settings.get("policy_kwargs", {}):
        kwargs = settings["policy_kwargs"]
        settings["policy_kwargs"] = kwargs | {"activation_fn": getattr(nn, kwargs["activation_fn"])}
    if noise_std:
        mean = np.zeros(envs.action_space.shape)
        settings["action_noise"] = NormalActionNoise(mean, np.full_like(mean, noise_std))
    name = algorithm.upper()
    model = getattr(stable_baselines3 if hasattr(stable_baselines3, name) else sb3_contrib, name)
    return model("MlpPolicy", envs, seed=seed, device="cpu", **settings)


def evaluate(model: Any, env_id: str, seed: int, episodes: int) -> tuple[float, float]:
    """Mean return and length of the greedy policy over the very episodes of a script's own evaluation."""
    import gymnasium as gym

    normalizer, total, length, left = model.get_vec_normalize_env(), 0.0, 0, episodes
    with gym.make(env_id) as env:
        obs, _ = env.reset(seed=int(np.random.SeedSequence((seed, 1)).generate_state(1)[0] >> 1))
        while left:
            seen = normalizer.normalize_obs(obs[None]) if normalizer else obs[None]
            obs, reward, terminated, truncated, _ = env.step(model.predict(seen, deterministic=True)[0][0])
            total, length = total + float(reward), length + 1
            if terminated or truncated:
                left -= 1
                obs, _ = env.reset()
    return total / episodes, length / episodes


def follow(at_update: Callable[[int], None], at_end_of_episode: Callable[[int, dict], None]) -> Any:
    """A callback of stable-baselines3: at_update(step) after each update, and one for each episode that ends."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Follower(BaseCallback):
        def _on_rollout_start(self) -> None:
            at_update(self.num_timesteps)

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    at_end_of_episode(self.num_timesteps, info["episode"])
            return True

    return Follower()


def train(args: Args) -> None:
    """Runs the peer, and logs as a script does."""
    import gymnasium as gym
    import torch
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(1)
    try:
        model = make(args.algorithm, args.env_id, args.seed, **ZOO.get((args.algorithm, args.env_id), {}))
    except gym.error.Error as error:
        print(f"peers: --env-id {args.env_id}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    writer, before, begin = SummaryWriter(args.run_dir), 0, time.perf_counter()

    def log(step: int, metrics: dict[str, float]) -> None:
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, step)

    def update(step: int) -> None:
        nonlocal before, begin
        finished = step >= args.total_timesteps
        if finished or step // args.eval_every > before // args.eval_every:
            now = time.perf_counter()
            speed = step / (now - begin)
            value, length = evaluate(model, args.env_id, args.seed, args.eval_episodes)
            log(step, {"charts/SPS": speed, "eval/episodic_return": value, "eval/episodic_length": length})
            done = min(1.0, step / args.total_timesteps)
            print(f"{done:4.0%}  step {step:,}  {speed:,.0f} steps/s  evaluated return {value:.1f}", flush=True)
            begin += time.perf_counter() - now  # evaluations do not count
        before = step

    def episode(step: int, info: dict) -> None:
        log(step, {"charts/episodic_return": info["r"], "charts/episodic_length": info["l"]})

    model.learn(args.total_timesteps, callback=follow(update, episode))
    update(model.num_timesteps)
    writer.close()


class GoalReached(Exception):
    """Ends a run whose goal is reached."""


class RaceClock:
    """Seconds of training until a return is reached: evaluations do not count, imports are counted separately."""

    def __init__(self, goal: float) -> None:
        import psutil

        self.goal, self.step, self.begin = goal, 0, time.perf_counter()
        self.imports = time.time() - psutil.Process().create_time()  # since the process was started
        self.result: dict[str, float] = {"steps": math.inf, "seconds": math.inf, "imports": round(self.imports, 2)}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.begin += time.perf_counter() - start

    def check(self, value: float) -> None:
        """Notes the steps and seconds, and ends the run, at the first return that reaches the goal."""
        if value >= self.goal:
            self.result |= {"steps": self.step, "seconds": round(time.perf_counter() - self.begin, 2)}
            raise GoalReached


def race(algorithm: str, env_id: str, seed: int, steps: int, goal: float) -> dict[str, float]:
    """Steps and seconds until the mean return of 10 greedy episodes, a hundred times a run, reaches the goal."""
    clock, every = RaceClock(goal), steps // 100
    model = make(algorithm, env_id, seed, **ZOO[algorithm, env_id])

    def update(step: int) -> None:
        before, clock.step = clock.step, step
        if step // every > before // every:
            with clock.paused():
                value, _ = evaluate(model, env_id, seed, episodes=10)
            clock.check(value)

    with contextlib.suppress(GoalReached):
        model.learn(steps, callback=follow(update, lambda *_: None))
    return clock.result


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
