"""Published returns to compare with, for what no peer of ours implements and beside those that one does.

Environment versions, and how a return was measured, differ from source to source: SOURCES says how.
published.csv has the mean return over the runs, its deviation (0: not given) and the steps of training.
"""

import csv
from pathlib import Path
from typing import NamedTuple


class Figure(NamedTuple):
    """A published return."""

    value: float
    std: float
    runs: int
    steps: int
    source: str

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of a normal distribution of the mean; a point where no deviation is given."""
        half = 1.96 * self.std / self.runs**0.5
        return self.value - half, self.value + half


SOURCES = {
    "Tianshou": "thu-ml/tianshou, examples/mujoco/benchmark: raw curves at 39acf209, mean over 10 seeds and "
    "900k to 1M steps (or at the step that is given), greedy policy, -v3 and -v2",
    "RL Zoo": "DLR-RM/rl-baselines3-zoo, benchmark.md at 22e3ff2: one run, 150,000 steps of evaluation, -v3",
    "CleanRL": "docs.cleanrl.dev: 3 seeds, training returns of the stochastic policy, MuJoCo -v4",
    "sb3-contrib": "documentation of its TRPO: 3 seeds",
    "SLM-Lab": "kengz/SLM-Lab, docs/BENCHMARKS.md at 02477a9: 4 runs, moving average of training returns",
    "Baselines": "openai/baselines, benchmark of MuJoCo at 1M steps, -v1 and -v2",
    "Spinning Up": "openai/spinningup, benchmark: read off its figures, MuJoCo -v3",
}

# 0 and 1 of a normalised return: uniform actions (100 episodes), and the best on-policy one published for 1M steps
RANDOM = {"HalfCheetah-v5": -290, "Hopper-v5": 16, "Walker2d-v5": 0}
REFERENCE = {"HalfCheetah-v5": 5819, "Hopper-v5": 3618, "Walker2d-v5": 4933}
# The nearest that anyone has published: of SAC, which has the entropy term that ours has not, and of A2C
NEAREST = {"off_policy_ac": "sac", "actor_critic": "a2c"}
PUBLISHED: dict[tuple[str, str], list[Figure]] = {}
for row in csv.DictReader(Path(__file__).with_name("published.csv").read_text().splitlines()):
    numbers = float(row["value"]), float(row["std"]), int(row["runs"]), int(row["steps"])
    PUBLISHED.setdefault((row["script"], row["env"]), []).append(Figure(*numbers, row["source"]))


def figure_to_beat(script: str, env: str, steps: int) -> Figure | None:
    """The highest in at most so many steps (a hundredth more is no more); else the one in the fewest."""
    figures = PUBLISHED.get((NEAREST.get(script, script), env), [])
    within = [figure for figure in figures if figure.steps <= 1.01 * steps]
    return max(within, default=min(figures, key=lambda figure: figure.steps, default=None))
