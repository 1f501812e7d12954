"""What S5, LSTM and Transformer have in common, and what the last two compute."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lstm_ppo
import s5_ppo_memory
import transformer_ppo

D, T, N = 8, 12, 3
TINY = {"num_heads": 2, "key_size": 4, "mlp_size": 8}
SMALL = {
    "s5": (s5_ppo_memory, {"state_size": 4}),
    "lstm": (lstm_ppo, {"hidden_size": 6}),
    # Windows shorter and longer than the sequence. Blocks of five queries cut across both.
    "transformer-4": (transformer_ppo, TINY | {"context_length": 4}),
    "transformer-40": (transformer_ppo, TINY | {"context_length": 40}),
}
MODELS = [s5_ppo_memory, lstm_ppo, transformer_ppo]
STEPS = tuple(range(1, T))  # where to cut a sequence into calls of one step each
CUTS = [STEPS, (3, 6, 9)]  # calls of 3 steps find a ring of 4 already full

none, every = np.zeros((T, N), bool), np.ones((T, N), bool)
draw_resets = st.one_of(st.just(none), st.just(every), arrays(bool, (T, N)))
draw_seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_ppo, "QUERY_BLOCK", 5)
        yield


def random_params(module, *inputs):
    """Parameters, none of them at a special value, without the time that compiling init takes."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), *inputs)
    return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(x.dtype), shapes)


@cache
def build(name, **flags):
    """Args, jitted apply(params, carry, x, reset), params, and the carry to begin with."""
    module, own = SMALL[name]
    args = module.Args(d_model=D, **own | flags)
    model = module.SequenceModel(args)
    carry = model.initial_carry(N)
    params = random_params(model, carry, np.zeros((1, N, D), np.float32), none[:1])
    return args, jax.jit(model.apply), params, carry


@pytest.fixture(scope="module", params=SMALL)
def model(request):
    return request.param, *build(request.param)


def inputs(seed, steps=T):
    return np.random.default_rng(seed).normal(size=(steps, N, D)).astype(np.float32)


def run(apply, params, carry, x, reset, cuts=()):
    """The last carry and y (T, N, D), from calls on x[0:cuts[0]], x[cuts[0]:cuts[1]], ..."""
    ys = []
    for begin, end in zip((0, *cuts), (*cuts, len(x)), strict=True):
        carry, y = apply(params, carry, x[begin:end], reset[begin:end])
        ys.append(y)
    return carry, np.concatenate(ys)


# ---- the contract
@settings(max_examples=20, deadline=None, derandomize=True)
@given(reset=draw_resets, seed=draw_seeds)
def test_at_once_in_chunks_and_step_by_step_are_the_same(model, reset, seed):
    _, _, apply, params, carry = model
    carry, _ = apply(params, carry, inputs(seed + 1), np.roll(reset, 5, axis=0))  # some memory
    x, close = inputs(seed), partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    last, expected = run(apply, params, carry, x, reset)
    _, later = apply(params, last, x, none)
    for cuts in CUTS:
        last, y = run(apply, params, carry, x, reset, cuts)
        close(y, expected)
        # What is left in the carry counts by what it does: slots that are never read may differ.
        close(apply(params, last, x, none)[1], later)


def test_carry_keeps_its_shapes_and_types_and_goes_with_its_environment(model):
    _, _, apply, params, carry = model
    x, reset = inputs(0), np.random.default_rng(0).random((T, N)) < 0.2
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(carry)]
    assert shapes and all(shape[0] == N for shape, _ in shapes)
    assert {dtype.name for _, dtype in shapes} <= {"float32", "complex64", "int32"}
    assert not any(leaf.any() for leaf in jax.tree.leaves(carry))
    for steps in (1, T):
        after, y = apply(params, carry, x[:steps], reset[:steps])
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes
        assert jax.tree.structure(after) == jax.tree.structure(carry)
        assert y.shape == (steps, N, D) and y.dtype == jnp.float32
    order = np.array([2, 0, 1])
    _, expected = apply(params, after, x, reset)
    after = jax.tree.map(lambda leaf: leaf[order], after)
    _, y = apply(params, after, x[:, order], reset[:, order])
    np.testing.assert_allclose(y, expected[:, order], atol=1e-5, rtol=1e-5)


def test_nothing_before_a_reset_reaches_anything_after_it(model):
    name, _, apply, params, carry = model
    x = inputs(0)
    memories = [apply(params, carry, scale * inputs(1), none)[0] for scale in (1, 3)]

    @jax.jit
    @jax.grad
    def grad(x, reset, later):
        return jnp.square(later * apply(params, carry, x, reset)[1]).sum()

    for at in (0, 1, 5, T - 1):
        reset = (np.arange(T)[:, None] == at) & (np.arange(N) < 2)  # the third goes on
        of_x = grad(x, reset, np.arange(T)[:, None, None] >= at)
        assert (of_x[:at, :2] == 0).all()
        assert (of_x[at:] != 0).any(-1).all()
        # Nor does what was before this call, though it differs by a lot.
        one, other = (apply(params, memory, x, reset)[1][at:] for memory in memories)
        np.testing.assert_array_equal(one[:, :2], other[:, :2])
        if name != "transformer-4":  # which does not look back that far
            assert (of_x[:at, 2] != 0).any(-1).all()
            assert (one[0, 2] != other[0, 2]).any()


def test_one_block_sees_its_window_of_its_own_episode_and_nothing_else(model):
    """At once; that calls one after another give the same is what the first test says."""
    name, *_ = model
    args, apply, params, carry = build(name, num_layers=1)
    window = getattr(args, "context_length", T)
    reset = none.copy()
    reset[[0, 3, 4, 9], 0] = reset[7, 1] = True
    change = np.eye(T)[..., None, None] * inputs(1, 1)  # (S, T, N, D): of the input at s
    x = inputs(0) + np.concatenate([0 * change[:1], change]).astype(np.float32)
    y = jax.jit(jax.vmap(lambda x: apply(params, carry, x, reset)[1]))(x)
    depends = (y[1:] != y[0]).any(-1).swapaxes(0, 1)  # (T, S, N): of the output at t
    t, s, episode = np.arange(T)[:, None, None], np.arange(T)[:, None], reset.cumsum(0)
    same_episode = episode[:, None] == episode
    np.testing.assert_array_equal(depends, (t - window < s) & (s <= t) & same_episode)


@pytest.mark.parametrize("module", MODELS, ids=lambda m: m.__name__)
def test_without_layers_an_output_depends_on_its_own_observation_alone(module):
    args = module.Args(num_layers=0, d_model=D, encoder_size=8, head_size=8)
    network, carry = module.ActorCritic(args, 2), module.SequenceModel(args).initial_carry(N)
    params = random_params(network, carry, inputs(0), none)
    last, logits, value = network.apply(params, carry, inputs(0), none)
    _, backwards, _ = network.apply(params, carry, inputs(0)[::-1], none)
    assert jax.tree.leaves(last) == [] and logits.shape == (T, N, 2) and value.shape == (T, N)
    np.testing.assert_allclose(backwards[::-1], logits, atol=1e-6)


def test_defaults_have_as_many_parameters_as_those_of_s5_within_ten_percent():
    sizes = []
    for module in MODELS:
        args = module.Args()
        network, carry = module.ActorCritic(args, 2), module.SequenceModel(args).initial_carry(1)
        init = network.init, jax.random.PRNGKey(0), carry, jnp.zeros((1, 1, 5)), none[:1, :1]
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(*init))))
        assert (args.d_model, args.num_layers) == (64, 2)
    assert sizes[1:] == [pytest.approx(sizes[0], rel=0.1)] * 2


# ---- LSTM
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lstm_is_its_equations():
    layer = lstm_ppo.LSTM(lstm_ppo.Args(d_model=D, hidden_size=6))
    rng = np.random.default_rng(0)
    u, reset = inputs(0), rng.random((T, N)) < 0.3
    state = tuple(rng.normal(size=(2, N, 6)).astype(np.float32))
    params = random_params(layer, state, u, reset)
    last, y = jax.jit(layer.apply)(params, state, u, reset)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, float), params["params"])
    c, h = state
    for t in range(T):
        c, h = (np.where(reset[t][:, None], 0, x) for x in (c, h))
        gate = {}
        for name in "ifgo":
            of_input, of_state = p["cell"]["i" + name], p["cell"]["h" + name]
            gate[name] = u[t] @ of_input["kernel"] + h @ of_state["kernel"] + of_state["bias"]
        c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
        h = sigmoid(gate["o"]) * np.tanh(c)
        expected = h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        np.testing.assert_allclose(y[t], expected, atol=1e-5)
    np.testing.assert_allclose(last, (c, h), atol=1e-5)


def test_gates_begin_with_time_scales_from_two_steps_to_the_longest():
    def biases(longest):
        args = lstm_ppo.Args(d_model=D, hidden_size=150, max_timescale=longest)
        state, u = (jnp.zeros((1, 150)),) * 2, jnp.zeros((1, 1, D))
        init = jax.jit(lstm_ppo.LSTM(args).init)
        cell = init(jax.random.PRNGKey(0), state, u, none[:1, :1])["params"]["cell"]
        return [np.asarray(cell["h" + gate]["bias"], float) for gate in "ifgo"]

    i, f, g, o = biases(500.0)
    steps = 1 / (1 - sigmoid(f))
    assert 1.99 < steps.min() < 2.2 and 450 < steps.max() < 500.1
    # As many from 2 to 4 as from 250 to 500.
    assert np.median(steps) == pytest.approx(np.sqrt(2 * 500), rel=0.3)
    np.testing.assert_allclose(sigmoid(i), 1 / steps, rtol=1e-4)
    assert (g == 0).all() and (o == 0).all()
    assert all(np.abs(bias).max() < 1e-6 for bias in biases(2.0))


# ---- Transformer
def attention(p, u, reset, window, heads, size):
    """One layer, one query and key at a time, u (T, N, D); positions enter as distances."""
    qkv = u @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    qkv = qkv.reshape(*u.shape[:2], 3, heads, size)
    frequency = 10_000.0 ** (-2 * np.arange(size // 2) / size)
    out = np.zeros((*u.shape[:2], heads, size))
    for t, n, h in np.ndindex(*out.shape[:3]):
        scores, values = [], []
        for s in range(t, max(-1, t - window), -1):
            query = qkv[t, n, 0, h, : size // 2] + 1j * qkv[t, n, 0, h, size // 2 :]
            key = qkv[s, n, 1, h, : size // 2] + 1j * qkv[s, n, 1, h, size // 2 :]
            turned = query * np.exp(1j * frequency * (t - s))
            scores.append((turned * key.conj()).real.sum() / np.sqrt(size))
            values.append(qkv[s, n, 2, h])
            if reset[s, n]:
                break
        weights = np.exp(scores)
        out[t, n, h] = weights @ np.array(values) / weights.sum()
    return out.reshape(*u.shape[:2], -1) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


@pytest.mark.parametrize("window", [1, 12, 50])
def test_attention_is_its_definition(window):
    flags = TINY | {"context_length": window, "num_layers": 1}
    args = transformer_ppo.Args(d_model=D, **flags)
    layer = transformer_ppo.Attention(args)
    (ring,) = transformer_ppo.SequenceModel(args).initial_carry(N)
    rng = np.random.default_rng(window)
    u, reset = inputs(0, 24), rng.random((24, N)) < 0.1
    reset[[11, 12], 0] = True
    params = random_params(layer, ring, u, reset)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, float), params["params"])
    expected = attention(p, u, reset, window, 2, 4)
    for cuts in ((), range(1, 24)):
        _, y = run(jax.jit(layer.apply), params, ring, u, reset, cuts)
        np.testing.assert_allclose(y, expected, atol=3e-5, rtol=3e-5)


def test_where_in_an_episode_it_stands_makes_no_difference():
    _, apply, params, carry = build("transformer-4", num_layers=1)
    x, no_reset = inputs(0, 2003), np.zeros((2003, N), bool)  # 2003 - T is no multiple of W
    _, late = apply(params, carry, x, no_reset)
    _, early = apply(params, carry, x[-T:], no_reset[-T:])
    np.testing.assert_allclose(late[-1], early[-1], atol=1e-3)


def test_a_block_of_the_transformer_is_pre_norm_attention_then_two_dense_layers():
    _, apply, params, carry = build("transformer-40", num_layers=1)
    p, x = params["params"], inputs(0)

    def norm(i, x):
        return nn.LayerNorm().apply({"params": p[f"LayerNorm_{i}"]}, x)

    def dense(i, x):
        return x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]

    attend = jax.jit(transformer_ppo.Attention(build("transformer-40", num_layers=1)[0]).apply)
    x1 = x + attend({"params": p["Attention_0"]}, carry[0], norm(0, x), none)[1]
    expected = x1 + dense(1, nn.gelu(dense(0, norm(1, x1))))
    np.testing.assert_allclose(apply(params, carry, x, none)[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, T])
def test_no_gradient_flows_into_what_was_cached(steps):
    args, apply, params, carry = build("transformer-40")
    x = inputs(0)[:steps]
    carry, _ = apply(params, carry, inputs(0), none)

    @jax.jit
    def output(keys_and_values):
        pairs = zip(carry, keys_and_values, strict=True)
        caches = tuple(c._replace(keys=k, values=v) for c, (k, v) in pairs)
        return jnp.square(apply(params, caches, x, none[:steps])[1]).sum()

    memory = tuple((cache.keys, cache.values) for cache in carry)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(output))(memory)):
        assert (leaf == 0).all()
    for layer, part in np.ndindex(args.num_layers, 2):  # yet all of it is read
        other = [list(pair) for pair in memory]
        other[layer][part] = other[layer][part] + 0.1
        assert output(tuple(map(tuple, other))) != output(memory)


def array_sizes(jaxpr):
    def is_jaxpr(leaf):
        return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")

    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in filter(is_jaxpr, jax.tree.leaves(eqn.params, is_leaf=is_jaxpr)):
            yield from array_sizes(getattr(inner, "jaxpr", inner))


def test_memory_of_learning_grows_as_the_sequence_and_the_window_not_as_their_product():
    def largest(steps, window):
        flags = TINY | {"context_length": window, "num_layers": 1}
        model = transformer_ppo.SequenceModel(transformer_ppo.Args(d_model=D, **flags))
        x, reset = jnp.zeros((steps, N, D)), jnp.zeros((steps, N), bool)
        carry = model.initial_carry(N)
        params = jax.eval_shape(model.init, jax.random.PRNGKey(0), carry, x, reset)

        def loss(params):
            return jnp.square(model.apply(params, carry, x, reset)[1]).sum()

        return max(array_sizes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))

    width = 3 * 2 * 4  # of queries, keys and values of two heads together
    assert largest(4000, 1000) <= N * max(width * (4000 + 1000), 2 * 5 * (1000 + 5))
