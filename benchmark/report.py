"""Tables and figures from the results of benchmark.run.

    python -m benchmark.report

Writes report.md, curves.png and trust_regions.png to benchmark/results. Seeds are the replicates: a curve is the
interquartile mean over seeds, with a stratified bootstrap interval of 95 % (Agarwal et al. 2021, the package rliable).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import suite
from benchmark.run import RESULTS

# Colours of Okabe and Ito, which the colour-blind can tell apart, and a marker each for print
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
STYLES = {
    script: {"color": colour, "marker": marker, "markevery": 4, "markersize": 5}
    for script, colour, marker in zip(suite.SCRIPTS, COLOURS, "ov^<sDPX", strict=True)
}
TRUST_REGIONS = ("npg", "trpo", "trpo-dual", "ppo")


def load() -> dict[str, dict[str, list[dict]]]:
    """The results of each environment and script, in the order of the seeds."""
    results: dict[str, dict[str, list[dict]]] = {}
    for env in (*suite.CLASSIC, *suite.MUJOCO):
        for directory in sorted(RESULTS.glob(f"{env}/*")):
            files = sorted(directory.glob("seed*.json"), key=lambda path: int(path.stem[4:]))
            results.setdefault(env, {})[directory.name] = [json.loads(path.read_text()) for path in files]
    return results


def interval(curves: list[dict[str, float]], points: int = 20) -> tuple[np.ndarray, ...]:
    """Steps, interquartile mean over seeds and its interval, low and high, of curves {step: value} at common steps."""
    from rliable import library, metrics

    steps = np.linspace(0, 1, points + 1)[1:] * min(max(map(int, curve)) for curve in curves)
    rows = [np.interp(steps, [int(step) for step in curve], list(curve.values())) for curve in curves]
    if len(rows) == 1:
        return steps, rows[0], rows[0], rows[0]

    def iqm(scores: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(scores[..., k]) for k in range(points)])

    means, bounds = library.get_interval_estimates({"": np.array(rows)[:, None]}, iqm, reps=2000)
    return steps, means[""], *bounds[""]


def draw_curve(axis: Any, curves: list[dict[str, float]], script: str, label: str = "") -> None:
    """One curve with its interval."""
    steps, mean, low, high = interval(curves)
    style = STYLES[script.partition("-")[0]] | ({"linestyle": "--", "fillstyle": "none"} if "-" in script else {})
    axis.plot(steps, mean, label=label or script, **style)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def draw_returns(results: dict, path: Path) -> None:
    """Evaluated return over environment steps, an axis for each environment, a curve for each script."""
    import matplotlib.pyplot as plt

    columns = 3
    figure, axes = plt.subplots(
        -(-len(results) // columns), columns, figsize=(12, 3.3 * -(-len(results) // columns)), layout="constrained"
    )
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, (env, scripts) in zip(axes.flat, results.items(), strict=False):
        for script, runs in scripts.items():
            draw_curve(axis, [run["evaluations"] for run in runs], script)
        axis.set(title=env, xlabel="environment steps", ylabel="return")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    plt.savefig(path, dpi=110)


def draw_trust_regions(results: dict, path: Path) -> None:
    """Return and KL(π_old‖π) after each update; of PPO an estimate, the mean over the minibatches of the update."""
    import matplotlib.pyplot as plt

    runs_of = {env: [run for name in ("npg", "trpo", "ppo") for run in results[env].get(name, [{}])] for env in results}
    envs = [env for env, runs in runs_of.items() if all("diagnostics" in run for run in runs)]
    figure, axes = plt.subplots(2, len(envs), figsize=(3.2 * len(envs), 5.6), layout="constrained", squeeze=False)
    for (above, below), env in zip(axes.T, envs, strict=True):
        for script, runs in results[env].items():
            if script in TRUST_REGIONS:
                draw_curve(above, [run["evaluations"] for run in runs], script)
                tag = "losses/approx_kl" if script == "ppo" else "losses/kl"
                draw_curve(below, [run["diagnostics"][tag] for run in runs], script)
        above.set(title=env)
        below.set(xlabel="environment steps", yscale="log")
        for axis in (above, below):
            axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes[0, 0].set(ylabel="return")
    axes[1, 0].set(ylabel="KL(π_old‖π) of an update")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    plt.savefig(path, dpi=110)


def table(results: dict) -> str:
    """Markdown: final and maximum return, seconds and steps a second of each script on each environment."""
    head = ("environment", "script", "steps", "final return: mean (seeds)", "maximum", "seconds", "steps/s")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for env, scripts in results.items():
        for script, runs in scripts.items():
            finals = [run["final_return"] for run in runs]
            digits = 1 if abs(np.mean(finals)) < 300 else 0
            seeds = ", ".join(f"{x:.{digits}f}" for x in finals)
            best, steps = np.mean([run["max_return"] for run in runs]), max(map(int, runs[0]["evaluations"]))
            seconds, speed = (np.median([run[name] for run in runs]) for name in ("seconds", "steps_per_second"))
            lines.append(
                f"| {env} | {script} | {steps:,} | {np.mean(finals):.{digits}f} ({seeds}) | {best:.{digits}f} "
                f"| {seconds:.0f} | {speed:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the results and writes the report."""
    results = load()
    draw_returns(results, RESULTS / "curves.png")
    draw_trust_regions(results, RESULTS / "trust_regions.png")
    text = "# Results\n\nGreedy policy at the end of the budget; maximum: mean over seeds of the best evaluation.\n\n"
    text += table(results) + "\n![Evaluated returns](curves.png)\n\n![Trust regions](trust_regions.png)\n"
    (RESULTS / "report.md").write_text(text)


if __name__ == "__main__":
    main()
