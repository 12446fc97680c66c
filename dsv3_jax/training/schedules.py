"""What changes during a run: learning rate, global batch, bias rate, weight of the multi-token loss.

All are pure functions of the step (1 .. steps). Those of the V3 report (arXiv 2412.19437, section 4.2) are given in
tokens; here they are shares of the run's samples, which is the same thing while the batch grows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import OptimizerConfig, TrainingConfig

Array = jax.Array

# V3 report, section 4.2, in trillions of tokens: constant until 10, cosine over 4.3 to a tenth, 333 billion
# constant, the last 167 billion at 7.3e-6 (peak 2.2e-4).
_V3_TOTAL = 14.8
_V3_DECAY_START = 10.0 / _V3_TOTAL
_V3_DECAY_END = 14.3 / _V3_TOTAL
_V3_LAST = (14.3 + 0.333) / _V3_TOTAL
_V3_LOW, _V3_LOWEST = 2.2e-5 / 2.2e-4, 7.3e-6 / 2.2e-4


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The global batch of every step.

    sizes: in order; ends: the last step of each size but the last, which has no end.
    """

    sizes: tuple[int, ...]
    ends: tuple[int, ...]

    def at_step(self, step: int) -> int:
        """Sequences of a step, counted from 1."""
        return self.sizes[int(np.searchsorted(self.ends, step))]

    def samples(self, step: int) -> int:
        """Sequences that steps 1 .. `step` use."""
        edges = (0, *self.ends, step)
        return sum(
            size * max(min(end, step) - start, 0)
            for size, start, end in zip(self.sizes, edges[:-1], edges[1:], strict=True)
        )

    def at_position(self, position: int) -> int:
        """Sequences of the batch that begins after `position` samples: the data's position decides alone."""
        return self.sizes[sum(position >= self.samples(end) for end in self.ends)]


def batch_schedule(training: TrainingConfig) -> BatchSchedule:
    """`batch_size` at once, or a ramp: `batch_ramp_sizes` sizes in equal steps, all but the last over
    `batch_ramp_steps` steps.

    >>> batch_schedule(TrainingConfig(batch_size=16, batch_ramp_start=4, batch_ramp_sizes=4, batch_ramp_steps=9))
    BatchSchedule(sizes=(4, 8, 12, 16), ends=(3, 6, 9))
    """
    last, first, n = training.batch_size, training.batch_ramp_start, training.batch_ramp_sizes - 1
    if not first:
        return BatchSchedule((last,), ())
    sizes = tuple(first + (last - first) * index // n for index in range(n + 1))
    ends = tuple(round(training.batch_ramp_steps * index / n) for index in range(1, n + 1))
    return BatchSchedule(sizes, ends)


def progress(training: TrainingConfig, step: Array) -> Array:
    """Share of the run's samples that steps 1 .. `step` use, float32."""
    batches, steps = batch_schedule(training), training.steps
    knots = [0, *(end for end in batches.ends if end < steps), steps]
    shares = [batches.samples(knot) / batches.samples(steps) for knot in knots]
    return jnp.interp(
        jnp.asarray(step, jnp.float32), jnp.asarray(knots, jnp.float32), jnp.asarray(shares, jnp.float32)
    )


def learning_rate(optimizer: OptimizerConfig, training: TrainingConfig, step: Array) -> Array:
    """Learning rate of `step` (1 .. steps), float32.

    All schedules rise linearly over `warmup_steps` and are at the peak in its last step. Then "cosine" reaches
    lr * min_lr_ratio at the last step; "wsd" stays until the last `decay_fraction` of the run, in which it falls as
    1 - sqrt(share of the decay done) (arXiv 2405.18392, section 3) to lr * min_lr_ratio; "v3" has the V3 report's
    phases; "constant" stays.
    """
    at, step, steps = progress(training, step), jnp.asarray(step, jnp.float32), training.steps
    warmup = float(optimizer.warmup_steps)
    if optimizer.schedule == "constant":
        scale = jnp.ones(())
    elif optimizer.schedule == "cosine":
        done = jnp.clip((step - warmup) / max(steps - warmup, 1.0), 0.0, 1.0)
        scale = _cosine(done, optimizer.min_lr_ratio)
    elif optimizer.schedule == "wsd":
        done = jnp.clip((at - (1.0 - optimizer.decay_fraction)) / optimizer.decay_fraction, 0.0, 1.0)
        scale = 1.0 - (1.0 - optimizer.min_lr_ratio) * jnp.sqrt(done)
    else:
        done = jnp.clip((at - _V3_DECAY_START) / (_V3_DECAY_END - _V3_DECAY_START), 0.0, 1.0)
        scale = jnp.where(at > _V3_LAST, _V3_LOWEST, _cosine(done, _V3_LOW))
    return optimizer.lr * scale * jnp.minimum(step / max(warmup, 1.0), 1.0)


def _cosine(done: Array, low: float) -> Array:
    return low + (1.0 - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def balance_rate(training: TrainingConfig, step: Array) -> Array:
    """u of the balance rule in a step: `balance_update_rate`, 0 after `balance_stop_fraction` of the run."""
    stopped = progress(training, step) > training.balance_stop_fraction
    return jnp.where(stopped, 0.0, jnp.float32(training.balance_update_rate))


def mtp_weight(training: TrainingConfig, step: Array) -> Array:
    """Weight of the multi-token loss in a step: `mtp_loss_weight`, then `mtp_late_weight` if there is one."""
    if training.mtp_late_weight is None:
        return jnp.float32(training.mtp_loss_weight)
    late = progress(training, step) > training.mtp_late_fraction
    return jnp.where(late, jnp.float32(training.mtp_late_weight), jnp.float32(training.mtp_loss_weight))
