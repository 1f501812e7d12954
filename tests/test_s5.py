"""The resettable scan, the S5 layer, and the whole network as a sequence model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from s5_ppo_memory import S5, ActorCritic, Args, SequenceModel, hippo_normal, s5_scan

ARGS = Args(d_model=8, state_size=4, encoder_size=8, head_size=8)
T, N, O, A = 12, 3, 5, 2

draw_resets = st.one_of(st.just(np.zeros((T, N), bool)), st.just(np.ones((T, N), bool)), arrays(bool, (T, N)))
draw_seeds = st.integers(0, 2**31 - 1)


def complex_normal(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def scan_inputs(seed, t, n, p, dtype=np.complex64):
    rng = np.random.default_rng(seed)
    a_bar = rng.uniform(0.5, 1, p) * np.exp(1j * rng.uniform(-np.pi, np.pi, p))
    return tuple(x.astype(dtype) for x in (a_bar, complex_normal(rng, t, n, p), complex_normal(rng, n, p)))


# ---- the scan
def loop(a_bar, bu, reset, state):
    x = np.zeros(bu.shape, complex)
    for t in range(len(bu)):
        for n in range(bu.shape[1]):
            before = 0 if reset[t, n] else a_bar * (state[n] if t == 0 else x[t - 1, n])
            x[t, n] = before + bu[t, n]
    return x


def three_element_scan(a_bar, bu, reset, state):
    """The paper's operator on elements (a, b, c), c the reset; the stored state is one more element, the first."""

    def compose(i, j):
        (a_i, b_i, c_i), (a_j, b_j, c_j) = i, j
        keep = c_j == 0
        return jnp.where(keep, a_j * a_i, a_j), jnp.where(keep, a_j * b_i + b_j, b_j), jnp.where(keep, c_i, c_j)

    a = jnp.broadcast_to(a_bar, bu.shape)
    a = jnp.concatenate([jnp.ones_like(a[:1]), a])
    b = jnp.concatenate([state[None], bu])
    c = jnp.broadcast_to(reset[..., None], bu.shape)
    c = jnp.concatenate([jnp.zeros_like(c[:1]), c]).astype(int)
    return jax.lax.associative_scan(compose, (a, b, c))[1][1:]


@st.composite
def scan_problems(draw):
    t, n = draw(st.sampled_from((1, 2, 5, 40))), draw(st.sampled_from((1, 2, 3)))
    patterns = (np.zeros((t, n), bool), np.ones((t, n), bool), np.arange(t)[:, None] == np.zeros(n))
    reset = draw(st.one_of(*map(st.just, patterns), arrays(bool, (t, n))))
    return *scan_inputs(draw(draw_seeds), t, n, p=2), reset


jit_scan = jax.jit(s5_scan, static_argnums=4)
jit_three_element_scan = jax.jit(three_element_scan)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scan_problems())
def test_scan_is_the_recurrence_in_both_ways_and_in_chunks(problem):
    a_bar, bu, state, reset = problem
    expected = loop(a_bar, bu, reset, state)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(jit_three_element_scan(a_bar, bu, reset, state), expected)
    for parallel in (False, True):
        close(jit_scan(a_bar, bu, reset, state, parallel), expected)
        if cut := len(bu) // 3:
            first = jit_scan(a_bar, bu[:cut], reset[:cut], state, parallel)
            second = jit_scan(a_bar, bu[cut:], reset[cut:], first[-1], parallel)
            close(np.concatenate([first, second]), expected)


RESETS = {"none": [], "first": [0], "consecutive": [2, 3, 4], "last": [6], "all": range(7)}


@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("parallel", [False, True])
def test_scan_gradients_match_finite_differences(parallel, resets):
    with jax.enable_x64(True):
        a_bar, bu, state = scan_inputs(0, 7, 2, 3, np.complex128)
        reset = np.zeros((7, 2), bool)
        reset[list(RESETS[resets]), 0] = True
        rng = np.random.default_rng(1)
        weight, *direction = (rng.normal(size=x.shape) + 1j * rng.normal(size=x.shape) for x in (bu, a_bar, bu, state))
        loss = jax.jit(lambda inputs: (weight * s5_scan(*inputs[:2], reset, inputs[2], parallel)).real.sum())
        inputs = (a_bar, bu, state)
        ahead, behind = (loss([x + h * d for x, d in zip(inputs, direction, strict=True)]) for h in (1e-5, -1e-5))
        gradient = jax.grad(loss)(inputs)
        along = sum((g * d).real.sum() for g, d in zip(gradient, direction, strict=True))
        assert abs(along) > 0.1 and float(along) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-7)


# ---- the layer
def test_hippo_is_the_eigendecomposition_of_the_dense_normal_matrix():
    n = np.arange(16)
    legs = np.tril(-np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), k=-1) - np.diag(n + 1.0)
    low_rank = np.sqrt(n + 0.5)
    normal = legs + np.outer(low_rank, low_rank)
    values, vectors = hippo_normal(8)
    expected = np.linalg.eigvals(normal)
    expected = expected[expected.imag > 0]
    np.testing.assert_allclose(np.sort(values.imag), np.sort(expected.imag), atol=1e-10)
    np.testing.assert_allclose(values.real, -0.5, atol=1e-12)
    np.testing.assert_allclose(2 * ((vectors * values) @ vectors.conj().T).real, normal, atol=1e-10)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(8), atol=1e-12)


def layer(args):
    """An S5 layer as (params, state, u) -> last state; its parameters; and a_bar (P,), b_bar (P, D) as measured."""
    D, P = args.d_model, args.state_size
    module, zeros = S5(args), jnp.zeros((1, P), jnp.complex64)

    @jax.jit
    def last_state(params, state, u):
        return module.apply(params, state, u, jnp.zeros(u.shape[:2], bool))[0]

    params = jax.jit(module.init)(jax.random.key(0), zeros, jnp.zeros((1, 1, D)), jnp.zeros((1, 1), bool))
    a_bar = last_state(params, zeros + 1, jnp.zeros((1, 1, D)))[0]
    b_bar = last_state(params, jnp.zeros((D, P), jnp.complex64), jnp.eye(D)[None]).T
    return last_state, params, np.asarray(a_bar, complex), np.asarray(b_bar, complex)


def test_zero_order_hold_is_the_matrix_exponential():
    args = Args(d_model=2, state_size=3, dt_min=0.05, dt_max=0.5)
    _, params, a_unit, b_unit = layer(args)
    _, same_params, a_bar, b_bar = layer(replace(args, zoh=True))
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    p = {name: np.asarray(value, float) for name, value in params["params"].items()}
    lam = -np.exp(p["log_decay"]) + 1j * p["frequency"]
    b = b_unit / np.sqrt(1 - np.abs(a_unit) ** 2)[:, None]
    augmented = np.exp(p["log_dt"])[:, None] * np.hstack([np.diag(lam), b])
    augmented = scipy.linalg.expm(np.vstack([augmented, np.zeros((2, 5))]))
    np.testing.assert_allclose(a_bar, np.diag(augmented)[:3], atol=1e-6)
    np.testing.assert_allclose(b_bar, augmented[:3, 3:], atol=1e-6)


@pytest.mark.parametrize("zoh", [False, True])
def test_the_output_is_twice_the_real_part_of_c_x_plus_d_u(zoh):
    """Against the recurrence in float64 with the layer's own Λ, B, C, D and Δ."""
    args = Args(d_model=3, state_size=4, dt_min=0.05, dt_max=0.5, zoh=zoh)
    module, (t, n, D), P = S5(args), (7, 2, 3), 4
    rng = np.random.default_rng(0)
    u, state, reset = rng.normal(size=(t, n, D)), complex_normal(rng, n, P), rng.random((t, n)) < 0.3
    inputs = jnp.asarray(state, jnp.complex64), jnp.asarray(u, jnp.float32), reset
    params = module.init(jax.random.key(0), *inputs)
    p = {name: np.asarray(value, float) for name, value in params["params"].items()}
    B, C = p["B"][:, :P].T + 1j * p["B"][:, P:].T, p["C"][:P].T - 1j * p["C"][P:].T  # (P, D), (D, P)
    lam, dt = -np.exp(p["log_decay"]) + 1j * p["frequency"], np.exp(p["log_dt"])
    a_bar = np.exp(lam * dt)
    scale = (a_bar - 1) / lam if zoh else np.sqrt(1 - np.abs(a_bar) ** 2)
    x = loop(a_bar, u @ (scale[:, None] * B).T, reset, state)
    last, y = module.apply(params, *inputs)
    np.testing.assert_allclose(y, 2 * (x @ C.T).real + p["D"] * u, atol=1e-5)
    np.testing.assert_allclose(last, x[-1], atol=1e-5)


def test_the_layer_starts_at_hippo_with_time_steps_spread_over_their_range_by_logarithm():
    P, low, high = 256, 0.001, 0.1
    _, params, _, _ = layer(Args(d_model=2, state_size=P, dt_min=low, dt_max=high))
    p, (hippo, vectors) = params["params"], hippo_normal(P)
    np.testing.assert_allclose(-np.exp(p["log_decay"]) + 1j * p["frequency"], hippo, rtol=1e-5)
    dt = np.exp(p["log_dt"])
    assert low <= dt.min() < 1.1 * low and 0.9 * high < dt.max() <= high
    np.testing.assert_allclose(np.quantile(np.log(dt), (0.25, 0.5, 0.75)), np.log([0.00316, 0.01, 0.0316]), atol=0.3)
    # B is real in the basis in which HiPPO is dense: V B has no imaginary part but for the missing conjugates' half.
    b = p["B"][:, :P].T + 1j * p["B"][:, P:].T
    np.testing.assert_allclose(vectors.conj().T @ (2 * (vectors @ b).real), b, atol=1e-3)


@pytest.mark.parametrize(("device", "steps"), [("cpu", True), ("gpu", False)])
def test_the_device_picks_how_to_scan_and_both_ways_give_the_same(monkeypatch, device, steps):
    args, rng = Args(d_model=4, state_size=4), np.random.default_rng(0)
    inputs = jnp.zeros((2, 4), jnp.complex64), rng.normal(size=(9, 2, 4)).astype(np.float32), rng.random((9, 2)) < 0.3
    params = S5(args).init(jax.random.key(0), *inputs)
    expected = S5(args).apply(params, *inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    assert ("scan[" in str(jax.make_jaxpr(S5(args).apply)(params, *inputs))) == steps
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), S5(args).apply(params, *inputs), expected)


def test_white_noise_gives_the_states_unit_variance():
    D, P = 32, 16
    last_state, params, a_bar, b_bar = layer(Args(d_model=D, state_size=P, dt_min=0.01, dt_max=1.0))
    noise = jax.random.normal(jax.random.key(1), (600, 256, D))
    variance = (np.abs(last_state(params, jnp.zeros((256, P), jnp.complex64), noise)) ** 2).mean(0)
    np.testing.assert_allclose(variance, (np.abs(b_bar) ** 2).sum(1) / (1 - np.abs(a_bar) ** 2), rtol=0.35)
    assert variance.mean() == pytest.approx(1, abs=0.15)
    assert np.abs(np.corrcoef(np.log(1 - np.abs(a_bar)), variance)[0, 1]) < 0.7  # fast and slow states alike


@pytest.mark.parametrize("zoh", [False, True])
def test_no_gradient_step_makes_the_carry_grow_without_bound(zoh):
    args = Args(d_model=4, state_size=8, zoh=zoh)
    last_state, params, _, _ = layer(args)
    noise = jax.random.normal(jax.random.key(1), (64, 4, 4))
    zeros = jnp.zeros((4, 8), jnp.complex64)

    @jax.jit
    @jax.grad
    def growth(params):
        return -jnp.log(jnp.square(jnp.abs(last_state(params, zeros, noise))).sum())

    optimizer = optax.adam(0.5)
    opt_state = optimizer.init(params)
    for _ in range(20):  # far too large steps, towards the largest state
        updates, opt_state = optimizer.update(growth(params), opt_state)
        params = optax.apply_updates(params, updates)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    shaken = [x + 2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    noise = jax.random.normal(jax.random.key(3), (100_000, 1, 4))
    for candidate in (params, jax.tree.unflatten(treedef, shaken)):
        assert (-np.exp(candidate["params"]["log_decay"]) < 0).all()
        assert (np.abs(last_state(candidate, zeros + 1, jnp.zeros((1, 4, 4)))) < 1 + 1e-6).all()
        state = np.abs(last_state(candidate, zeros[:1] + 100, noise))
        assert (state < 1e8).all()  # had it grown by a thousandth a step, it would stand at 1e45


# ---- the whole network
@pytest.fixture(scope="module")
def network():
    """The network with parameters off their initial values, as jitted apply(carry, obs, reset)."""
    module = ActorCritic(ARGS, A)
    carry = SequenceModel(ARGS).initial_carry(N)
    params = jax.jit(module.init)(jax.random.key(0), carry, jnp.zeros((1, N, O)), jnp.zeros((1, N), bool))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.jit(partial(module.apply, jax.tree.unflatten(treedef, leaves)))


def network_inputs(seed):
    rng = np.random.default_rng(seed)
    carry = tuple(complex_normal(rng, N, ARGS.state_size).astype(np.complex64) for _ in range(ARGS.num_layers))
    return carry, rng.normal(size=(T, N, O)).astype(np.float32)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(reset=draw_resets, seed=draw_seeds)
def test_a_sequence_at_once_equals_its_steps_one_by_one(network, reset, seed):
    carry, obs = network_inputs(seed)
    last, logits, value = network(carry, obs, reset)
    for t in range(T):
        carry, step_logits, step_value = network(carry, obs[t : t + 1], reset[t : t + 1])
        np.testing.assert_allclose(step_logits[0], logits[t], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(step_value[0], value[t], atol=1e-4, rtol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), carry, last)


@pytest.mark.parametrize("at", [0, 1, 5, T - 1])
def test_nothing_before_a_reset_reaches_anything_after_it(network, at):
    carry, obs = network_inputs(0)
    reset = np.zeros((T, N), bool)
    reset[at, :2] = True  # the third environment goes on

    def later(carry, obs):
        last, logits, value = network(carry, obs, reset)
        return jnp.square(logits[at:]).sum() + jnp.square(value[at:]).sum() + sum(jnp.abs(x).sum() for x in last)

    carry_grad, obs_grad = jax.grad(later, (0, 1))(carry, obs)
    assert all((x[:2] == 0).all() and (x[2] != 0).all() for x in carry_grad)
    assert (obs_grad[:at, :2] == 0).all()
    assert (obs_grad[:at, 2] != 0).any(-1).all()
    assert (obs_grad[at:] != 0).any(-1).all()


def test_without_layers_an_output_depends_on_its_own_observation_alone():
    args = Args(num_layers=0, d_model=8, encoder_size=8, head_size=8)
    module, carry = ActorCritic(args, A), SequenceModel(args).initial_carry(N)
    _, obs = network_inputs(0)
    reset = np.zeros((T, N), bool)
    params = jax.jit(module.init)(jax.random.key(0), carry, obs, reset)
    assert carry == ()
    last, logits, value = module.apply(params, carry, obs, reset)
    _, backwards, _ = module.apply(params, carry, obs[::-1], reset)
    assert last == () and logits.shape == (T, N, A) and value.shape == (T, N)
    np.testing.assert_allclose(backwards[::-1], logits, atol=1e-6)
