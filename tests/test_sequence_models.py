"""What S5, LSTM and Transformer have in common, and what each computes."""

import inspect
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
SMALL = {
    "s5": (s5_ppo_memory, {"state_size": 4}),
    "lstm": (lstm_ppo, {"hidden_size": 6}),
    # Windows shorter and longer than the sequence. Blocks of five queries cut across both.
    "transformer-4": (transformer_ppo, {"context_length": 4, "num_heads": 2, "key_size": 4, "mlp_size": 8}),
    "transformer-40": (transformer_ppo, {"context_length": 40, "num_heads": 2, "key_size": 4, "mlp_size": 8}),
}
MODELS = [s5_ppo_memory, lstm_ppo, transformer_ppo]
STEPS = tuple(range(1, T))  # where to cut a sequence into calls of one step each
# Few lengths in all, since each compiles anew; calls of 3 steps find a ring of 4 already full.
CUTS = [(), STEPS, (6,), (1, 7, 8, 9, 10, 11), (3, 6, 9)]

draw_resets = st.one_of(st.just(np.zeros((T, N), bool)), st.just(np.ones((T, N), bool)), arrays(bool, (T, N)))
draw_seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_ppo, "QUERY_BLOCK", 5)
        yield


def random_params(module, *inputs):
    """Parameters of a flax module, none of them at a special value, without the time that compiling init takes."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@cache
def build(name, **flags):
    """Of a small model: its Args, jitted apply(params, carry, x, reset), params, and the carry it begins with."""
    module, own = SMALL[name]
    args = module.Args(d_model=D, **own | flags)
    model = module.SequenceModel(args)
    carry = model.initial_carry(N)
    params = random_params(model, carry, np.zeros((1, N, D), np.float32), np.zeros((1, N), bool))
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
@settings(max_examples=25, deadline=None, derandomize=True)
@given(reset=draw_resets, seed=draw_seeds)
def test_at_once_in_chunks_and_step_by_step_are_the_same(model, reset, seed):
    _, _, apply, params, carry = model
    carry, _ = apply(params, carry, inputs(seed + 1), np.roll(reset, 5, axis=0))  # some memory to begin with
    x, close = inputs(seed), partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    last, expected = run(apply, params, carry, x, reset)
    _, later = apply(params, last, x, np.zeros_like(reset))
    for cuts in CUTS[1:]:
        last, y = run(apply, params, carry, x, reset, cuts)
        close(y, expected)
        # What is left in the carry counts by what it does: slots of the ring that are never read may differ.
        close(apply(params, last, x, np.zeros_like(reset))[1], later)


def test_carry_keeps_its_shapes_and_types_and_goes_with_its_environment(model):
    _, _, apply, params, carry = model
    x, reset = inputs(0), np.random.default_rng(0).random((T, N)) < 0.2
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(carry)]
    assert shapes and all(shape[0] == N for shape, _ in shapes)
    assert {dtype.name for _, dtype in shapes} <= {"float32", "complex64", "int32", "bool"}
    for steps in (1, 6, T):
        after, y = apply(params, carry, x[:steps], reset[:steps])
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == shapes
        assert jax.tree.structure(after) == jax.tree.structure(carry)
        assert y.shape == (steps, N, D) and y.dtype == jnp.float32
    order = np.array([2, 0, 1])
    _, expected = apply(params, after, x, reset)
    _, y = apply(params, jax.tree.map(lambda leaf: leaf[order], after), x[:, order], reset[:, order])
    np.testing.assert_allclose(y, expected[:, order], atol=1e-5, rtol=1e-5)


def test_nothing_before_a_reset_reaches_anything_after_it(model):
    name, _, apply, params, carry = model
    x, no_reset = inputs(0), np.zeros((T, N), bool)
    memories = [apply(params, carry, scale * inputs(1), no_reset)[0] for scale in (1, 3)]
    grad = jax.jit(jax.grad(lambda x, reset, later: jnp.square(later * apply(params, carry, x, reset)[1]).sum()))
    for at in (0, 1, 5, T - 1):
        reset = (np.arange(T)[:, None] == at) & (np.arange(N) < 2)  # the third environment goes on
        of_x = grad(x, reset, np.arange(T)[:, None, None] >= at)
        assert (of_x[:at, :2] == 0).all()
        assert (of_x[at:] != 0).any(-1).all()
        # Nor does what was before this call, though it differs by a lot.
        one, other = (apply(params, memory, x, reset)[1][at:] for memory in memories)
        np.testing.assert_array_equal(one[:, :2], other[:, :2])
        if name != "transformer-4":  # which does not look back that far
            assert (of_x[:at, 2] != 0).any(-1).all()
            assert (one[0, 2] != other[0, 2]).any()


@pytest.mark.parametrize("module", MODELS, ids=lambda m: m.__name__)
def test_without_layers_an_output_depends_on_its_own_observation_alone(module):
    args = module.Args(num_layers=0, d_model=D, encoder_size=8, head_size=8)
    network, carry = module.ActorCritic(args, 2), module.SequenceModel(args).initial_carry(N)
    obs, reset = inputs(0), np.zeros((T, N), bool)
    params = random_params(network, carry, obs, reset)
    last, logits, value = network.apply(params, carry, obs, reset)
    _, backwards, _ = network.apply(params, carry, obs[::-1], reset)
    assert jax.tree.leaves(last) == [] and logits.shape == (T, N, 2) and value.shape == (T, N)
    np.testing.assert_allclose(backwards[::-1], logits, atol=1e-6)


def num_parameters(module):
    args = module.Args()
    network, carry = module.ActorCritic(args, 2), module.SequenceModel(args).initial_carry(1)
    params = jax.eval_shape(network.init, jax.random.key(0), carry, jnp.zeros((1, 1, 7)), jnp.zeros((1, 1), bool))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("module", MODELS[1:], ids=lambda m: m.__name__)
def test_defaults_have_as_many_parameters_as_those_of_s5_within_ten_percent(module):
    assert num_parameters(module) == pytest.approx(num_parameters(s5_ppo_memory), rel=0.1)
    ours, theirs = module.Args(), s5_ppo_memory.Args()
    assert (ours.d_model, ours.num_layers) == (theirs.d_model, theirs.num_layers)


def test_a_block_of_lstm_is_wired_as_one_of_s5():
    one, other = (inspect.getsource(module.SequenceModel.__call__) for module in MODELS[:2])
    assert one.replace("S5", "LSTM") == other


# ---- which steps an output depends on
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) + 1}-calls")
@pytest.mark.parametrize("name", SMALL)
def test_one_block_sees_its_window_of_its_own_episode_and_nothing_else(name, cuts):
    args, apply, params, carry = build(name, num_layers=1)
    window = getattr(args, "context_length", T)
    reset = np.zeros((T, N), bool)
    reset[[0, 3, 4, 9], 0] = reset[7, 1] = True
    x = inputs(0)
    _, base = run(apply, params, carry, x, reset, cuts)
    depends = np.zeros((T, T, N), bool)  # of the output at t on the input at s
    for s in range(T):
        _, y = run(apply, params, carry, x + (np.arange(T) == s)[:, None, None] * inputs(1, 1), reset, cuts)
        depends[:, s] = (y != base).any(-1)
    t, s, episode = np.arange(T)[:, None, None], np.arange(T)[:, None], reset.cumsum(0)
    same_episode = episode[:, None] == episode
    np.testing.assert_array_equal(depends, (t - window < s) & (s <= t) & same_episode)


# ---- LSTM
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lstm_is_its_equations():
    args = lstm_ppo.Args(d_model=D, hidden_size=6)
    layer = lstm_ppo.LSTM(args)
    rng = np.random.default_rng(0)
    u, reset, state = inputs(0), rng.random((T, N)) < 0.3, tuple(rng.normal(size=(2, N, 6)).astype(np.float32))
    params = random_params(layer, state, u, reset)
    last, y = jax.jit(layer.apply)(params, state, u, reset)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, float), params["params"])
    for n in range(N):
        c, h = state[0][n], state[1][n]
        for t in range(T):
            c, h = (0 * c, 0 * h) if reset[t, n] else (c, h)
            gate = {}
            for name in "ifgo":
                of_input, of_state = p["cell"]["i" + name], p["cell"]["h" + name]
                gate[name] = u[t, n] @ of_input["kernel"] + h @ of_state["kernel"] + of_state["bias"]
            c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
            h = sigmoid(gate["o"]) * np.tanh(c)
            np.testing.assert_allclose(y[t, n], h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], atol=1e-5)
        np.testing.assert_allclose(last[0][n], c, atol=1e-5)
        np.testing.assert_allclose(last[1][n], h, atol=1e-5)


def test_gates_begin_with_time_scales_from_two_steps_to_the_longest():
    def biases(**flags):
        args = lstm_ppo.Args(d_model=D, hidden_size=150, **flags)
        state, u, reset = (jnp.zeros((1, 150)),) * 2, jnp.zeros((1, 1, D)), jnp.zeros((1, 1), bool)
        cell = lstm_ppo.LSTM(args).init(jax.random.key(0), state, u, reset)["params"]["cell"]
        return [np.asarray(cell["h" + gate]["bias"], float) for gate in "ifgo"]

    i, f, g, o = biases(max_timescale=500.0)
    steps = 1 / (1 - sigmoid(f))
    assert 1.99 < steps.min() < 2.2 and 450 < steps.max() < 500.1
    assert np.median(steps) == pytest.approx(np.sqrt(2 * 500), rel=0.3)  # as many from 2 to 4 as from 250 to 500
    np.testing.assert_allclose(sigmoid(i), 1 / steps, rtol=1e-4)
    assert (g == 0).all() and (o == 0).all()
    assert all(np.abs(bias).max() < 1e-6 for bias in biases(max_timescale=2.0))


# ---- Transformer
def attention(p, u, reset, window, heads, size):
    """One layer, one query and key at a time, u (T, N, D); positions enter as distances, turned into the query."""
    qkv = (u @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]).reshape(*u.shape[:2], 3, heads, size)
    frequency = 10_000.0 ** (-2 * np.arange(size // 2) / size)
    out = np.zeros((*u.shape[:2], heads, size))
    for t, n, h in np.ndindex(*out.shape[:3]):
        scores, values = [], []
        for s in range(t, max(-1, t - window), -1):
            query = qkv[t, n, 0, h, : size // 2] + 1j * qkv[t, n, 0, h, size // 2 :]
            key = qkv[s, n, 1, h, : size // 2] + 1j * qkv[s, n, 1, h, size // 2 :]
            scores.append((query * np.exp(1j * frequency * (t - s)) * key.conj()).real.sum() / np.sqrt(size))
            values.append(qkv[s, n, 2, h])
            if reset[s, n]:
                break
        weights = np.exp(scores)
        out[t, n, h] = weights @ np.array(values) / weights.sum()
    return out.reshape(*u.shape[:2], -1) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


@pytest.mark.parametrize("window", [1, 12, 50])
def test_attention_is_its_definition(window):
    args = transformer_ppo.Args(d_model=D, context_length=window, num_heads=2, key_size=4, num_layers=1)
    layer = transformer_ppo.Attention(args)
    (ring,) = transformer_ppo.SequenceModel(args).initial_carry(N)
    rng = np.random.default_rng(window)
    u, reset = inputs(0, 24), rng.random((24, N)) < 0.1
    reset[[11, 12], 0] = True
    params = random_params(layer, ring, u, reset)
    apply = jax.jit(layer.apply)
    expected = attention(jax.tree.map(lambda leaf: np.asarray(leaf, float), params["params"]), u, reset, window, 2, 4)
    for cuts in ((), range(1, 24)):
        _, y = run(apply, params, ring, u, reset, cuts)
        np.testing.assert_allclose(y, expected, atol=3e-5, rtol=3e-5)


def test_where_in_an_episode_it_stands_makes_no_difference():
    _, apply, params, carry = build("transformer-4", num_layers=1)
    x, no_reset = inputs(0, 5001), np.zeros((5001, N), bool)  # 5001 - T is no multiple of W
    _, late = apply(params, carry, x, no_reset)
    _, early = apply(params, carry, x[-T:], no_reset[-T:])
    np.testing.assert_allclose(late[-1], early[-1], atol=1e-3)


def test_a_block_of_the_transformer_is_pre_norm_attention_then_two_dense_layers():
    args, apply, params, carry = build("transformer-40", num_layers=1)
    p, x, no_reset = params["params"], inputs(0), np.zeros((T, N), bool)

    def norm(i, x):
        return nn.LayerNorm().apply({"params": p[f"LayerNorm_{i}"]}, x)

    def dense(i, x):
        return x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]

    attend = transformer_ppo.Attention(args).apply
    x1 = x + attend({"params": p["Attention_0"]}, carry[0], norm(0, x), no_reset)[1]
    expected = x1 + dense(1, nn.gelu(dense(0, norm(1, x1))))
    np.testing.assert_allclose(apply(params, carry, x, no_reset)[1], expected, atol=1e-4, rtol=1e-4)


def test_the_memory_that_is_checked_is_that_of_keys_and_values():
    args = transformer_ppo.Args(num_seeds=3, num_layers=3, eval_episodes=1)
    assert args.context_length > args.memory_length  # the default window covers an episode of the default task
    carry = jax.eval_shape(lambda: transformer_ppo.SequenceModel(args).initial_carry(2 * args.num_envs))
    assert args.cache_bytes == 3 * sum(4 * (cache.keys.size + cache.values.size) for cache in carry)


@pytest.mark.parametrize("steps", [1, 6])
def test_no_gradient_flows_into_what_was_cached(steps):
    args, apply, params, carry = build("transformer-40")
    x, no_reset = inputs(0), np.zeros((T, N), bool)
    carry, _ = apply(params, carry, x, no_reset)

    def output(keys_and_values):
        caches = tuple(c._replace(keys=k, values=v) for c, (k, v) in zip(carry, keys_and_values, strict=True))
        return jnp.square(apply(params, caches, x[:steps], no_reset[:steps])[1]).sum()

    memory = tuple((cache.keys, cache.values) for cache in carry)
    for leaf in jax.tree.leaves(jax.grad(output)(memory)):
        assert (leaf == 0).all()
    for layer, part in np.ndindex(args.num_layers, 2):  # yet all of it is read
        other = [list(pair) for pair in memory]
        other[layer][part] = other[layer][part] + 0.1
        assert output(other) != output(memory)


def array_sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from array_sizes(getattr(inner, "jaxpr", inner))


def test_memory_of_learning_grows_with_the_sequence_and_with_the_window_but_not_with_their_product():
    def largest(steps, window):
        args = transformer_ppo.Args(d_model=D, context_length=window, num_layers=1, key_size=4, mlp_size=8)
        model = transformer_ppo.SequenceModel(args)
        carry, x, reset = model.initial_carry(N), jnp.zeros((steps, N, D)), jnp.zeros((steps, N), bool)
        params = jax.eval_shape(model.init, jax.random.key(0), carry, x, reset)

        def loss(params):
            return jnp.square(model.apply(params, carry, x, reset)[1]).sum()

        return max(array_sizes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))

    width = 3 * 2 * 4  # of queries, keys and values of two heads together
    assert largest(4000, 1000) <= N * max(width * (4000 + 1000), 2 * 5 * (1000 + 5))


# ---- flags that cannot work
@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (lstm_ppo, {"max_timescale": 1.5}, "--max-timescale 1.5 is too small: use 2 or more"),
        (transformer_ppo, {"key_size": 7}, "--key-size 7 is odd.*use 8"),
        (transformer_ppo, {"context_length": 10**8}, r"--context-length 100000000 needs .* GB.*use (\d+) or less"),
    ],
)
def test_flags_of_the_model_that_cannot_work_are_refused_in_one_line(module, flags, message):
    with pytest.raises(ValueError, match=message) as error:
        module.Args(**flags).check()
    assert "\n" not in str(error.value)
    if "context_length" in flags:
        module.Args(context_length=int(str(error.value).split("use ")[1].split()[0])).check()
