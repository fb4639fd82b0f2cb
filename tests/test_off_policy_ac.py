"""Proves that each update of off_policy_ac.py is the off-policy gradient it claims to be, on the right data.

The expectations are exact: every transition of the MDP in tabular.py, with its probability under a behaviour
policy β, goes through the shipped losses; the gradients are compared with formulas from dynamic programming.
Those over a Box are integrated. Whole runs, also of ddpg.py, are taken a second time by plain PyTorch.
"""

import math
import tempfile
from copy import deepcopy
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_cuda import pretend_cuda
from tabular import CONTINUES, MDP, REWARD, TRANSITION, A, S, linear
from test_ddpg import _seeded, close, network, new_agent, same  # noqa: F401
from torch import nn
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution

import ddpg
import off_policy_ac
from off_policy_ac import exact_loss, expected_values, log_slope, policy_loss, q_loss, q_targets, score_loss

GAMMA = 0.8
TIMED = MDP(timed=True)  # there a critic for each (t, s) can be exact
THETA = torch.tensor([[0.5, -0.4], [-0.7, 0.6], [0.2, -0.9]], dtype=torch.float64).repeat(4, 1)
THETA = (THETA + torch.linspace(-0.6, 0.7, 24, dtype=torch.float64).reshape(12, 2)).requires_grad_()
PI, BETA = THETA.detach().softmax(-1), (0.9 * THETA.detach().flip(0, 1) + 0.2).softmax(-1)
TRUE_V, TRUE_Q = TIMED.values(PI, GAMMA)
OTHER_Q = TRUE_Q + torch.linspace(-2, 3, 18, dtype=torch.float64).sin().reshape(3, 3, 2)
BATCH = TIMED.batch()
ROWS, OBS, ACTIONS, REWARDS, NEXT_OBS, _, TERMINATED, _ = (x[BATCH.mask] for x in BATCH)  # all transitions
DISCOUNTS, NOISE = GAMMA * (1 - TERMINATED.double()), torch.zeros(1, 1, A)
NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()  # E f(ε) = Σ w f(node), ε ~ N(0, 1)
KINDS = ["q_loss", "resample", "importance", "reparameterized"]
SPIED = "q_loss", "policy_loss", "step", "add"


def table(q_values, beyond=0.0):
    """Q (3, S, A) as a table (12, A), with a row for each state that the time limit leaves."""
    return torch.cat([q_values.reshape(9, A), torch.full((3, A), beyond, dtype=torch.float64)])


def tabular_agent(q_values, target_q_values=OTHER_Q):
    agent = new_agent(off_policy_ac, 12, A, discrete=True)
    agent.actor, agent.critic = linear(THETA), linear(table(q_values))
    agent.target_critic = linear(table(target_q_values, 1.7))
    return agent


def expectation(beta, layer, loss):
    """Σ of the gradients of loss(one transition), each with its probability under β, (12, A)."""
    weights = TIMED.probabilities(beta).expand(len(BATCH.mask), -1)[BATCH.mask]
    losses = [loss(slice(i, i + 1))[0] for i in range(len(weights))]
    return sum(w * torch.autograd.grad(x, layer.weight)[0].T for w, x in zip(weights, losses, strict=True))


def expected_step(agent, actor_update, beta=BETA, behaviour=None):
    """What the shipped loss of the actor does on average to its logits."""
    columns = OBS, ACTIONS, (beta if behaviour is None else behaviour).log()[ROWS, ACTIONS]
    rest = NOISE, actor_update, 0.0
    return -expectation(beta, agent.actor, lambda i: policy_loss(agent, *(x[i] for x in columns), *rest))


def formula(beta, weights):
    """Σ_t Σ_s d^β_t(s) Σ_a ∇π(a|s) X_t(s, a), (12, A)."""
    return torch.autograd.grad(TIMED.surrogate(THETA.softmax(-1), TIMED.occupancy(beta), weights), THETA)[0]


@pytest.mark.parametrize("actor_update", ["resample", "importance"])
def test_the_expected_step_is_the_off_policy_gradient(actor_update):
    """Σ_t Σ_s d^β_t(s) Σ_a ∇π(a|s) Q(s, a), the theorem of Degris et al., for Q^π and a critic that errs."""
    for q_values in (TRUE_Q, OTHER_Q):
        gradient = expected_step(tabular_agent(q_values), actor_update)
        close(gradient, formula(BETA, q_values))
        assert gradient.norm() > 0.3
        assert (gradient - formula(PI, q_values)).norm() > 0.05  # the states are those of β
    (expected,) = torch.autograd.grad(TIMED.objective(THETA.softmax(-1), 1.0), THETA)
    agent = tabular_agent(TIMED.values(PI, 1.0)[1])
    close(expected_step(agent, actor_update, beta=PI), expected)  # β = π: the gradient of J itself


def test_the_naive_actor_is_wrong_by_this_much():
    """The stored action without a weight: Σ d^β Σ_a β ∇log π A, so Σ d^β Σ_a (β − π) ∇log π A too much."""
    agent = tabular_agent(TRUE_Q)
    naive, right = (expected_step(agent, "importance", behaviour=x) for x in (PI, BETA))
    advantages, logprobs = TRUE_Q - TRUE_V[:3].unsqueeze(-1), THETA.log_softmax(-1)[:9].reshape(3, S, A)
    excess = TIMED.occupancy(BETA).unsqueeze(-1) * (BETA - PI)[:9].reshape(3, S, A) * advantages * logprobs
    close(naive - right, torch.autograd.grad(excess.sum(), THETA)[0])
    assert (naive - right).norm() > 0.3 * right.norm()


def test_the_naive_critic_learns_the_value_of_another_policy():
    """E_β[r + γ V(s') | s] has V^β as its fixed point, not V^π; E_β[r + γ E_π Q(s', ·) | s, a] has Q^π."""
    beta_v, visited = TIMED.values(BETA, GAMMA)[0], TIMED.occupancy(BETA).flatten() > 0
    weights = TIMED.probabilities(BETA).expand(len(BATCH.mask), -1)[BATCH.mask]
    for rows, values, fixed in ((ROWS, beta_v, beta_v[:3]), (A * ROWS + ACTIONS, TRUE_V, TRUE_Q)):
        targets = q_targets(REWARDS, DISCOUNTS, NEXT_OBS @ values.flatten())
        sums = torch.zeros(2, 18).double().index_add(1, rows, torch.stack([weights * targets, weights]))
        means = (sums[0] / sums[1])[: fixed.numel()].reshape(9, -1)
        close(means[visited], fixed.reshape(9, -1)[visited])
    assert (beta_v - TRUE_V)[:3].abs().max() > 0.3
    with pytest.raises(AssertionError):
        q_targets(REWARDS, DISCOUNTS, REWARDS.unsqueeze(-1))


def test_the_expected_step_of_the_critic():
    """2 Σ d^β β (Q − T^π Q') at each (t, s, a): Q' is 0 after termination and itself after the time limit."""
    agent, columns = tabular_agent(TRUE_Q), (OBS, ACTIONS, REWARDS, NEXT_OBS, DISCOUNTS)
    loss = lambda i: q_loss(agent, *(x[i] for x in columns), NOISE)  # noqa: E731
    gradient = expectation(BETA, agent.critic, loss)
    next_values = (PI * table(OTHER_Q, 1.7)).sum(-1).reshape(4, S)[1:]
    backup = (TRANSITION * REWARD).sum(-1) + GAMMA * torch.einsum("san,tn->tsa", CONTINUES, next_values)
    weights = TIMED.occupancy(BETA).unsqueeze(-1) * BETA[:9].reshape(3, S, A)
    close(gradient[:9], (2 * weights * (TRUE_Q - backup)).reshape(9, A))
    assert gradient.norm() > 0.5


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_exact_loss_is_what_score_loss_expects(draws):
    """Over all tuples of so many actions, each with its probability: the baselines leave it unbiased."""
    theta, q_values = torch.randn(1, 3).double().requires_grad_(), 5 + torch.randn(1, 3).double()
    logprobs, total = theta.log_softmax(-1), 0.0
    for chosen in product(range(3), repeat=draws):
        loss = score_loss(logprobs[:, chosen].T, q_values[:, chosen].T)
        probability = logprobs[0, chosen].sum().exp().detach()
        total = total + probability * torch.autograd.grad(loss, theta, retain_graph=True)[0]
    close(total, torch.autograd.grad(exact_loss(logprobs, q_values), theta)[0])


def bowl():
    """Q(s, a) = sin(2 a) s − (a − 0.3)²: minus the gradient of the shipped loss for a state, and E_π's."""
    agent, obs = new_agent(off_policy_ac, 1, 1), torch.tensor([[0.8]]).double()
    q = network(lambda x: (2 * x[..., 1:]).sin() * x[..., :1] - (x[..., 1:] - 0.3) ** 2)
    agent.actor, agent.critic = nn.Linear(1, 2).double(), q
    agent.actor.weight.data, agent.actor.bias.data = obs.new([[0.7], [-0.1]]), obs.new([0.2, -1.0])

    def step(noise, actor_update, u=0.0, behaviour_logprob=0.0):
        batch = (obs, obs.new([[u]]), obs.new([behaviour_logprob]), obs.new(noise).reshape(-1, 1, 1))
        loss, _ = policy_loss(agent, *batch, actor_update, 0.0)
        return -torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(agent.actor.parameters()))])

    mean, log_std = agent.actor(obs)[0]
    actions = (mean + log_std.exp() * NODES).tanh().unsqueeze(-1)
    value = WEIGHTS @ q(torch.cat([obs.expand(80, 1), actions], -1))[:, 0]
    close(WEIGHTS @ expected_values(agent, q, obs.expand(80, 1), NODES.reshape(1, 80, 1)), value)
    return step, torch.cat([x.flatten() for x in torch.autograd.grad(value, list(agent.actor.parameters()))])


def test_all_actor_updates_give_the_gradient_of_the_expectation():
    """By dQ/da; the score; that of two draws, each the other's baseline; stored u ~ β, whatever V draws."""
    (step, gradient), variances, beta = bowl(), [], Normal(0.9, 0.6)
    pairs = [(float(x), float(w)) for x, w in zip(NODES, WEIGHTS, strict=True) if w > 1e-10]
    slopes = [(step([x], "reparameterized"), w) for x, w in pairs]
    ones = [(step([x], "resample"), w) for x, w in pairs]
    twos = [(step([x, y], "resample"), v * w) for x, v in pairs for y, w in pairs]
    us = [(torch.tensor(0.9 + 0.6 * x), w) for x, w in pairs]
    stored = [(step([0.4, -1.1], "importance", float(u), float(beta.log_prob(u))), w) for u, w in us]
    for draws in (slopes, ones, twos, stored):
        mean = sum(w * x for x, w in draws)
        close(mean, gradient, 1e-7)
        variances.append(float(sum(w * (x - mean).square().sum() for x, w in draws)))
    assert variances[2] < 0.5 * variances[1]
    assert gradient.norm() > 0.3


def test_the_density_of_squashed_actions():
    agent, obs = new_agent(off_policy_ac, 3, 2), torch.randn(40, 3).double()
    mean, log_std = agent.actor(obs).detach().chunk(2, -1)
    assert (log_std.abs() < 2).all()
    u = mean + log_std.exp() * torch.randn(40, 2).double()
    close(agent.logprobs(obs, u), Independent(Normal(mean, log_std.exp()), 1).log_prob(u))
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    close(agent.logprobs(obs, u) - log_slope(u), squashed.log_prob(u.tanh()).sum(-1), 1e-6)
    a = torch.linspace(-1, 1, 200_001).double()[1:-1].unsqueeze(-1)
    logprobs = new_agent(off_policy_ac, 1, 1).logprobs(torch.full_like(a, 0.7), a.atanh())
    close((logprobs - log_slope(a.atanh())).exp().sum() * 1e-5, 1, 1e-6)
    far = torch.tensor([[12.0], [-30.0]])  # tanh is ±1 in float32
    close(log_slope(far), 2 * (math.log(2) - far.abs().double()).squeeze(-1), 1e-5)


def test_acting_draws_from_the_policy_and_sigma_is_limited():
    agent, obs = new_agent(off_policy_ac, 3, 4, discrete=True), torch.tensor([[0.3, -1.0, 0.5]])
    probs, act = agent.actor(obs.double()).softmax(-1)[0].detach(), agent.in_numpy()
    draws = act(obs.numpy().repeat(40_000, 0), agent.noise(40_000))
    close(np.bincount(draws, minlength=4) / 40_000, probs, 0.01)
    assert act(obs.numpy(), 0).tolist() == [int(probs.argmax())]
    noise = agent.noise(100)
    assert torch.equal(agent.act(obs.double(), torch.from_numpy(noise)), torch.from_numpy(act(obs.numpy(), noise)))
    agent, obs = new_agent(off_policy_ac, 3, 2, normalize_obs=True), 20 * torch.randn(20_000, 3)
    agent.obs_norm.update(torch.randn(30, 3) + 2)
    noise = agent.noise(20_000)
    close(np.vstack([noise.mean(0), np.cov(noise.T)]), [[0, 0], [1, 0], [0, 1]], 0.04)
    out = agent.actor(((obs - agent.obs_norm.mean) * agent.obs_norm.scale).clip(-10, 10)).detach()
    u = out[:, :2] + out[:, 2:].exp().clip(math.exp(-20), math.exp(2)) * torch.from_numpy(noise)
    close(agent.in_numpy()(obs.numpy(), noise), u.tanh(), 1e-4)
    close(agent.act(obs, torch.from_numpy(noise)), u, 1e-4)
    for log_std, limit in ((9.0, 2), (-30.0, -20)):
        agent, one = new_agent(off_policy_ac, 1, 1, spread=0, log_std_init=log_std), torch.ones(1, 1).double()
        agent.actor[4].weight.data.zero_()
        u = math.exp(limit) * one
        close(agent.logprobs(one, u), Normal(0 * one, u).log_prob(u)[0], 1e-9)
        close(agent.in_numpy(squash=False)(one.numpy(), 1.0), [[math.exp(limit)]], 1e-12)
    first = new_agent(off_policy_ac, 3, 4, True, spread=0, hidden_size=64)
    close(first.distribution(torch.randn(500, 3).double())[0].exp(), torch.full((500, 4), 0.25), 0.02)
    for name, x in first.critic.state_dict().items():
        assert torch.equal(x, first.target_critic.state_dict()[name])


def reference(agent, kind, s, a, rest, noise):
    """The loss of one transition, and the entropy at s, in the words of torch.distributions."""
    q = lambda net, s, a: net(s)[a] if agent.discrete else net(torch.cat([s, a.tanh()]))[0]  # noqa: E731

    def policy(s, net):
        """π(·|s); its actions: all, or fresh ones; their weights in an expectation; and their Q."""
        out = agent.actor(s)
        pi = Categorical(logits=out) if agent.discrete else Independent(Normal(out[:2], out[2:].exp()), 1)
        actions = torch.arange(2) if agent.discrete else out[:2] + out[2:].exp() * noise
        weights = pi.probs if agent.discrete else torch.full((4,), 0.25)
        return pi, actions, weights, torch.stack([q(net, s, x) for x in actions])

    pi, fresh, weights, q_values = policy(s, agent.critic)
    slopes = 0 if agent.discrete else (1 - fresh.tanh() ** 2).log().sum(-1)
    entropy = (weights * (slopes - pi.log_prob(fresh))).sum()
    if kind == "q_loss":
        rewards, next_obs, terminated = rest
        _, _, weights, future = policy(next_obs, agent.target_critic)
        y = rewards + (0 if terminated else GAMMA * (weights * future).sum())
        return (q(agent.critic, s, a) - y.detach()) ** 2, entropy
    value, others = (weights * q_values).sum(), (q_values.sum() - q_values) / 3  # the mean of the other draws
    if kind == "importance":
        return -(pi.log_prob(a) - rest).exp() * (q(agent.critic, s, a) - value).detach(), entropy
    if kind == "resample" and not agent.discrete:
        return -(pi.log_prob(fresh.detach()) * (q_values - others).detach()).mean(), entropy
    return -value, entropy


@pytest.mark.parametrize(("discrete", "kind"), [*product([True], KINDS[:3]), *product([False], KINDS)])
def test_losses_against_torch_distributions_row_by_row(discrete, kind):
    """And none trains another's network; dQ/da runs through the critic; train() takes the actor's part."""
    agent, noise = new_agent(off_policy_ac, 2, 2, discrete, normalize_obs=True), torch.randn(4, 6, 2).double()
    agent.obs_norm.update(torch.randn(20, 2) + 1)
    (obs, next_obs, actions), (rewards, behaviour) = torch.randn(3, 6, 2).double(), torch.randn(2, 6).double()
    actions, terminated = actions[:, 0].gt(0).long() if discrete else actions, torch.arange(6).double() % 2
    s, after, losses = agent.obs_norm(obs), agent.obs_norm(next_obs), []
    for i in range(6):
        rest = (rewards[i], after[i], terminated[i]) if kind == "q_loss" else behaviour[i]
        losses.append(torch.stack(reference(agent, kind, s[i], actions[i], rest, noise[:, i])))
    expected, entropy = torch.stack(losses).mean(0)
    if kind == "q_loss":
        loss, metrics = q_loss(agent, obs, actions, rewards, next_obs, GAMMA * (1 - terminated), noise)
        same(agent, "critic", loss, expected)
        close(metrics[0], expected)
    else:
        loss, metrics = policy_loss(agent, obs, actions, behaviour, noise, kind, 0.3)
        reached = "critic" if kind == "reparameterized" else ()
        same(agent, "actor", loss, expected - 0.3 * entropy, reached)
        close(torch.stack(metrics), torch.stack([expected, entropy]))


def run(script, **flags):
    """A run of train() in float64: its flags, first and last agent, calls in order, checkpoint, metrics."""
    calls, agents = [], []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:

        def spy(owner, name, change=lambda x: x):
            call = getattr(owner, name)

            def spied(*given):
                before = getattr(given[0], "obs", None)
                calls.append((name, given, result := change(call(*given)), before))
                return result

            patch.setattr(owner, name, spied)

        spy(*((script, "next_noise") if script is ddpg else (script.Agent, "noise")))
        for owner, name in zip((script, script, script.Envs, script.ReplayBuffer), SPIED, strict=True):
            spy(owner, name)
        spy(script.ReplayBuffer, "batch", lambda columns: [x.double() for x in columns])
        spy(script, "Agent", lambda agent: agents.extend([deepcopy(agent.double()), agent]) or agent)
        patch.setattr(torch, "compile", lambda function: function)
        small = {"env_id": "Both-v0", "num_envs": 2, "hidden_size": 5, "batch_size": 7, "learning_starts": 10}
        small |= {"total_timesteps": 40, "num_updates": 2, "eval_episodes": 0, "log_interval": 1, "tau": 0.3}
        small |= {"learning_rate": 3e-3, "q_learning_rate": 5e-3, "max_grad_norm": 1.5, "gamma": GAMMA}
        small |= {"checkpoint_every": 0, "device": "cpu"}
        args = script.Args(run_dir=directory, **small | flags)
        metrics = script.train(args)
        saved = torch.load(Path(directory) / "checkpoint.pt", weights_only=True)
    return args, *agents, calls[1:], saved, metrics


def second_road(script, args, agent, calls):
    """What the run must have come to, by plain loops and torch.optim; and its metrics, update by update."""
    N, metrics, last, first = args.num_envs, [], 0 * torch.as_tensor(calls[0][2]), np.True_
    adams = {name: torch.optim.Adam(getattr(agent, name).parameters()) for name in ("critic", "actor")}
    every, return_norm = args.checkpoint_every or 1000, script.RunningNorm()
    turns = [k for k, call in enumerate(calls) if call[0].endswith("noise")] + [len(calls)]
    for t, (begin, end) in enumerate(pairwise(turns)):
        (_, given, noise, _), (_, (_, actions), step, obs), (_, (_, *added), *_), *updates = calls[begin:end]
        turn = args.num_updates if N * (t + 1) >= args.learning_starts else 0
        update = ["batch", "q_loss", "policy_loss"] * turn
        assert [name for name, *_ in calls[begin + 1 : end]] == ["step", "add", *update]
        rewards, next_obs, terminated = step[:3]
        assert all(map(np.array_equal, (added[0], *added[-3:]), (obs, rewards, next_obs, GAMMA * ~terminated)))
        x, taken = torch.from_numpy(obs), torch.as_tensor(added[1])
        if script is ddpg:
            assert (given[1] == first).all()
            assert given[3:] == (args.exploration_noise, args.noise_correlation)
            close(given[0], last)
            policy, got, last = agent.act(x, torch.from_numpy(noise)), taken, noise
        elif agent.discrete:
            policy, got = (agent.distribution(x)[0] + torch.from_numpy(noise)).argmax(-1), taken
        else:
            mean, log_std = agent.distribution(x)
            policy, got = mean + log_std.exp() * torch.from_numpy(noise), taken.tanh()
        close(actions, got, 1e-6)
        if script is off_policy_ac or N * t >= args.learning_starts:
            close(taken, policy, 1e-5)
        if script is off_policy_ac:
            close(added[2], agent.logprobs(x, taken) * (args.actor_update == "importance"), 1e-5)
        first = step[3] | (N * (t + 1) // every > N * t // every)
        left = 1 - args.anneal_lr * N * t / args.total_timesteps
        agent.obs_norm.update(x, left)
        if args.normalize_rewards:
            return_norm.update(torch.from_numpy(step[4]))
        rates = left * args.q_learning_rate, left * args.learning_rate
        for k in range(0, len(updates), 3):
            columns, moments = updates[k][2], []
            columns[-3] = columns[-3] * return_norm.scale
            for (kind, given, _, _), name, rate in zip(updates[k + 1 : k + 3], adams, rates, strict=True):
                wanted = columns[:3] if name == "actor" else [*columns[:2], *columns[-3:]]
                for one, other in zip([x for x in given if torch.is_tensor(x)], wanted, strict=False):
                    close(one, other.view(one.shape), 1e-6)
                loss, logged = getattr(script, kind)(agent, *given[1:])
                params = list(getattr(agent, name).parameters())
                adams[name].zero_grad()
                loss.backward(inputs=params)
                moments += [*logged, nn.utils.clip_grad_norm_(params, args.max_grad_norm)]
                adams[name].param_groups[0]["lr"] = rate
                adams[name].step()
            metrics.append([float(x.detach()) for x in moments])
            for name, param in agent.named_parameters():
                if name.startswith("target_"):
                    online = agent.get_parameter(name.removeprefix("target_"))
                    param.data = ((1 - args.tau) * param + args.tau * online).detach()
    return return_norm, metrics, left * args.learning_rate


def test_the_first_actions_of_ddpg_are_uniform():
    calls = run(ddpg, learning_starts=800, total_timesteps=800)[3]
    actions = np.concatenate([given[2] for name, given, *_ in calls if name == "add"])
    shares = [np.histogram(column, 4, (-1, 1))[0] / 800 for column in actions.T]
    close(shares, np.full((2, 4), 0.25), 0.06)
    close(np.corrcoef(actions.T), np.eye(2), 0.12)


@pytest.mark.parametrize("script", [ddpg, off_policy_ac])
def test_rows_of_several_rewards(script):
    """Three, or what is left of an episode; a row whose rewards a checkpoint cuts off is never stored."""
    flags = {"lookahead": 3, "checkpoint_every": 14, "learning_starts": 900, "total_timesteps": 240}
    *_, calls, saved, _ = run(script, **flags)
    steps, expected = [(obs, *step) for name, _, step, obs in calls if name == "step"], []
    for i in range(2):
        episode = []
        for t, (obs, rewards, next_obs, terminated, dones, _) in enumerate(steps, 1):
            episode.append((obs[i], float(rewards[i]), next_obs[i], GAMMA * (1 - terminated[i])))
            if dones[i] or t % 7 == 0:
                for k in range(len(episode) if dones[i] else len(episode) - 2):
                    some = episode[k : k + 3]
                    total = some[0][1] + GAMMA * sum(x[1] for x in some[1:2]) + GAMMA**2 * sum(x[1] for x in some[2:])
                    expected.append([*some[0][0], total, *some[-1][2], GAMMA ** (len(some) - 1) * some[-1][3]])
                episode = []
    assert len({row[-1] for row in expected}) == 4  # 0, γ, γ², γ³
    assert len(expected) < 240
    width, rows = len(obs[0]), saved["buffer"]["rows"].tolist()
    stored = [[*row[:width], *row[-width - 2 :]] for row in rows]
    close(sorted(stored), sorted(expected), 1e-5)


GRAPHS = [(ddpg, "Both-v0", 3e-3), (off_policy_ac, "Both-v0", 0.0), (off_policy_ac, "Tabular-v0", 3e-3)]


@pytest.mark.parametrize(("script", "env_id", "rate"), GRAPHS, ids=str)
def test_a_replayed_cuda_graph_does_what_the_program_says(script, env_id, rate, tmp_path, monkeypatch):
    """Each update and each action, with rates that fall, statistics that move, and a checkpoint between."""
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **more: make(data, **more).to(device))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    small = {"env_id": env_id, "learning_starts": 10, "total_timesteps": 60, "hidden_size": 5, "batch_size": 7}
    small |= {"learning_rate": rate, "checkpoint_every": 24, "num_envs": 2, "eval_episodes": 0, "compile": True}
    metrics = script.train(script.Args(run_dir=f"{tmp_path}/cpu", device="cpu", **small))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pretend_cuda() as gpu:
        graph_metrics = script.train(script.Args(run_dir=f"{tmp_path}/gpu", device="cuda", **small))
    close(*([x[tag] for tag in script.METRICS] for x in (graph_metrics, metrics)), 1e-4)
    assert len(gpu.graphs) == 2  # of the update and of acting
    cpu, gpu = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("cpu", "gpu"))
    for name, x in (cpu["agent"] | cpu["buffer"] | cpu["return_norm"]).items():
        close((gpu["agent"] | gpu["buffer"] | gpu["return_norm"])[name], x, 1e-5)


RUNS = [
    (off_policy_ac, {"env_id": "Tabular-v0", "normalize_rewards": False, "checkpoint_every": 12}),
    (off_policy_ac, {"env_id": "Tabular-v0", "actor_update": "importance", "anneal_lr": False}),
    (off_policy_ac, {"num_updates": 1}),
    (off_policy_ac, {"actor_update": "importance"}),
    (off_policy_ac, {"actor_update": "reparameterized", "num_samples": 1, "num_envs": 3}),
    (ddpg, {"checkpoint_every": 12, "noise_correlation": 0.7, "buffer_size": 9}),
    (ddpg, {"normalize_rewards": False, "num_updates": 1}),
    (ddpg, {"anneal_lr": False, "num_envs": 1}),
    *((script, {"compile": True}) for script in (ddpg, off_policy_ac)),
]


@pytest.mark.parametrize(("script", "flags"), RUNS, ids=str)
def test_a_run_can_be_taken_by_a_second_road(script, flags):
    """Each update on what was drawn, each draw on what happened; critic first; no network shares storage."""
    more = {"exploration_noise": 0.4} if script is ddpg else {"ent_coef": 0.1}
    args, agent, last, calls, saved, metrics = run(script, **more | flags)
    return_norm, expected, learning_rate = second_road(script, args, agent, calls)
    for key, state in (("agent", agent.state_dict()), ("return_norm", return_norm.state_dict())):
        for name, x in state.items():
            close(saved[key][name], x, 1e-6)
    assert len({x.data_ptr() for x in last.parameters()}) == len(list(last.parameters()))
    entropy = [] if script is ddpg else ["entropy"]
    tags = ["q_loss", "q_values", "q_grad_norm", "policy_loss", *entropy, "grad_norm"]
    close([metrics[f"losses/{tag}"] for tag in tags], np.mean(expected[-args.num_updates :], 0), 1e-6)
    close(metrics["charts/learning_rate"], learning_rate)
    norms = [norm for x in expected for norm in (x[2], x[-1])]
    assert min(norms) < 1.5 < max(norms)
    if script is off_policy_ac:
        draws = [torch.stack([x[1][6], then[1][4]]) for x, then in pairwise(calls) if x[0] == "q_loss"]
        assert draws[0].shape == (2, args.num_samples, 7, 2)
        close(torch.cov(torch.stack(draws, 1).flatten(1)), torch.eye(2), 0.2)  # other actions in each loss
