"""Published returns, for what no peer of ours implements and beside those that one does.

Environment versions, and how a return was measured, differ from source to source: SOURCES says how.
"""

from typing import NamedTuple


class Figure(NamedTuple):
    """A published return."""

    value: float  # mean over the runs
    source: str  # a key of SOURCES
    steps: int = 1_000_000  # of training
    std: float = 0.0  # over the runs, where it is given
    runs: int = 1  # that the std is over

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of a normal distribution of the mean; a point where no deviation is given."""
        half = 1.96 * self.std / self.runs**0.5
        return self.value - half, self.value + half


SOURCES = {
    "Tianshou": "thu-ml/tianshou, examples/mujoco/benchmark: raw curves at 39acf209, mean over 10 seeds and 900k to 1M "
    "steps (or at the step that is given), greedy policy, -v3 and -v2",
    "RL Zoo": "DLR-RM/rl-baselines3-zoo, benchmark.md at 22e3ff2: one run, 150,000 steps of evaluation, MuJoCo -v3",
    "CleanRL": "docs.cleanrl.dev: 3 seeds, training returns of the stochastic policy, MuJoCo -v4",
    "sb3-contrib": "documentation of its TRPO: 3 seeds",
    "SLM-Lab": "kengz/SLM-Lab, docs/BENCHMARKS.md at 02477a9: 4 runs, moving average of training returns",
    "Baselines": "openai/baselines, benchmark of MuJoCo at 1M steps, -v1 and -v2",
    "Spinning Up": "openai/spinningup, benchmark: read off its figures, MuJoCo -v3",
}

A2C = {
    "CartPole-v1": [Figure(497, "SLM-Lab", 200_000), Figure(500, "RL Zoo", 500_000)],
    "Acrobot-v1": [Figure(-84.0, "SLM-Lab", 300_000), Figure(-83.4, "RL Zoo", 500_000)],
    "Pendulum-v1": [Figure(-163.0, "RL Zoo")],
    "InvertedPendulum-v5": [Figure(993, "Tianshou", std=18, runs=10)],
    "HalfCheetah-v5": [Figure(1838, "Tianshou", std=1116, runs=10), Figure(3041, "RL Zoo")],
    "Hopper-v5": [Figure(1186, "Tianshou", std=391, runs=10), Figure(733, "RL Zoo")],
    "Walker2d-v5": [Figure(1106, "Tianshou", std=642, runs=10), Figure(582, "RL Zoo")],
}
PUBLISHED: dict[str, dict[str, list[Figure]]] = {
    "reinforce": {
        "CartPole-v1": [Figure(483, "SLM-Lab", 200_000)],
        "InvertedPendulum-v5": [Figure(900, "Tianshou", std=71, runs=10)],
        "HalfCheetah-v5": [Figure(484, "Tianshou", std=240, runs=10)],
        "Hopper-v5": [Figure(388, "Tianshou", std=89, runs=10)],
        "Walker2d-v5": [Figure(356, "Tianshou", std=53, runs=10)],
    },
    "actor_critic": A2C,  # the nearest that anyone has published
    "a2c": A2C,
    "npg": {
        "InvertedPendulum-v5": [Figure(1000, "Tianshou")],
        "HalfCheetah-v5": [Figure(3397, "Tianshou")],
        "Hopper-v5": [Figure(1858, "Tianshou")],
        "Walker2d-v5": [Figure(2274, "Tianshou")],
    },
    "trpo": {
        "CartPole-v1": [Figure(500, "RL Zoo", 100_000)],
        "Acrobot-v1": [Figure(-83.1, "RL Zoo", 100_000)],
        "Pendulum-v1": [Figure(-174.6, "RL Zoo", 100_000)],
        "InvertedPendulum-v5": [Figure(905, "Baselines"), Figure(745, "Tianshou")],
        "HalfCheetah-v5": [
            Figure(4291, "Tianshou"), Figure(1803, "sb3-contrib", std=46, runs=3), Figure(1785, "RL Zoo"),
        ],
        "Hopper-v5": [Figure(3372, "sb3-contrib", std=215, runs=3), Figure(3618, "RL Zoo")],
        "Walker2d-v5": [Figure(4502, "sb3-contrib", std=234, runs=3), Figure(4933, "RL Zoo")],
    },
    "ppo": {
        "CartPole-v1": [
            Figure(499, "SLM-Lab", 200_000), Figure(490, "CleanRL", 500_000, 6, 3), Figure(500, "RL Zoo", 100_000),
        ],
        "Acrobot-v1": [Figure(-81.3, "SLM-Lab", 300_000), Figure(-73.5, "RL Zoo")],
        "Pendulum-v1": [Figure(-172.2, "RL Zoo", 100_000)],
        "InvertedPendulum-v5": [Figure(963, "CleanRL", std=22, runs=3), Figure(798, "Tianshou", std=336, runs=10)],
        "HalfCheetah-v5": [
            Figure(5733, "Tianshou", std=1325, runs=10), Figure(5819, "RL Zoo"),
            Figure(1443, "CleanRL", std=46, runs=3),
        ],
        "Hopper-v5": [
            Figure(2345, "Tianshou", std=516, runs=10), Figure(2410, "RL Zoo"),
            Figure(2383, "CleanRL", std=272, runs=3),
        ],
        "Walker2d-v5": [
            Figure(3432, "Tianshou", std=901, runs=10), Figure(3479, "RL Zoo"),
            Figure(2288, "CleanRL", std=572, runs=3),
        ],
    },
    "ddpg": {
        "Pendulum-v1": [Figure(-152.1, "RL Zoo", 20_000)],
        "InvertedPendulum-v5": [
            Figure(920, "Tianshou", std=58, runs=10), Figure(907, "Tianshou", 100_000, 293, 10),
            Figure(643, "CleanRL", std=70, runs=3),
        ],
        "HalfCheetah-v5": [
            Figure(11555, "Tianshou", std=477, runs=10), Figure(9137, "Tianshou", 300_000, 827, 10),
            Figure(6308, "Tianshou", 100_000, 1066, 10),
        ],
        "Hopper-v5": [Figure(1759, "Tianshou", std=239, runs=10), Figure(1241, "Tianshou", 300_000, 835, 10)],
        "Walker2d-v5": [
            Figure(1921, "Spinning Up"), Figure(1082, "Tianshou", std=443, runs=10),
            Figure(175, "Tianshou", 300_000, 124, 10),
        ],
    },
    "off_policy_ac": {  # SAC, which has the entropy term that this one has not: nobody published a nearer one
        "CartPole-v1": [Figure(406, "SLM-Lab", 200_000)],
        "Acrobot-v1": [Figure(-92.6, "SLM-Lab", 300_000)],
        "Pendulum-v1": [Figure(-151, "SLM-Lab", 300_000)],
        "InvertedPendulum-v5": [
            Figure(999, "Tianshou", std=4, runs=10), Figure(1000, "Tianshou", 100_000, 0, 10),
        ],
        "HalfCheetah-v5": [
            Figure(11879, "Tianshou", std=984, runs=10), Figure(9059, "Tianshou", 300_000, 1108, 10),
            Figure(6515, "Tianshou", 100_000, 542, 10),
        ],
        "Hopper-v5": [Figure(3457, "Tianshou", std=113, runs=10), Figure(3388, "Tianshou", 300_000, 121, 10)],
        "Walker2d-v5": [Figure(4890, "Tianshou", std=254, runs=10), Figure(3387, "Tianshou", 300_000, 1246, 10)],
    },
}  # fmt: skip


def figure_to_beat(script: str, env: str, steps: int) -> Figure | None:
    """The highest that took at most so many steps (a hundredth more is no more); else the one that took the fewest."""
    figures = PUBLISHED.get(script, {}).get(env, [])
    within = [figure for figure in figures if figure.steps <= 1.01 * steps]
    return max(within, default=min(figures, key=lambda figure: figure.steps, default=None))
