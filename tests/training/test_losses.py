"""Losses: chunked cross-entropy equals the plain one; what depth k predicts; padding counts nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.model import init_variables
from dsv3_jax.training.losses import count_totals, loss_fn, mtp_inputs_targets, sum_cross_entropy
from dsv3_jax.training.rows import RowWriter, empty_batch
from tests.training import tiny


def _logits(head: dict, hidden: jax.Array) -> jax.Array:
    return jnp.einsum("ND,VD->NV", hidden, head["w"]).astype(jnp.float32)


def _problem(N: int = 13, D: int = 8, V: int = 50) -> tuple[dict, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    targets_N = jax.random.randint(keys[2], (N,), 0, V).at[jnp.array([0, 7])].set(-1)
    return {"w": jax.random.normal(keys[0], (V, D))}, jax.random.normal(keys[1], (N, D)), targets_N


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
def test_chunked_cross_entropy_equals_the_plain_one(chunk: int) -> None:
    head, hidden_ND, targets_N = _problem()

    def plain(head: dict, hidden: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            _logits(head, hidden), jnp.maximum(targets_N, 0)
        )
        return 0.3 * jnp.sum(losses * (targets_N >= 0))

    def ours(head: dict, hidden: jax.Array) -> jax.Array:
        return 0.3 * sum_cross_entropy(_logits, head, hidden, targets_N, chunk)

    want, want_grads = jax.value_and_grad(plain, argnums=(0, 1))(head, hidden_ND)
    have, have_grads = jax.value_and_grad(ours, argnums=(0, 1))(head, hidden_ND)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), have_grads, want_grads)
    np.testing.assert_allclose(ours(head, hidden_ND), want, rtol=1e-6)  # without gradients


def test_no_array_of_all_logits_exists() -> None:
    head, hidden_ND, targets_N = _problem(N=64, V=50)
    loss = functools.partial(sum_cross_entropy, _logits)
    text = str(jax.make_jaxpr(jax.grad(lambda h, x: loss(h, x, targets_N, 16)))(head, hidden_ND))
    assert "16,50" in text
    assert "64,50" not in text
    assert "4,16,50" not in text


def test_depth_k_reads_t_plus_1_plus_k_and_predicts_t_plus_2_plus_k_within_a_segment() -> None:
    # One row: a document 10..15 of which 5 inputs stand here, one of 20..22, and padding.
    batch = {
        "tokens_BT": jnp.array([[10, 11, 12, 13, 14, 20, 21, 0]]),
        "targets_BT": jnp.array([[11, 12, 13, 14, 15, 21, 22, -1]]),
        "segments_BT": jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]]),
    }
    inputs_LBT, targets_LBT = mtp_inputs_targets(batch, 2)
    none = -1
    np.testing.assert_array_equal(targets_LBT[0, 0], [12, 13, 14, 15, none, 22, none, none])
    np.testing.assert_array_equal(targets_LBT[1, 0], [13, 14, 15, none, none, none, none, none])
    np.testing.assert_array_equal(inputs_LBT[0, 0, :7], batch["targets_BT"][0, :7])
    np.testing.assert_array_equal(inputs_LBT[1, 0, :4], [12, 13, 14, 15])


@pytest.fixture(scope="module")
def variables() -> dict:
    return jax.jit(functools.partial(init_variables, tiny.MODEL))(jax.random.key(1))


def test_loss_is_the_sum_of_its_parts_and_ignores_padding(variables: dict) -> None:
    loss = jax.jit(functools.partial(loss_fn, cfg=tiny.MODEL, training=tiny.RUN.training))
    batch = tiny.batch()
    total, parts = loss(variables["params"], variables["router"], batch)
    training = tiny.RUN.training
    want = parts.ce + training.mtp_loss_weight * parts.mtp + training.balance_loss_alpha * parts.balance
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert float(parts.mtp) > 1.0 and float(parts.balance) > 0.5  # both are there
    padding = batch["segments_BT"] == 0
    assert padding.any()
    other = {**batch, "tokens_BT": np.where(padding, 7, batch["tokens_BT"])}
    total_other, parts_other = loss(variables["params"], variables["router"], other)
    assert float(total_other) == float(total)
    np.testing.assert_array_equal(parts_other.counts_LE, parts.counts_LE)
    real = int((~padding).sum())
    np.testing.assert_array_equal(parts.counts_LE.sum(axis=1), real * tiny.MODEL.num_experts_per_tok)


def test_neither_attention_nor_loss_crosses_documents(variables: dict) -> None:
    """Tokens of one document, whatever they are, change nothing in the loss of the others in its row."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, tiny.MODEL.vocab_size, n) for n in (6, 7, 4)]
    batch = empty_batch(1, 16)
    row = RowWriter(batch, 0)
    for document in documents:
        row.add(document)
    segments_BT = batch["segments_BT"]
    training = dataclasses.replace(
        tiny.RUN.training, balance_loss_alpha=0.0
    )  # counts tokens of the whole row

    @jax.jit
    def loss_of(batch: dict, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Next-token and multi-token loss where only `segment` has targets; its own segments decide who sees whom."""
        targets_BT = jnp.where(segments_BT == segment, batch["targets_BT"], -1)
        only = {**batch, "targets_BT": targets_BT}
        _, parts = loss_fn(variables["params"], variables["router"], only, tiny.MODEL, training)
        return parts.ce, parts.mtp

    for changed in (1, 2, 3):
        other = {
            **batch,
            "tokens_BT": np.where(segments_BT == changed, (batch["tokens_BT"] + 5) % 61, batch["tokens_BT"]),
        }
        for segment in (1, 2, 3):
            same = loss_of(batch, segment) == loss_of(other, segment)
            assert same == (segment != changed), (changed, segment)
    # The check can fail: as one document the row is one context.
    merged = {**batch, "segments_BT": np.minimum(segments_BT, 1)}
    other = {**merged, "tokens_BT": np.where(segments_BT == 1, 7, batch["tokens_BT"])}
    assert loss_of(merged, 3)[0] != loss_of(other, 3)[0]


def test_totals_count_tokens_targets_and_rows() -> None:
    batch = tiny.batch()
    batch["segments_BT"][2] = 0  # an empty row
    batch["targets_BT"][2] = -1
    totals = count_totals(batch, tiny.MODEL)
    assert float(totals.rows) == tiny.RUN.training.batch_size - 1
    assert float(totals.tokens) == (batch["segments_BT"] > 0).sum()
    assert float(totals.targets) == (batch["targets_BT"] >= 0).sum()


def test_own_head_of_the_multi_token_module_is_used_and_trained() -> None:
    cfg = dataclasses.replace(tiny.MODEL, mtp_own_head=True, mtp_own_embedding=True, num_hidden_layers=1)
    grads = jax.eval_shape(
        lambda key: jax.grad(lambda p, r: loss_fn(p, r, tiny.batch(), cfg)[0])(
            *init_variables(cfg, key).values()
        ),
        jax.random.key(0),
    )
    assert grads["mtp"]["head_VD"].shape == (1, 61, 32)
