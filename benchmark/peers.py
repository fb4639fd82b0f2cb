"""stable-baselines3 and sb3-contrib on the same environments, with the hyperparameters of their zoo.

The zoo is DLR-RM/rl-baselines3-zoo, hyperparams/*.yml; its MuJoCo entries were tuned on the -v3 and -v4 environments.
"""

import time
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


def race(algorithm: str, env_id: str, seed: int, steps: int, every: int) -> list[tuple[int, float, float]]:
    """(step, seconds of the process so far without evaluations, return of 10 greedy episodes), every so many steps."""
    import gymnasium as gym
    import psutil
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    model = make(algorithm, env_id, seed, **ZOO[algorithm, env_id])
    eval_env, pauses, points = DummyVecEnv([lambda: Monitor(gym.make(env_id))]), [0.0], []
    if isinstance(model.get_env(), VecNormalize):
        eval_env = VecNormalize(eval_env, training=False, norm_reward=False)
        eval_env.obs_rms = model.get_env().obs_rms

    def evaluate(step: int) -> None:
        start = time.perf_counter()
        seconds = time.time() - psutil.Process().create_time() - sum(pauses)
        value, _ = evaluate_policy(model, eval_env, n_eval_episodes=10, deterministic=True)
        pauses.append(time.perf_counter() - start)
        points.append((step, seconds, float(value)))

    class Evaluate(BaseCallback):
        def _on_rollout_start(self) -> None:  # after an update
            last = points[-1][0] if points else 0
            if self.num_timesteps // every > last // every:
                evaluate(self.num_timesteps)

        def _on_step(self) -> bool:
            return True

    model.learn(steps, callback=Evaluate())
    evaluate(model.num_timesteps)
    return points
