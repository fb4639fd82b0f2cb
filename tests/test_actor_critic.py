"""Proves that actor_critic.py has exactly the expectations, targets and traces it claims.

The expectations are exact: the shipped `train` gets every trajectory of the MDP in tabular.py. What it hands
to its loss, weighted by the probability of each, is compared with formulas of V, Q and the distribution of
states from dynamic programming. Formulas are compared with double loops, real runs are retraced with
torch.distributions, clip_grad_norm_ and plain Adam.
"""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from second_road import CASES, as_seen, close, distribution, lambda_loop, n_step_loop, new_agent, watch
from tabular import CONTINUES, DISCRETE, MDP, SPACES, Given, linear

import actor_critic

GAMMA = 0.75  # as 0.875 below, the same number in float32 and float64
ESTIMATES = [{"advantage": "td"}, {"advantage": "monte_carlo"}]
ESTIMATES += [{"advantage": "n_step", "lookahead": n} for n in (1, 2, 3, 20)]
ESTIMATES += [{"advantage": "gae", "gae_lambda": lam} for lam in (0.0, 0.5, 1.0)]
ONLINE = {"num_envs": 1, "num_steps": 1}
TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]]).double().repeat(4, 1)
THETA = THETA + torch.linspace(-0.6, 0.7, 24).double().reshape(12, 2)
PROBABILITIES, OCCUPANCY = TIMED.probabilities(THETA.softmax(-1)), TIMED.occupancy(THETA.softmax(-1))
TRUE_V, TRUE_Q = TIMED.values(THETA.softmax(-1), GAMMA)
WRONG_V = TRUE_V + torch.tensor([[3, -1.5, 0.7], [0.4, 2, -1], [-2.5, 0.3, 1.1], [1.2, 0.8, -0.9]]).double()


def args_of(**flags):
    shape = {"gamma": GAMMA, "hidden_size": 5, "device": "cpu", "normalize_rewards": False}
    return actor_critic.Args(**shape | flags)


def estimated_gradients(values, **flags):
    """Σ_t ∇ log π(a_t|s_t) A_t of each trajectory, (K, rows, A): minus the gradient of the shipped loss."""
    flags |= {"critic_epochs": 1, "learning_rate": 0.0, "critic_learning_rate": 0.0, "total_timesteps": 1}
    args = args_of(num_envs=len(PROBABILITIES), num_steps=TIMED.horizon, **flags)
    agent, envs, batch = new_agent(actor_critic, DISCRETE, 12), Given([TIMED.batch()]), TIMED.batch()
    agent.actor, agent.critic = linear(THETA), linear(values.reshape(-1, 1))
    agent.in_numpy = lambda: lambda *_: envs.rows[0].actions
    (iteration,) = watch(actor_critic, agent, "actor_loss", args, lambda *_: envs)
    *given, _ = iteration.batches[-1][0]
    grads = []
    for i, length in enumerate(batch.mask.sum(0).tolist()):
        loss, _ = actor_critic.actor_loss(agent, *(x[:length, i] for x in given), 0.0)
        grads.append(-length * torch.autograd.grad(loss, agent.actor.weight)[0].T)
    return torch.stack(grads)


def expectation(grads):
    return torch.tensordot(PROBABILITIES, grads, 1)


def formula(weights):
    """Σ_t E[∇ log π(a_t|s_t) X_t(s_t, a_t)], X (horizon, S, A), by dynamic programming."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(TIMED.surrogate(theta.softmax(-1), OCCUPANCY, weights), theta)[0]


@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_with_the_true_values_every_advantage_gives_the_policy_gradient(flags):
    """Without a discount, where the missing factor γ^t is 1, it is the gradient of the objective."""
    close(expectation(estimated_gradients(TRUE_V, **flags)), formula(TRUE_Q))
    theta = THETA.clone().requires_grad_()
    values, _ = TIMED.values(THETA.softmax(-1), 1.0)
    (exact,) = torch.autograd.grad(TIMED.objective(theta.softmax(-1), 1.0), theta)
    close(expectation(estimated_gradients(values, gamma=1.0, **flags)), exact)
    assert exact.norm() > 0.5


@pytest.mark.parametrize("flags", [ESTIMATES[i] for i in (0, 1, 2, 3, 4, 8)], ids=str)
def test_bias_with_a_wrong_critic(flags):
    """It is Σ_t E[∇ log π γ^m (1 − terminated) (V − V^π)(s_{t+m})], m = n or all that is left, by listing.

    So Monte Carlo believes the critic alone about what follows the time limit.
    """
    n = {"td": 1, "n_step": flags.get("lookahead")}.get(flags["advantage"], TIMED.horizon)
    batch, theta, error, total = TIMED.batch(), THETA.clone().requires_grad_(), (WRONG_V - TRUE_V), 0.0
    for i, length in enumerate(batch.mask.sum(0).tolist()):
        for t in range(length):
            last = min(t + n, length) - 1
            if not batch.terminated[last, i]:
                score = PROBABILITIES[i] * theta.log_softmax(-1)[batch.rows[t, i], batch.actions[t, i]]
                total = total + score * GAMMA ** (last + 1 - t) * error.flatten() @ batch.next_obs[last, i]
    bias = expectation(estimated_gradients(WRONG_V, **flags)) - formula(TRUE_Q)
    close(bias, torch.autograd.grad(total, theta)[0])
    if n == 1:  # V(s_t) is a baseline, the rest is Q^π
        close(bias, formula(GAMMA * torch.einsum("san,tn->tsa", CONTINUES, error[1:])))
        assert bias.norm() > 0.3
    elif n > 2:
        _, q_values = TIMED.values(THETA.softmax(-1), GAMMA, WRONG_V[-1])
        close(bias, formula(q_values) - formula(TRUE_Q))


def by_loops(args, *arrays):
    n = {"td": 1, "n_step": args.lookahead, "monte_carlo": 1000}.get(args.advantage)
    return n_step_loop(*arrays, args.gamma, n) if n else lambda_loop(*arrays, args.gamma, args.gae_lambda)


@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_advantages_and_targets_equal_double_loops_over_separate_episodes(flags):
    """n steps, their mixture by λ; td and monte_carlo are both ends of either."""
    for case, arrays in enumerate(CASES):
        args = args_of(**flags | {"gamma": (0.0, 0.875, 1.0)[case % 3]})
        advantages = actor_critic.advantage_estimates(*map(torch.from_numpy, arrays), args=args)
        close(advantages, by_loops(args, *arrays))
        for lam, n in ((0.0, 1), (1.0, 1000)):  # which the critic's targets are, plus V(s_t)
            close(actor_critic.gae(*map(torch.from_numpy, arrays), GAMMA, lam), n_step_loop(*arrays, GAMMA, n))


def real_run(space, **flags):
    """The flags, the agent as it was, iterations, and the agent."""
    args = args_of(env_id=f"Tabular{type(space).__name__}-v0", **flags)
    shape = {"normalize_obs": args.normalize_obs, "shared_network": args.shared_network}
    agent = new_agent(actor_critic, space, **shape)
    return args, copy.deepcopy(agent), watch(actor_critic, agent, "actor_loss", args), agent


@SPACES
@pytest.mark.parametrize("lam", [0.9, 1.0])
def test_summed_trace_updates_of_an_episode_are_the_lambda_return_update(space, lam):
    """With frozen parameters: Σ_t ∇ log π(a_t|s_t) (G^λ_t − V(s_t)), and Σ_t ∇V(s_t) (G^λ_t − V(s_t))."""
    flags = {"trace_decay": lam, "total_timesteps": 128, "learning_rate": 0.0, "critic_learning_rate": 0.0}
    _, agent, iterations, _ = real_run(space, max_grad_norm=1e9, **flags, **ONLINE)
    x = iterations[0].steps._make(map(torch.cat, zip(*(each.steps for each in iterations), strict=True)))
    values, next_values = (agent.value(obs) for obs in (x.obs, x.next_obs))
    arrays = (y.detach().numpy() for y in (x.rewards, values, next_values, x.terminated, x.dones))
    advantages = torch.from_numpy(lambda_loop(*arrays, GAMMA, lam))
    params = [y for name, y in agent.named_parameters() if not name.startswith("critic")]
    starts = [0, *(x.dones[:, 0].nonzero()[:, 0] + 1).tolist()]
    assert len(starts) > 25
    logprobs, critic_params = distribution(agent, x.obs).log_prob(x.actions), list(agent.critic.parameters())
    for i, (inputs, outputs) in enumerate(((params, logprobs), (critic_params, values))):
        for start, end in pairwise(starts):
            total = (outputs[start:end] * advantages[start:end]).sum()
            grads = torch.autograd.grad(total, inputs, retain_graph=True)
            expected = torch.cat([grad.flatten() for grad in grads])
            close(-sum(iterations[t].gradients[i] for t in range(start, end)), expected)


CHANGES = [
    {}, {"critic_target": "bootstrap", "anneal_lr": False}, *({"num_steps": 8} | x for x in ESTIMATES[:4]),
    {"normalize_obs": True, "normalize_rewards": True, "normalize_advantages": True, "ent_coef": 0.1},
    {"shared_network": True, "vf_coef": 0.3, "ent_coef": 0.1, "max_grad_norm": 0.1}, ONLINE,
    *({"trace_decay": 0.9, "normalize_rewards": x, "normalize_obs": x, **ONLINE} for x in (False, True)),
]  # fmt: skip


@SPACES
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_run_can_be_retraced_by_a_second_road(space, changes):
    """Rollout by the policy as it is, critic steps on ever new targets, advantages, a step of the policy."""
    flags = {"num_envs": 2, "num_steps": 12, "critic_epochs": 3, "max_grad_norm": 0.3} | changes
    flags |= {"total_timesteps": 70 if changes.get("num_steps") == 1 else 200, "log_interval": 32}
    args, other, iterations, agent = real_run(space, checkpoint_every=32, **flags)
    traced, ended, restarts = args.trace_decay > 0, False, -1
    params = [x for name, x in other.named_parameters() if name[:6] != "critic" or args.shared_network]
    critic_params = list(other.critic.parameters())
    actor = torch.optim.Adam(params, eps=1e-5)
    critic = torch.optim.Adam(critic_params, args.critic_learning_rate, eps=1e-5)
    fits = 0 if traced or args.shared_network else args.critic_epochs
    traces, clipped = ([0.0] * len(params), [0.0] * len(critic_params)), 0

    def descend(optimizer, params, grads):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        optimizer.step()
        return norm.item()

    def arrays(rewards, x, y, *ends):
        values, next_values = (other.critic(z).squeeze(-1).detach() for z in (x, y))
        return [z.numpy() for z in (rewards, values, next_values, *ends)]

    def targets(batch):
        n, now = 1 if args.critic_target == "bootstrap" else 1000, arrays(*batch)
        return torch.from_numpy(now[1] + n_step_loop(*now, GAMMA, n))

    for k, iteration in enumerate(iterations):
        now = as_seen(args, other, iterations, k)
        x, actions, rewards, y, terminated, dones, *_, fresh = now
        pi, restarts = distribution(other, x), restarts + int(fresh.sum())
        batch = rewards, x, y, terminated, dones
        y_t = targets(batch).numpy()
        explained = 1 - np.var(y_t - arrays(*batch)[1]) / (np.var(y_t) + 1e-8)
        for _ in range(fits):
            loss = (other.critic(x).squeeze(-1) - targets(batch)).square().mean()
            descend(critic, critic_params, torch.autograd.grad(loss, critic_params))
        advantages = torch.from_numpy(by_loops(args, *arrays(*batch)))
        if args.normalize_advantages:
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
        close(iteration.batches[-1][0][2], advantages, 1e-6)
        done = k * args.num_steps * args.num_envs / args.total_timesteps
        actor.param_groups[0]["lr"] = rate = args.learning_rate * (1 - done * args.anneal_lr)
        close(iteration.rates, [rate, rate])
        logprobs, entropy, values = pi.log_prob(actions), pi.entropy().mean(), other.critic(x).squeeze(-1)
        policy_loss, value_loss = -(logprobs * advantages).mean(), (values - targets(batch)).square().mean()
        loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss * args.shared_network
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        if traced:
            decay = 0.0 if fresh or ended else GAMMA * args.trace_decay
            pairs = (logprobs, params), (values, critic_params)
            new = [torch.autograd.grad(output.sum(), inputs) for output, inputs in pairs]
            traces = [[decay * e + g for e, g in zip(*x, strict=True)] for x in zip(traces, new, strict=True)]
            grads, critic_grads = ([-advantages.item() * e for e in trace] for trace in traces)
            descend(critic, critic_params, critic_grads)
        norm = descend(actor, params, grads)
        clipped, ended = clipped + (norm > args.max_grad_norm), bool(dones.any())
        expected = policy_loss.item(), value_loss.item(), entropy.item(), norm, explained
        expected = dict(zip(actor_critic.METRICS, expected, strict=True))
        assert iteration.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    close(tuple(agent.parameters()), tuple(other.parameters()), 1e-6)
    assert min(clipped, restarts) > 0


def test_shared_network_and_shapes():
    for shared in (False, True):
        agent = new_agent(actor_critic, DISCRETE, shared_network=shared)
        pairs = zip(agent.actor.parameters(), agent.critic.parameters(), strict=True)
        assert [x is y for x, y in pairs] == [shared] * 4 + [False] * 2
    obs, actions, wrong = torch.randn(6, 4, 18).double(), torch.zeros(6, 4).long(), torch.zeros(6, 1).double()
    with pytest.raises(AssertionError):
        actor_critic.actor_loss(agent, obs, actions, wrong, 0.0)
    with pytest.raises(AssertionError):
        actor_critic.critic_loss(agent, obs, wrong)


def test_flags_that_would_do_nothing_are_refused():
    trace, shared = {"trace_decay": 0.5, **ONLINE}, {"shared_network": True}
    for bad in ({"num_envs": 2}, {"num_steps": 2}, {"trace_decay": 1.1}, shared, {"ent_coef": 0.1}):
        with pytest.raises(ValueError, match="--trace-decay"):
            actor_critic.Args(**trace | bad)
    with pytest.raises(ValueError, match="--normalize-advantages"):
        actor_critic.Args(normalize_advantages=True, **ONLINE)
    actor_critic.Args(**trace | {"trace_decay": 1.0})
