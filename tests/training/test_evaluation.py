"""What evaluation counts, against the model's own logits written out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.model import Transformer, init_variables
from dsv3_jax.training.evaluation import evaluation_sums
from dsv3_jax.training.losses import mtp_inputs_targets
from tests.training import tiny


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(functools.partial(init_variables, tiny.MODEL))(jax.random.key(1))


def test_acceptance_compares_the_draft_with_what_the_main_model_says_there(variables: Any) -> None:
    batch, model = tiny.batch(), Transformer(tiny.MODEL)
    inputs_LBT, targets_LBT = mtp_inputs_targets(batch, 1)
    where = {"positions_BT": batch["positions_BT"], "segments_BT": batch["segments_BT"]}

    @jax.jit
    def logits(variables: Any) -> tuple[Any, Any]:
        out: Any = model.apply(variables, batch["tokens_BT"], **where)
        ahead: Any = model.apply(variables, out.hidden_BTD, inputs_LBT, **where, method="mtp")
        return (
            model.apply(variables, out.hidden_BTD, method="logits"),
            model.apply(variables, ahead.hidden_LBTD[0], 0, method="mtp_logits"),
        )

    main_BT, draft_BT = (np.argmax(x, axis=-1) for x in logits(variables))
    accepted = right = places = 0
    B, T = main_BT.shape
    for b in range(B):
        for t in range(T):
            if targets_LBT[0, b, t] < 0:
                continue
            places += 1
            right += draft_BT[b, t] == targets_LBT[0, b, t]
            accepted += draft_BT[b, t] == main_BT[b, t + 1]
    sums = jax.jit(lambda v: evaluation_sums(v["params"], v["router"], batch, tiny.MODEL, 24))(variables)
    assert (int(sums.mtp_targets), int(sums.mtp_right), int(sums.mtp_accepted)) == (places, right, accepted)
    assert 0 < accepted < places and accepted != right
