"""Proves that a sweep survives kills and failures, that its report is right, that any agent can be played."""

import fcntl
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("ray", reason="needs benchmark/requirements.txt", exc_type=ImportError)

import ppo
import trpo
from benchmark import RESULTS, ROOT, bias_variance, peers, play, published, report, run, speed, suite

CARTPOLE = "CartPole-v1"


def folders(path: Path) -> dict[str, str]:
    return {"runs": str(path / "runs"), "results": str(path / "results")}


def job(path: Path, script: str = "a2c", env: str = CARTPOLE, **flags: Any) -> run.Job:
    """One run in a folder of its own."""
    return run.Job(run.Args(**folders(path), **flags), script, env, 1)


def start_sweep(path: Path, *flags: str, **env: str) -> subprocess.Popen:
    """python -m benchmark.run as a process."""
    words = [*flags, "--seeds", "1", *(f"--{name}={value}" for name, value in folders(path).items())]
    line = [sys.executable, "-m", "benchmark.run", "--jobs", "1", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return subprocess.Popen(line, env=os.environ | env, **pipes)


def result(final: float, **more: Any) -> dict[str, Any]:
    """The result of a run that ends with this return."""
    one = {"versions": {"torch": "1"}, "seconds": 10, "steps_per_second": 100, "diagnostics": {}}
    one |= {"command": f"python ppo.py --env-id {CARTPOLE} --seed 1 --total-timesteps 1000"}
    one |= {"final_return": final, "max_return": final}
    return one | {"evaluations": {"500": 0.0, "1000": final}} | more


def write(path: Path, env: str, script: str, *results: dict[str, Any]) -> None:
    """Results of seeds 1, 2, ... as the sweep leaves them."""
    folder = path / "results" / env / script
    folder.mkdir(parents=True, exist_ok=True)
    for seed, one in enumerate(results, 1):
        (folder / f"seed{seed}.json").write_text(json.dumps(one))


def test_jobs_are_chosen_by_flags() -> None:
    """No flags: all scripts on the small suite."""
    jobs = run.Args().list_jobs()
    pairs = {(job.script, job.env) for job in jobs}
    every = {(script, env) for script in suite.SCRIPTS for env in suite.CLASSIC}
    assert pairs == every - {("ddpg", env) for env in suite.DISCRETE}
    assert len(jobs) == 5 * len(pairs)
    assert {path.stem for path in ROOT.glob("*.py")} == set(suite.SCRIPTS)
    jobs = run.Args(suite="mujoco", scripts=("ppo",), peers=True, seeds=(3,)).list_jobs()
    assert {job[1:] for job in jobs} == {(x, env, 3) for x in ("ppo", *suite.ZOO) for env in suite.MUJOCO}


@pytest.mark.parametrize("script", [*suite.SCRIPTS, *suite.VARIANTS, *suite.PEERS])
def test_commands_are_accepted(script: str) -> None:
    """By the parser of the script; a peer has the budget and the evaluation of its script."""
    for env in (*suite.CLASSIC, *suite.MUJOCO):
        words = suite.command(script, env, seed=7)
        if script in suite.PEERS:
            flags = tyro.cli(peers.Args, args=[*words[2:], "--run-dir", "x"])
            other = suite.command(flags.algorithm, env, seed=7)
            steps = words.index("--total-timesteps") + 1
            assert [words[steps], *words[-4:]] == [other[other.index("--total-timesteps") + 1], *other[-4:]]
        else:
            flags = tyro.cli(importlib.import_module(words[0].removesuffix(".py")).Args, args=words[1:])
            assert shlex.join(suite.flags(script, env).split()) in shlex.join(words)
        assert (flags.env_id, flags.seed, flags.eval_every) == (env, 7, flags.total_timesteps // 20)


def test_committed_results_are_those_of_the_suite() -> None:
    """And the report is that of these results."""
    for path in RESULTS.glob("*/*/seed*.json"):
        result = json.loads(path.read_text())
        command = suite.command(path.parts[-2], path.parts[-3], int(path.stem[4:]))
        assert result["command"] == shlex.join(["python", *command]), path
    assert report.text(report.load(RESULTS), report.FIGURES) == (RESULTS / "report.md").read_text()
    assert all((RESULTS / name).exists() for name in report.FIGURES)


@pytest.mark.parametrize("flag", ["run --scripts pop", "run --jobs 0", "run --steps 9", "speed --env-id X-v0"])
def test_bad_flags(flag: str, capsys: pytest.CaptureFixture) -> None:
    name, *words = flag.split()
    with pytest.raises(SystemExit, match="2"):
        tyro.cli({"run": run, "speed": speed}[name].Args, args=words)
    assert words[0] in capsys.readouterr().err


def test_dry_run_prints_what_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, CARTPOLE, "ppo", {})
    which = {"scripts": ("ppo", "sb3-ppo"), "envs": (CARTPOLE,), "seeds": (1, 2), "dry_run": True}
    run.main(run.Args(**folders(tmp_path), **which))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["-m", "ppo.py", "-m"]
    assert [line.endswith("--resume") for line in lines] == [False, True, False]
    assert not (tmp_path / "runs").exists()


def test_result_of_a_log_with_known_answers(tmp_path: Path) -> None:
    """200 steps: in the 100 bins of two steps each the mean of the returns that ended there."""
    one = job(tmp_path)
    with SummaryWriter(str(one.directory)) as writer:
        for step in range(1, 201):
            writer.add_scalar("charts/episodic_return", float(step), step)
        for step, value in ((100, 7.0), (150, 9.0), (200, 8.0)):
            writer.add_scalar("eval/episodic_return", value, step)
            writer.add_scalar("charts/SPS", 10 * value, step)
            writer.add_scalar("losses/entropy", -value, step)
    found = run.result_of(one, seconds=12.34)
    assert (found["final_return"], found["max_return"]) == (8, 9)
    assert (found["steps_per_second"], found["seconds"]) == (80, 12.3)
    assert found["evaluations"] == {100: 7.0, 150: 9.0, 200: 8.0}
    assert found["training_returns"][2] == 1  # step 1 alone: step 2 opens the next bin
    assert found["training_returns"][4] == 2.5
    assert found["training_returns"][200] == 199  # 198, 199, and the last step
    assert found["diagnostics"] == {"losses/entropy": {102: -7.0, 152: -9.0, 200: -8.0}}
    assert shlex.split(found["command"]) == one.command
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    with SummaryWriter(str(job(tmp_path, "ppo").directory)) as writer:  # no episode ends
        writer.add_scalar("eval/episodic_return", 5.0, 10)
        writer.add_scalar("charts/SPS", 5.0, 10)
    assert run.result_of(job(tmp_path, "ppo"), seconds=1)["training_returns"] == {}


def test_seconds_of_the_parts_of_a_killed_run(tmp_path: Path) -> None:
    """By the names of real files, which have the time when they were opened."""
    for _ in range(2):
        SummaryWriter(str(tmp_path)).close()
    assert -3 < run.seconds_before(tmp_path) < 10
    for path, seconds in zip(tmp_path.glob("events*"), (30, 12), strict=True):
        opened = int(path.name.split(".")[3])
        os.utime(path, (opened, opened + seconds))
    assert run.seconds_before(tmp_path) == 42


def test_a_run_waits_for_a_process_that_outlived_its_sweep(tmp_path: Path) -> None:
    """Which holds the lock of its log; when it is gone the result that it left is found."""
    one, found = job(tmp_path), []
    one.directory.mkdir(parents=True)
    with one.directory.with_suffix(".log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: found.append(run.run(one)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        write(tmp_path, CARTPOLE, "a2c", {})
    thread.join(10)
    assert found == ["there already"]


def wait_for(path: Path, pattern: str, process: subprocess.Popen) -> None:
    """Until the file has the pattern, while the process lives."""
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    """Stopped, then killed, then finished; in TensorBoard there are its curves and its flags."""
    flags = ("--scripts", "a2c", "ppo", "--steps", "20000", "--envs", CARTPOLE)
    runs, results = tmp_path / "runs" / CARTPOLE, tmp_path / "results" / CARTPOLE
    a2c, ppo_log = (runs / script / "seed1.log" for script in ("a2c", "ppo"))
    first = start_sweep(tmp_path, *flags)
    wait_for(a2c, r"10%  step", first)
    first.send_signal(signal.SIGTERM)
    out = first.communicate(timeout=300)[0]
    assert (first.returncode, "the same command goes on" in out) == (143, True), out
    stopped = re.search(r"stopped at step ([\d,]+)", a2c.read_text())
    assert (bool(stopped), ppo_log.exists()) == (True, False), a2c.read_text()
    second = start_sweep(tmp_path, *flags)
    wait_for(ppo_log, r"10%  step", second)
    finished = (results / "a2c" / "seed1.json").stat().st_mtime_ns
    second.kill()  # its run lives on, and must not be run twice
    second.communicate(timeout=60)
    third = start_sweep(tmp_path, *flags)
    out = third.communicate(timeout=600)[0]
    assert third.returncode == 0, out
    assert (results / "a2c" / "seed1.json").stat().st_mtime_ns == finished
    assert f"from step {stopped[1]}" in a2c.read_text()
    assert (tmp_path / "results" / "report.md").exists()
    starts = re.findall(r"from step ([\d,]+), ", ppo_log.read_text())
    assert starts in (["0"], ["0", "20,480"])  # the second finds that nothing is left
    for script in ("a2c", "ppo"):
        found = json.loads((results / script / "seed1.json").read_text())
        events = EventAccumulator(str(runs / script / "seed1")).Reload()  # with the same tags in both
        assert {"charts/episodic_return", "charts/SPS", "losses/entropy"} <= {*events.Tags()["scalars"]}
        curve = {str(event.step): event.value for event in events.Scalars("eval/episodic_return")}
        assert curve == pytest.approx(found["evaluations"], abs=1e-3)
        most = {"a2c": 20, "ppo": 10}[script]  # at the end of a batch
        assert len(curve) in (most - 1, most)  # the signal ends an evaluation that is under way
        kinds = {path.name.split(".")[0] for path in (runs / script / "seed1").iterdir()}
        assert kinds == {"events", "checkpoint"}
        session = EventAccumulator(str(tmp_path / "runs" / "hparams" / CARTPOLE / script / "seed1")).Reload()
        assert session.Scalars("hparams/final_return")[0].value == pytest.approx(found["final_return"])
        content = session.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        given = HParamsPluginData.FromString(content).session_start_info.hparams
        assert (given["script"].string_value, given["env_id"].string_value) == (script, CARTPOLE)
        assert (given["total_timesteps"].number_value, given["gamma"].number_value) == (20_000, 0.99)


@pytest.mark.slow
def test_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local cluster: the same results as without it, a failing run among them."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flags = "--scripts ppo --envs CartPole-v1 Nowhere-v0 --steps 1000 --executor ray"
    process = start_sweep(tmp_path, *flags.split(), HOME=str(tmp_path), RAY_worker_niceness="0")
    out = process.communicate(timeout=600)[0]
    assert (process.returncode, "1 of 2 runs failed" in out) == (1, True), out
    assert re.search(r"ppo Nowhere-v0 seed 1: FAILED: it exited with 2.*\n +ppo: --env-id Nowhere-v0: ", out)
    there = json.loads((tmp_path / "results" / CARTPOLE / "ppo" / "seed1.json").read_text())
    here = job(tmp_path / "here", "ppo", steps=1000)
    run.run(here)
    assert there["evaluations"] == json.loads(here.target.read_text())["evaluations"]


def test_statistics_with_known_answers() -> None:
    """Of five seeds the IQM is the mean of the middle three; equal scores have an interval without width."""
    assert report.iqm(np.array([1.0, 2, 3, 4, 1000])) == 3
    assert report.bootstrap(np.mean, np.array([5.0, 5.0])) == (5, 5)
    assert report.bootstrap(np.mean, np.array([7.0])) == (7, 7)
    low, high = report.bootstrap(np.mean, np.arange(20.0))
    assert (low, high) == pytest.approx((9.5 - 1.96 * 1.29, 9.5 + 1.96 * 1.29), abs=0.3)  # 5.77 / √20 = 1.29
    assert (low, high) == report.bootstrap(np.mean, np.arange(20.0))
    assert report.bootstrap(report.iqm, np.array([0, 1, 2, 3, 1e6]))[0] < 2
    one = {"100": 1.0, "200": 5.0, "300": 4.0, "400": 9.0}
    assert [report.steps_to(one, threshold) for threshold in (0, 5, 6, 10)] == [100, 200, 400, float("inf")]
    curves = [{"100": 0.0, "200": 10.0}, {"100": 0.0, "200": 10.0, "400": 99.0}]
    steps, values = report.at_common_steps(curves, points=4).to_numpy().T  # up to the end of the shortest
    assert [*steps, *values] == 2 * [50, 100, 150, 200] + 2 * [0, 0, 5, 10]
    theirs = {
        "beaten": [(80, 90), (94, 94)],
        "equal": [(99, 99), (90, 97), (103, 120)],
        "below": [(106, 120)],
    }
    assert all(report.verdict((95, 105), x) == word for word in theirs for x in theirs[word])


def test_figure_to_beat() -> None:
    """The highest within the budget, else the one with the fewest steps."""
    assert published.figure_to_beat("ddpg", "HalfCheetah-v5", 299_000).value == 9137
    assert published.figure_to_beat("ddpg", "Hopper-v5", 300_000).value == 1241
    assert published.figure_to_beat("off_policy_ac", CARTPOLE, 100_000).steps == 200_000
    assert published.figure_to_beat("actor_critic", "HalfCheetah-v5", 1_001_472).value == 3041
    assert published.figure_to_beat("npg", "Pendulum-v1", 100_000) is None
    assert published.Figure(100, 10, 4, 1, "CleanRL").interval == pytest.approx((90.2, 109.8))
    assert {script for script, _ in published.PUBLISHED} <= {*suite.SCRIPTS, *published.NEAREST.values()}
    assert {x.source for figures in published.PUBLISHED.values() for x in figures} <= published.SOURCES.keys()


def test_report_of_a_part_of_a_sweep(tmp_path: Path) -> None:
    """One seed of one script; then a peer, diagnostics, a variant, and an environment of one's own."""
    diagnostics = {"diagnostics": {"losses/approx_kl": {"500": 0.02, "1000": 0.01}}}
    parts = [
        (CARTPOLE, "ppo", [480.0], {}, []),
        (CARTPOLE, "sb3-ppo", [100.0, 200.0], {}, ["peers"]),
        (CARTPOLE, "trpo", [50.0], diagnostics, ["peers", "trust_regions"]),
        (CARTPOLE, "trpo-dual", [50.0], {}, ["peers", "variants", "trust_regions"]),
        ("Own-v0", "ppo", [1.0, 2.0], {}, ["peers", "variants", "trust_regions"]),
    ]
    for env, name, finals, more, figures in parts:
        write(tmp_path, env, name, *(result(x, **more) for x in finals))
        report.main(report.Args(**folders(tmp_path)))
        text = (tmp_path / "results" / "report.md").read_text()
        drawn = {path.stem for path in (tmp_path / "results").glob("*.png")}
        assert drawn == {*re.findall(r"!\[(\w+)\]\(\1.png\)", text)} == {"curves", *figures}
        assert "| CartPole-v1 | 475 | ppo | 1 of 1 | 1,000 | 10 |" in text
        assert "| RL Zoo, 100,000 steps | (one seed) |" in text
    assert "| CartPole-v1 | sb3-ppo | 1,000 | 150.0 (100.0, 200.0) | 150.0 [100.0, 200.0] |" in text
    assert "| CartPole-v1 | 475 | sb3-ppo | 0 of 2 | – | – |" in text
    assert "| Own-v0 | ppo | 1,000 | 1.5 [1.0, 2.0] |  | none published |  |" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", suite.SCRIPTS)
def test_play_of_each_script_is_its_own_evaluation(script: str, tmp_path: Path) -> None:
    module = importlib.import_module(script)
    flags = {"env_id": "Pendulum-v1" if script == "ddpg" else CARTPOLE, "run_dir": str(tmp_path / "run")}
    last = module.train(module.Args(total_timesteps=300, eval_episodes=3, **flags))
    returns, recorder = play.play(play.Args(str(tmp_path / "run"), episodes=3))
    assert np.mean(returns) == pytest.approx(last["eval/episodic_return"])
    assert sum(recorder.arrays["rewards"]) == pytest.approx(sum(returns))
    assert sum(recorder.arrays["ends"]) == 3


def test_play_makes_a_gif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    flags = {"total_timesteps": 600, "eval_episodes": 0, "run_dir": str(tmp_path / "run")}
    trpo.train(trpo.Args(constraint="dual", **flags))
    files = {"gif": str(tmp_path / "x.gif"), "record": str(tmp_path / "x.npz")}
    play.main(play.Args(str(tmp_path / "run"), episodes=2, max_frames=10, width=120, **files))
    with Image.open(files["gif"]) as image:
        assert (image.size, 5 <= image.n_frames <= 10) == ((120, 80), True)
        assert len(image.getcolors()) > 1
    assert np.load(files["record"])["ends"].sum() == 2


def test_play_of_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words in ("FileNotFoundError", "UnpicklingError"):
        with pytest.raises(SystemExit, match="2"):
            play.main(play.Args(str(tmp_path)))
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
        (tmp_path / "checkpoint.pt").write_bytes(b"not one")


def test_peers_are_evaluated_as_scripts_are(tmp_path: Path) -> None:
    """The same policy has the same return and length in both, from the same seed."""
    args = ppo.Args(total_timesteps=64, num_envs=1, seed=5, eval_episodes=7, run_dir=str(tmp_path))
    last = ppo.train(args)
    with ExitStack() as stack:
        agent = ppo.Agent(ppo.Envs(stack, args, 1), args)
    agent.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"])
    act, model = agent.in_numpy(), SimpleNamespace(get_vec_normalize_env=lambda: None)
    model.predict = lambda obs, deterministic: (act(obs, 0), None)
    expected = pytest.approx((last["eval/episodic_return"], last["eval/episodic_length"]))
    assert peers.evaluate(model, CARTPOLE, seed=5, episodes=7) == expected
    assert peers.evaluate(model, CARTPOLE, seed=6, episodes=7) != expected


@pytest.mark.parametrize("script", suite.PEERS)
def test_a_peer_writes_what_a_script_writes(script: str, tmp_path: Path, capsys: Any) -> None:
    one = job(tmp_path, script, "Pendulum-v1" if script == "sb3-ddpg" else CARTPOLE)
    _, algorithm, *defaults = script.split("-")
    peers.train(peers.Args(str(one.directory), algorithm, one.env, 1, 1200, 400, 2, bool(defaults)))
    found = run.result_of(one, 1.0)
    assert f"100%  step {max(found['evaluations']):,}  " in capsys.readouterr().out
    assert all(step % 400 < 1024 for step in found["evaluations"])
    assert (1 if defaults else 2) <= len(found["evaluations"]) <= 3  # rollouts have 2048 steps by default
    assert max(found["evaluations"]) >= 1200
    assert found["training_returns"]
    assert "sb3-contrib" in found["versions"]


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # so does the zoo
@pytest.mark.parametrize(("algorithm", "env"), [(name, env) for name in peers.ZOO for env in peers.ZOO[name]])
def test_settings_of_the_zoo_are_accepted(algorithm: str, env: str) -> None:
    assert env in (*suite.CLASSIC, *suite.MUJOCO)
    settings = peers.ZOO[algorithm][env]
    model = peers.make(algorithm, env, 1, **settings)
    assert model.gamma == settings.get("gamma", 0.99)
    if str(settings.get("learning_rate")).startswith("linear"):
        rate = float(settings["learning_rate"].split()[1])
        assert [model.lr_schedule(left) for left in (1, 0.5, 0)] == pytest.approx([rate, rate / 2, 0])


@pytest.mark.parametrize(("script", "env", "first"), [("ddpg", "Pendulum-v1", 1000), ("ppo", CARTPOLE, 512)])
def test_speed_is_that_of_steps_with_updates(script: str, env: str, first: int, monkeypatch: Any) -> None:
    """From the end of the first iteration that has one."""
    run_class = importlib.import_module(script).Run
    monkeypatch.setattr(run_class, "end_iteration", run_class.end_iteration)  # what is timed is put back
    stamps = speed.time_script(speed.Args(script=script, env_id=env, steps=600))
    assert stamps[0][0] == first
    assert 600 <= stamps[-1][0] - first < 1200
    for name in ("bare", "acting"):
        begin, end = speed.CONTENDERS[name][1](speed.Args(script, env, steps=600))
        assert begin[0] + 600 <= end[0] < 1200
        assert all(x < y for x, y in zip(begin, end, strict=True))


def test_speed_compares_processes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = {"contenders": ("eager", "sb3"), "steps": 600, "rounds": 1, "flags": "--num-steps 64"}
    speed.main(speed.Args("ppo", CARTPOLE, out=str(tmp_path / "x.json"), **args))
    ours, theirs = json.loads((tmp_path / "x.json").read_text())["figures"].values()
    ratios = [ours[clock][0] / theirs[clock][0] for clock in ("wall", "cpu")]
    assert ours["over_sb3"] == pytest.approx(ratios, abs=0.01)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| ppo.py, CartPole-v1 | + update | stable-baselines3 |"
    assert [row.split(" | ")[2] for row in rows] == [f"{theirs[x][0]:,} |" for x in ("wall", "cpu")]


def test_bias_and_variance(tmp_path: Path) -> None:
    """Squared bias and variance of two estimates; and the whole, once."""
    estimates = np.array([[1.0], [3.0]])  # mean 2, variance 2, whose half is the noise of 2²
    assert bias_variance.summary(estimates, np.zeros((2, 1))) == (3, 2)
    flags = {"train_steps": 300, "rollouts": 3, "num_steps": 16, "fit_steps": 5, "out": str(tmp_path / "x")}
    bias_variance.main(bias_variance.Args(**flags))
    tables = json.loads((tmp_path / "x.json").read_text())["figures"]["critics"]
    assert tables["fitted to 20 rollouts"]["λ = 1"][0] == 0  # against itself


@pytest.mark.parametrize("script", suite.SCRIPTS)
def test_the_flags_for_a_box_are_the_second_command_of_the_docstring(script: str) -> None:
    text = importlib.import_module(script).__doc__.replace("\\\n", "")
    command = text.split(f"python {script}.py")[2].split("\n")[0].split()
    env, steps = command[1], str(suite.budget(script, command[1]))
    assert command == ["--env-id", env, "--total-timesteps", steps, *suite.flags(script, env).split()]
