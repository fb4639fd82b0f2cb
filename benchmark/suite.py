"""What is run: environments, budgets and flags.

Each script has two settings: its defaults, and for a Box (off_policy_ac and ddpg: for MUJOCO) the second command of its
docstring. They were compared on seeds from 11 on, which are not among those that are reported (1 to 5); README.md says
where bad results on the latter were the reason to look further, and why there are exceptions.

A name with a dash is a variant: the script before the dash, with flags of its own; or, if it begins with sb3-, a peer,
which benchmark/peers.py runs.
"""

SCRIPTS = ("reinforce", "actor_critic", "a2c", "off_policy_ac", "ddpg", "npg", "trpo", "ppo")
CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1")
MUJOCO = ("InvertedPendulum-v5", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
OTHERS = ("Pusher-v5", "BipedalWalker-v3", "LunarLanderContinuous-v3", "LunarLander-v3")  # none had a say for a Box
SUITES = {"classic": CLASSIC, "mujoco": MUJOCO, "others": OTHERS}
DISCRETE = ("CartPole-v1", "Acrobot-v1", "LunarLander-v3")  # DDPG needs an action to differentiate by
ZOO = ("sb3-a2c", "sb3-ddpg", "sb3-trpo", "sb3-ppo")  # peers with the hyperparameters of their zoo
PEERS = (*ZOO, "sb3-a2c-defaults", "sb3-trpo-defaults", "sb3-ppo-defaults")
ACTOR_UPDATES = ("reparameterized", "importance", "resample")

STEPS = {  # environment steps; 1M on MuJoCo
    **{(script, "CartPole-v1"): 200_000 for script in ("reinforce", "actor_critic", "actor_critic-online", "a2c")},
    ("ddpg", "Pendulum-v1"): 20_000,
    ("off_policy_ac", "Pendulum-v1"): 20_000,
    **{(script, "CartPole-v1"): 100_000 for script in ("off_policy_ac", "npg", "trpo", "trpo-dual", "ppo")},
    **{(script, "Acrobot-v1"): 100_000 for script in ("off_policy_ac", "npg", "trpo")},
    **{(script, "Pendulum-v1"): 1_000_000 for script in ("actor_critic", "a2c")},
    **{(script, "Pendulum-v1"): 200_000 for script in ("npg", "trpo", "ppo")},
    **{(f"off_policy_ac-{kind}", "Pendulum-v1"): 20_000 for kind in ("reparameterized", "importance")},
    **{(f"off_policy_ac-{kind}", "HalfCheetah-v5"): 30_000 for kind in ACTOR_UPDATES},
    **{(script, env): 300_000 for script in ("off_policy_ac", "ddpg") for env in MUJOCO},
    ("ddpg", "InvertedPendulum-v5"): 100_000,
    ("off_policy_ac", "InvertedPendulum-v5"): 100_000,
}
EVAL_EPISODES = {"Pendulum-v1": 100, "Acrobot-v1": 100}  # 20 elsewhere; there, start states differ more than policies

CONTINUOUS = {  # for actions in a Box
    "reinforce": "--baseline value --learning-rate 5e-3 --gamma 0.99 --log-std-init -1 --normalize-obs",
    "actor_critic": (
        "--num-steps 64 --learning-rate 2e-3 --log-std-init -1 --normalize-obs --normalize-advantages --compile"
    ),
    "a2c": (
        "--num-steps 16 --learning-rate 1e-3 --gae-lambda 0.95 --ent-coef 0.01 --log-std-init -1 --normalize-obs "
        "--compile"
    ),
    **dict.fromkeys(
        ("npg", "trpo"),
        "--num-envs 4 --num-steps 512 --num-minibatches 16 --critic-learning-rate 1e-3 --max-kl 0.1 --damping 0.6 "
        "--log-std-init -0.5 --normalize-obs",
    ),
    "ppo": (
        "--num-envs 4 --num-steps 512 --num-minibatches 16 --update-epochs 10 --learning-rate 7e-4 --ent-coef 0.004 "
        "--log-std-init -0.5 --normalize-obs --compile"
    ),
}
REPLAY_CHEETAH = (  # of which a fall ends no episode: lookahead holds it back
    "--hidden-size 256 --batch-size 256 --tau 0.005 --no-anneal-lr --no-normalize-obs --no-normalize-rewards --compile "
    "--learning-starts 25000"
)
REPLAY = (
    "--lookahead 5 --hidden-size 128 --batch-size 128 --tau 0.005 --learning-starts 10000 --no-normalize-obs "
    "--no-normalize-rewards --compile"
)
ONE_DRAW = "--num-envs 1 --learning-rate 1e-3 --actor-update reparameterized --num-samples 1 --ent-coef 0.1"  # MuJoCo
FLAGS = {
    **{(script, env): flags for script, flags in CONTINUOUS.items() for env in ("Pendulum-v1", *MUJOCO, *OTHERS[:3])},
    # With --normalize-obs both solve it within 50,000 steps, and npg often loses it: footnote 1 of README.md here
    **{(x, "InvertedPendulum-v5"): CONTINUOUS[x].replace(" --normalize-obs", "") for x in ("npg", "trpo")},
    ("actor_critic-online", "CartPole-v1"): (
        "--num-envs 1 --num-steps 1 --trace-decay 0.9 --learning-rate 3e-4 --critic-learning-rate 1e-3 "
        "--no-normalize-rewards"
    ),
    ("trpo-dual", "CartPole-v1"): "--constraint dual",
    ("trpo-dual", "HalfCheetah-v5"): (
        "--num-envs 4 --num-steps 512 --num-minibatches 8 --critic-learning-rate 1e-3 --log-std-init -1 "
        "--normalize-obs --constraint dual"
    ),
    **{("off_policy_ac", env): f"{REPLAY} {ONE_DRAW}" for env in MUJOCO},
    **{("ddpg", env): REPLAY for env in MUJOCO},
    ("off_policy_ac", "HalfCheetah-v5"): f"{REPLAY_CHEETAH} {ONE_DRAW}",
    ("ddpg", "HalfCheetah-v5"): REPLAY_CHEETAH,
    ("off_policy_ac", "InvertedPendulum-v5"): (
        f"--tau 0.005 --no-normalize-obs --no-normalize-rewards --compile {ONE_DRAW}".replace("0.1", "0.01")
    ),
    ("off_policy_ac", "Acrobot-v1"): "--learning-rate 1e-3 --no-normalize-obs --no-normalize-rewards",
    ("off_policy_ac", "Pendulum-v1"): "--num-envs 1 --learning-rate 1e-3 --ent-coef 0.003",
    **{
        (f"off_policy_ac-{kind}", "Pendulum-v1"): (
            f"--num-envs 1 --learning-rate 1e-3 --ent-coef 0.003 --actor-update {kind}"
        )
        for kind in ("reparameterized", "importance")
    },
    **{
        (f"off_policy_ac-{kind}", "HalfCheetah-v5"): (
            "--num-envs 1 --learning-rate 1e-3 --tau 0.005 --ent-coef 0.1 --no-normalize-obs --no-normalize-rewards "
            f"--compile --actor-update {kind}"
        )
        for kind in ACTOR_UPDATES
    },
}
VARIANTS = tuple(dict.fromkeys(script for script, _ in FLAGS if "-" in script))

# Evaluated returns that count as learnt: where Gymnasium names one, its own, as far as our budgets reach it
THRESHOLDS = {
    "CartPole-v1": 475,
    "Pendulum-v1": -200,
    "Acrobot-v1": -100,
    "InvertedPendulum-v5": 950,
    "HalfCheetah-v5": 3000,
    "Hopper-v5": 2000,
    "Walker2d-v5": 2000,
}


def flags(script: str, env_id: str) -> str:
    """The flags of a script or variant on an environment; where there are none, the defaults do."""
    return FLAGS.get((script, env_id), "")


def applies(script: str, env: str) -> bool:
    """Whether the method takes the environment's actions; a variant, whether it has flags for the environment."""
    if script in VARIANTS:
        return (script, env) in FLAGS
    return not (script.endswith("ddpg") and env in DISCRETE)


def budget(script: str, env: str) -> int:
    """Environment steps of a run; a peer has those of the script it is compared with."""
    compared = script.removeprefix("sb3-").removesuffix("-defaults")
    return STEPS.get((compared, env), 1_000_000 if env in MUJOCO else 200_000 if env in OTHERS else 300_000)


def command(script: str, env: str, seed: int, steps: int = 0) -> list[str]:
    """The command line of one run, run directory aside; `steps` replaces the budget."""
    steps = steps or budget(script, env)
    base = script.partition("-")[0]
    peer = f"-m benchmark.peers --algorithm {script[4:].replace('-', ' --')}"
    program = peer if script in PEERS else f"{base}.py"
    line = f"{program} --env-id {env} --seed {seed} --total-timesteps {steps} {flags(script, env)}"
    return [*line.split(), "--eval-every", str(max(1, steps // 20)), "--eval-episodes", str(EVAL_EPISODES.get(env, 20))]
