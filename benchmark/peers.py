"""stable-baselines3 and sb3-contrib on the same environments, with the hyperparameters of their zoo.

The zoo is DLR-RM/rl-baselines3-zoo, hyperparams/*.yml; its MuJoCo entries were tuned on the -v3 and -v4 environments.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

ZOO: dict[tuple[str, str], dict[str, Any]] = {
    ("ppo", "CartPole-v1"): {
        "num_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
        "ent_coef": 0.0, "learning_rate": "linear 1e-3", "clip_range": "linear 0.2",
    },
    ("ppo", "HalfCheetah-v5"): {
        "num_envs": 1, "normalize": True, "n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-5,
        "ent_coef": 4.01762e-4, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8,
        "vf_coef": 0.58096, "policy_kwargs": {
            "log_std_init": -2, "ortho_init": False, "activation_fn": "ReLU",
            "net_arch": {"pi": [256, 256], "vf": [256, 256]},
        },
    },
}  # fmt: skip


def linear(value: Any) -> Any:
    """'linear x' becomes a schedule that falls from x to 0; anything else stays."""
    if not isinstance(value, str) or not value.startswith("linear "):
        return value
    start = float(value.split()[1])
    return lambda left: left * start


def make(algorithm: str, env_id: str, seed: int, num_envs: int = 1, normalize: bool = False, **settings: Any) -> Any:
    """A model of stable-baselines3 on the CPU; what is not set is its default."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

    envs = make_vec_env(env_id, num_envs, seed=seed)
    if normalize:
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
    settings = {name: linear(value) for name, value in settings.items()}
    if "activation_fn" in settings.get("policy_kwargs", {}):
        kwargs = settings["policy_kwargs"]
        settings["policy_kwargs"] = kwargs | {"activation_fn": getattr(nn, kwargs["activation_fn"])}
    name = algorithm.upper()
    model = getattr(stable_baselines3 if hasattr(stable_baselines3, name) else sb3_contrib, name)
    return model("MlpPolicy", envs, seed=seed, device="cpu", **settings)


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
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    clock, every = RaceClock(goal), steps // 100
    model = make(algorithm, env_id, seed, **ZOO[algorithm, env_id])
    eval_env = DummyVecEnv([lambda: Monitor(gym.make(env_id))])
    if isinstance(model.get_env(), VecNormalize):
        eval_env = VecNormalize(eval_env, training=False, norm_reward=False)
        eval_env.obs_rms = model.get_env().obs_rms

    class Evaluate(BaseCallback):
        def _on_rollout_start(self) -> None:  # after an update
            before, clock.step = clock.step, self.num_timesteps
            if clock.step // every > before // every:
                with clock.paused():
                    value, _ = evaluate_policy(model, eval_env, n_eval_episodes=10, deterministic=True)
                clock.check(float(value))

        def _on_step(self) -> bool:
            return True

    with contextlib.suppress(GoalReached):
        model.learn(steps, callback=Evaluate())
    return clock.result
