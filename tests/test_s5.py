"""The resettable scan, and the S5 layer."""

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

from s5_ppo_memory import S5, Args, hippo_normal, s5_scan

DEVICES = ("cpu", "gpu")  # step by step, or in parallel


def complex_normal(rng, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


# ---- the scan
def loop(a_bar, bu, reset, state):
    x = np.zeros(bu.shape, complex)
    for t in range(len(bu)):
        before = state if t == 0 else x[t - 1]
        x[t] = np.where(reset[t][:, None], 0, a_bar * before) + bu[t]
    return x


def three_element_scan(a_bar, bu, reset, state):
    """The paper's operator on elements (a, b, c), c the reset; the stored state is the first."""

    def compose(i, j):
        (a_i, b_i, c_i), (a_j, b_j, c_j) = i, j
        keep = c_j == 0
        a, b = jnp.where(keep, a_j * a_i, a_j), jnp.where(keep, a_j * b_i + b_j, b_j)
        return a, b, jnp.where(keep, c_i, c_j)

    a = jnp.broadcast_to(a_bar, bu.shape)
    a = jnp.concatenate([jnp.ones_like(a[:1]), a])
    b = jnp.concatenate([state[None], bu])
    c = jnp.broadcast_to(reset[..., None], bu.shape)
    c = jnp.concatenate([jnp.zeros_like(c[:1]), c]).astype(int)
    return jax.lax.associative_scan(compose, (a, b, c))[1][1:]


def states_and_gradients(scan):
    """Jitted: the states, and the gradients of a sum of them weighted by `weight` (T, N, P)."""

    def loss(a_bar, bu, state, reset, weight):
        x = scan(a_bar, bu, reset, state)
        return (weight * x).real.sum(), x

    def both(*inputs):
        (_, x), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return x, gradients

    return jax.jit(both)


@pytest.fixture(scope="module")
def scans():
    """states_and_gradients of the oracle and, by device, of s5_scan."""
    on = {device: states_and_gradients(partial(s5_scan)) for device in DEVICES}

    def run(device, *inputs):
        with pytest.MonkeyPatch.context() as patch:  # which matters when it is traced
            patch.setattr(jax, "default_backend", lambda: device)
            return on[device](*inputs)

    return states_and_gradients(three_element_scan), run


@st.composite
def scan_problems(draw):
    t, n, p = draw(st.sampled_from((1, 9))), 2, 3
    patterns = (np.zeros((t, n), bool), np.ones((t, n), bool), np.arange(t)[:, None] == np.zeros(n))
    reset = draw(st.one_of(*map(st.just, patterns), arrays(bool, (t, n))))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    a_bar = rng.uniform(0.5, 1, p) * np.exp(1j * rng.uniform(-np.pi, np.pi, p))
    bu, state, weight = (complex_normal(rng, *shape) for shape in ((t, n, p), (n, p), (t, n, p)))
    return a_bar.astype(np.complex64), bu, state, reset, weight


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scan_problems())
def test_scan_and_its_gradients_are_those_of_the_papers_operator_in_both_forms(scans, problem):
    a_bar, bu, state, reset, _ = problem
    oracle, run = scans
    close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    expected = oracle(*problem)
    close(expected[0], loop(a_bar, bu, reset, state))
    for device in DEVICES:
        jax.tree.map(close, run(device, *problem), expected)
    # Nothing from before a reset has a gradient, in either.
    first_reset = reset.argmax(0)
    for device in DEVICES:
        _, (_, of_bu, of_state) = run(device, *problem)
        assert (of_state[reset[0]] == 0).all() and (np.abs(of_bu[-1]) > 0).all()
        assert (np.abs(of_state[first_reset > 0]) > 0).all()


def test_the_device_picks_how_to_scan(scans):
    inputs = np.ones(3, np.complex64), np.ones((9, 2, 3), np.complex64), np.ones((9, 2), bool)
    for device, steps in zip(DEVICES, (True, False), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda device=device: device)
            jaxpr = str(jax.make_jaxpr(partial(s5_scan))(*inputs, np.ones((2, 3), np.complex64)))
        assert ("scan[" in jaxpr) == steps


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
    """An S5 layer's apply and parameters, and these in float64: Lambda, B, C, D, dt, a_bar."""
    D, P = args.d_model, args.state_size
    inputs = jnp.zeros((1, P), jnp.complex64), jnp.zeros((1, 1, D)), jnp.zeros((1, 1), bool)
    params = jax.jit(S5(args).init)(jax.random.PRNGKey(0), *inputs)
    return jax.jit(S5(args).apply), params, *constants(params)


def constants(params):
    p = {name: np.asarray(value, float) for name, value in params["params"].items()}
    P = len(p["log_dt"])
    B, C = p["B"][:, :P].T + 1j * p["B"][:, P:].T, p["C"][:P].T - 1j * p["C"][P:].T
    lam, dt = -np.exp(p["log_decay"]) + 1j * p["frequency"], np.exp(p["log_dt"])
    return lam, B, C, p["D"], dt, np.exp(lam * dt)


@pytest.mark.parametrize("zoh", [False, True])
def test_the_layer_is_its_equations_and_zero_order_hold_is_the_matrix_exponential(zoh):
    """Against the recurrence in float64 with the layer's own Lambda, B, C, D and dt."""
    args = Args(d_model=3, state_size=4, dt_min=0.05, dt_max=0.5, zoh=zoh)
    apply, params, lam, B, C, D, dt, a_bar = layer(args)
    if zoh:
        augmented = dt[:, None] * np.hstack([np.diag(lam), B])  # each row with its own dt
        augmented = scipy.linalg.expm(np.vstack([augmented, np.zeros((3, 7))]))
        np.testing.assert_allclose(np.diag(augmented)[:4], a_bar)
        b_bar = augmented[:4, 4:]
    else:
        b_bar = np.sqrt(1 - np.abs(a_bar) ** 2)[:, None] * B
    rng = np.random.default_rng(0)
    u, state, reset = (
        rng.normal(size=(7, 2, 3)),
        complex_normal(rng, 2, 4),
        rng.random((7, 2)) < 0.3,
    )
    x = loop(a_bar, u @ b_bar.T, reset, state)
    last, y = apply(params, state, u.astype(np.float32), reset)
    np.testing.assert_allclose(y, 2 * (x @ C.T).real + D * u, atol=1e-5)
    np.testing.assert_allclose(last, x[-1], atol=1e-5)
    other = jax.jit(S5(replace(args, zoh=not zoh)).init)(jax.random.PRNGKey(0), state, u, reset)
    jax.tree.map(np.testing.assert_array_equal, params, other)


def test_the_layer_starts_at_hippo_with_time_steps_spread_over_their_range_by_logarithm():
    P, low, high = 256, 0.001, 0.1
    args = Args(d_model=2, state_size=P, dt_min=low, dt_max=high, dt_slow=0, frequency_scale=0.5)
    _, _, lam, B, _, _, dt, _ = layer(args)
    hippo, vectors = hippo_normal(P)
    np.testing.assert_allclose(lam, hippo.real + 0.5j * hippo.imag, rtol=1e-5)
    assert low <= dt.min() < 1.1 * low and 0.9 * high < dt.max() <= high
    quartiles = np.quantile(np.log(dt), (0.25, 0.5, 0.75))
    np.testing.assert_allclose(quartiles, np.log([0.00316, 0.01, 0.0316]), atol=0.3)
    *_, dt, _ = layer(replace(args, dt_slow=1e-5))
    np.testing.assert_allclose(dt[::2], 1e-5, rtol=1e-4)
    assert low <= dt[1::2].min() < 1.1 * low and 0.9 * high < dt[1::2].max() <= high
    # B is real in the basis in which HiPPO is dense, but for the conjugates' half.
    np.testing.assert_allclose(vectors.conj().T @ (2 * (vectors @ B).real), B, atol=1e-3)


def test_white_noise_gives_the_states_unit_variance():
    D, P = 32, 16
    args = Args(d_model=D, state_size=P, dt_slow=0, dt_min=0.02, dt_max=1.0)
    apply, params, *_, a_bar = layer(args)
    noise = jax.random.normal(jax.random.PRNGKey(1), (300, 256, D))
    last, _ = apply(params, jnp.zeros((256, P), jnp.complex64), noise, np.zeros((300, 256), bool))
    variance = (np.abs(last) ** 2).mean(0)
    assert variance.mean() == pytest.approx(1, abs=0.15)
    slowness = np.log(1 - np.abs(a_bar))
    assert np.abs(np.corrcoef(slowness, variance)[0, 1]) < 0.7  # fast and slow states alike


def test_no_gradient_step_makes_the_carry_grow_without_bound():
    """|a_bar| < 1 whatever the parameters; no state grows, even by float32's rounding."""
    args = Args(d_model=4, state_size=8)
    apply, params, *_ = layer(args)
    noise, zeros = jax.random.normal(jax.random.PRNGKey(1), (64, 4, 4)), jnp.zeros((4, 8), complex)
    no_reset, optimizer = np.zeros((64, 4), bool), optax.adam(0.5)

    def growth(params):
        return -jnp.log(jnp.square(jnp.abs(apply(params, zeros, noise, no_reset)[0])).sum())

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(growth)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, grown = optimizer.init(params), params
    for _ in range(20):  # far too large steps, towards the largest state
        grown, opt_state = step(grown, opt_state)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(2), len(leaves))
    shaken = [x + 3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    for candidate in (params, grown, jax.tree.unflatten(treedef, shaken)):
        *_, a_bar = constants(candidate)
        assert (np.abs(a_bar) < 1).all()
        one_step, _ = apply(candidate, zeros + 1, 0 * noise[:1], no_reset[:1])
        np.testing.assert_allclose(one_step[0], a_bar, atol=1e-5)
        assert (np.abs(one_step) < 1 + 3e-7).all()
    assert growth(grown) < growth(params) - 1  # the steps went where they were meant to


@pytest.mark.parametrize("length", [4, 128, 4096])
def test_slow_states_keep_most_of_themselves_for_16_times_the_longest_question(length):
    args = Args(memory_length=length)
    assert 0.8 < np.exp(-0.5 * args.dt_slow * 16 * length) < 0.99  # their decay is dt / 2 a step


@pytest.mark.parametrize("coefs", [(0.5, 0.0), (0.0, 0.2)])
def test_the_penalties_are_of_states_and_of_input_that_is_even(coefs):
    T, N, D, P = 7, 3, 4, 2
    args = Args(d_model=D, state_size=P, state_coef=coefs[0], sparsity_coef=coefs[1])
    u = jax.random.normal(jax.random.PRNGKey(0), (T, N, D))
    reset, zeros = jnp.zeros((T, N), bool), jnp.zeros((N, P), jnp.complex64)
    params = S5(args).init(jax.random.PRNGKey(1), zeros, u, reset)
    assert {*params} == {"params"}
    _, sown = S5(args).apply(params, zeros, u, reset, mutable="intermediates")
    state, states = zeros, []
    for t in range(T):
        state, _ = S5(args).apply(params, state, u[t : t + 1], reset[t : t + 1])
        states.append(np.abs(np.array(state)))
    size = np.abs(np.array(u)).mean(-1)
    evenness = size.mean() / np.sqrt((size**2).mean())
    (penalty,) = jax.tree.leaves(sown)
    expected = args.state_coef * np.mean(np.square(states)) + args.sparsity_coef * evenness
    assert penalty == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_is_fed_nothing_has_no_penalty_and_a_finite_gradient():
    args = Args(d_model=4, state_size=2)
    u, reset = jnp.zeros((7, 3, 4)), jnp.zeros((7, 3), bool)
    state = jnp.zeros((3, 2), jnp.complex64)
    params = S5(args).init(jax.random.PRNGKey(0), state, u, reset)

    def penalty(params):
        _, sown = S5(args).apply(params, state, u, reset, mutable="intermediates")
        return sum(jax.tree.leaves(sown))

    value, grads = jax.value_and_grad(penalty)(params)
    assert value == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
