"""The loop: data in, steps, metrics and checkpoints out. The only part of training that holds state."""

from __future__ import annotations

import json
import math
import operator
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.finetune.base import open_base
from dsv3_jax.finetune.files import adapter_record
from dsv3_jax.parallel import Feed, barrier, compiled_by_all, first_then_all, make_mesh, processes
from dsv3_jax.text import Tokenizer
from dsv3_jax.training.data import Batches
from dsv3_jax.training.lora import lora_line, parameter_counts
from dsv3_jax.training.metrics import (
    MetricsLog,
    Pace,
    Record,
    Speed,
    TensorBoard,
    memory_gib,
    record_of,
    step_line,
)
from dsv3_jax.training.open_data import open_data
from dsv3_jax.training.report import write_report
from dsv3_jax.training.restore import init_notes, init_weights, open_init, restore_step
from dsv3_jax.training.run_folder import (
    HF,
    METRICS,
    REPORT,
    TENSORBOARD,
    TOKENIZER,
    FollowedFolder,
    RunFolder,
    open_run_folder,
)
from dsv3_jax.training.saving import Saver
from dsv3_jax.training.schedules import batch_schedule
from dsv3_jax.training.signals import StopSignals
from dsv3_jax.training.step import (
    State,
    batch_sharding,
    check_batch,
    init_lora_state,
    init_state,
    make_eval_step,
    make_train_step,
    shards_of,
)
from dsv3_jax.training.watchdog import Watchdog

NOT_APPLIED = 76  # exit code
NOT_APPLIED_LIMIT = 10  # steps in a row that were not applied: not finite, or spikes


def say(text: str) -> None:
    """One line to the terminal, at once; of several processes the first speaks."""
    if processes().first:
        print(f"{text}\n", end="", flush=True)  # in one piece: a save in the background speaks too


@dataclass
class _Pending:
    """A step whose metrics are still on the device."""

    step: int
    metrics: Any
    rows: int
    data: Record


def train(cfg: RunConfig) -> int:
    """Run or resume a training run; the exit code: 0 done or saved, 76 not finite too often.

    Raises ConfigError, DataError, StorageError as described in `dsv3_jax.errors`.
    """
    with StopSignals() as signals:
        folder = open_run_folder(cfg)
        try:
            return Trainer(cfg, folder, signals).run()
        finally:
            folder.close()


class Trainer:
    """One process's part of a run."""

    def __init__(self, cfg: RunConfig, folder: RunFolder | FollowedFolder, signals: StopSignals) -> None:
        """Opens data and devices and finds the state to go on from; writes config.yaml last."""
        self.cfg, self.folder, self.path, self.signals = cfg, folder, folder.path, signals
        self.mesh, self.group = make_mesh(cfg.mesh), processes()
        check_batch(cfg, self.mesh)
        self.base = open_base(cfg.lora, cfg.model) if cfg.lora.rank else None
        step = make_train_step(cfg, self.mesh, self.base)
        say(f"run folder: {self.path}")
        source = None
        if not folder.resumed:
            source = open_init(cfg) if self.base is None else self.base.source
        self.feed = Feed(batch_sharding(self.mesh), cfg.training.batch_size)
        opened = first_then_all("data", lambda: open_data(cfg, self._init_tokenizer(source)))
        self.train_data, self.val_data = opened.train, opened.validation
        for note in opened.notes:
            say(note)
        if cfg.checkpoint.keep_best and self.val_data is None:
            raise ConfigError(
                f"checkpoint.keep_best is {cfg.checkpoint.keep_best}, but the data has no held-out part"
            )
        self.batches = Batches(
            self.train_data,
            cfg.training.batch_size,
            seed=cfg.seed,
            host=self.feed.part,
            n_hosts=self.feed.parts,
            size_at=batch_schedule(cfg.training).at_position,
        )
        writes_events = cfg.logging.tensorboard and self.group.first
        self.tensorboard = TensorBoard(self.path / TENSORBOARD) if writes_events else None
        if self.group.first:
            self._bring_files(source, opened.tokenizer)
        barrier("files of the run")
        self.byte_lengths_V = _byte_lengths(self.path / TOKENIZER, cfg.model.vocab_size)
        self.tokens, self.not_applied = 0, 0
        self.state = self._first_state(source)
        folder.save_config(cfg)
        self.log = MetricsLog(self.path / METRICS) if self.group.first else None
        self.saver = Saver(self.path, cfg, say, None if self.base is None else adapter_record(self.base))
        self.watchdog = Watchdog(60 * cfg.training.watchdog_minutes)
        self._step = jax.jit(step, donate_argnums=0)
        self._eval = jax.jit(make_eval_step(cfg, self.mesh, self.base))
        self.pace = Pace()
        self.speed = Speed(cfg.model, cfg.training.seq_len, self.mesh, frozen=self.base is not None)
        self.sizes = parameter_counts(self.state)
        self._clock = time.perf_counter()

    # --- before the first step --------------------------------------------------------------------------------

    def _init_tokenizer(self, source: Any) -> Path | None:
        if self.folder.resumed:
            kept = self.path / TOKENIZER
            from_model = self.cfg.init.checkpoint or self.base
            return kept if from_model and kept.is_dir() else None
        return None if source is None else source.tokenizer_dir

    def _bring_files(self, source: Any, tokenizer: Tokenizer | None) -> None:
        """Tokenizer and, from a Hugging Face source, its config and small files: they travel with the run."""
        if self.folder.resumed:
            return
        shutil.rmtree(self.path / TOKENIZER, ignore_errors=True)
        if tokenizer is not None:
            tokenizer.save(self.path / TOKENIZER)
            self._note_special_ids(tokenizer)
        shutil.rmtree(self.path / HF, ignore_errors=True)
        if source is not None and (source.hf_config or source.files):
            (self.path / HF).mkdir()
            for file in source.files:
                shutil.copyfile(file, self.path / HF / file.name)
            if source.hf_config is not None:
                (self.path / HF / "config.json").write_text(json.dumps(source.hf_config, indent=2) + "\n")

    def _note_special_ids(self, tokenizer: Tokenizer) -> None:
        model = self.cfg.model
        if tokenizer.eos_ids and not set(tokenizer.eos_ids) & set(model.eos_token_id):
            say(
                f"note: documents end with id {tokenizer.eos_ids[0]}, but model.eos_token_id is "
                f"{list(model.eos_token_id)}: decoding will not stop there"
            )

    def _first_state(self, source: Any) -> State:
        restored = restore_step(self.path, self.cfg, self.mesh, say, self.base)
        if restored is not None:
            state, saved = restored
            self.batches.restore(saved["data"])
            self.tokens, self.not_applied = saved["tokens"], saved["not_finite"]
            say(f"resuming after step {int(state.step)}")
            return state
        if self.base is not None:
            for note in self.base.notes:
                say(note)
            return init_lora_state(self.cfg, self.mesh, self.base)
        if source is None and self.cfg.init.checkpoint is not None:
            source = open_init(self.cfg)  # stopped before its first checkpoint
        if source is None:
            return init_state(self.cfg, self.mesh)
        for note in init_notes(self.cfg, source):
            say(note)
        return init_state(self.cfg, self.mesh, init_weights(self.cfg, source))

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """All steps that are left, then the report."""
        cfg, start = self.cfg, int(self.state.step)
        try:
            if start >= cfg.training.steps:
                say(f"nothing to do: {start} of {cfg.training.steps} steps are done")
            else:
                self._announce()
            # Nothing goes between host and devices but what is asked for by name: a hidden copy would stall each step.
            with self.watchdog, jax.transfer_guard("disallow"):
                code = self._steps(start)
                self.saver.wait()
        finally:
            self._close()
        if code == 0 and self.group.first and (self.saver.saved or not (self.path / REPORT).exists()):
            write_report(self.path)
            say(f"report: {self.path / REPORT}")
        return code

    def _close(self) -> None:
        failing = sys.exc_info()[1] is not None
        try:
            self.saver.wait()
        except Exception as error:
            if not failing:
                raise
            say(f"error: the checkpoint could not be saved either: {error}")  # what failed first is raised
        finally:
            self.batches.close()
            if self.log is not None:
                self.log.close()
            if self.tensorboard is not None:
                self.tensorboard.close()

    def _announce(self) -> None:
        size = f"{self.sizes.total:,} parameters"
        if self.base is not None:
            size = lora_line(self.sizes, self.base, self.state)
        say(
            f"{size}, {self.mesh.size} x {jax.devices()[0].device_kind}, "
            f"{self.train_data.describe()}; compiling the step"
        )

    def _steps(self, start: int) -> int:
        cfg, pending = self.cfg, None
        compiled: dict[int, Any] = {}  # by size of the batch
        steps, alone = cfg.training.steps, self.group.count == 1
        for step in range(start + 1, steps + 1):
            if alone:
                self.saver.check()
            if alone and self.signals.asked and step == start + 1:
                say(f"stopped before step {step}; nothing new to save")
                return 0
            batch = self.feed.place(next(self.batches))
            rows = len(batch["tokens_BT"])
            if rows not in compiled:
                compiled[rows] = compiled_by_all(f"step of {rows}", self._step, self.state, batch)
            self.state, metrics = compiled[rows](self.state, batch)
            if pending is not None:  # its metrics are fetched while the device is busy with this step
                self._record(pending)
            pending = _Pending(step, metrics, rows, self.batches.progress())
            # A save that failed in one of several processes failed in all: they leave after the same step.
            asked = self.signals.asked is not None or self.saver.failed
            stop = self.group.stop_at(step, asked)
            save = stop or step == steps or step % cfg.checkpoint.every == 0
            # After ten steps that were not applied this one decides whether the run ends.
            if not (self._evaluates(step) or save or self.not_applied >= NOT_APPLIED_LIMIT):
                continue
            record = self._record(pending, evaluate=self._evaluates(step))
            pending = None
            if self.not_applied >= NOT_APPLIED_LIMIT:
                say(
                    f"error: loss or gradient was not finite or a spike in {self.not_applied} steps in a row (the last "
                    f"is {step}); none of them was applied, nothing was saved. Try a lower optimizer.lr or look at the "
                    "data; to begin again from an older checkpoint, remove the newer ones."
                )
                return NOT_APPLIED
            if save:
                self._save(step, record)
            self._clock = time.perf_counter()
            if stop and step < steps:
                self.saver.wait()
                who = self.signals.asked or "another process was asked to stop"
                say(f"{who}: step {step} is saved; start again on the same folder to go on")
                return 0
        return 0

    def _evaluates(self, step: int) -> bool:
        every = self.cfg.training.eval_every
        best = self.cfg.checkpoint.keep_best > 0 and step % self.cfg.checkpoint.every == 0
        return step == self.cfg.training.steps or bool(every and step % every == 0) or best

    def _record(self, pending: _Pending, *, evaluate: bool = False) -> Record:
        """Fetch a step's metrics, write its line, count steps that were not applied."""
        record = record_of(pending.step, jax.device_get(pending.metrics))
        self.watchdog.beat()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.pace.add(seconds)
        count = int(record["tokens"])
        self.tokens += count
        size = pending.rows * self.cfg.training.seq_len
        record.update(tokens=self.tokens, tokens_per_s=count / seconds, seconds=seconds, fill=count / size)
        record.update(self.speed.of(count / seconds), mem_gib=memory_gib())
        if self.base is not None:
            record.update(trainable_parameters=self.sizes.trained, parameters=self.sizes.total)
        record.update(pending.data)
        if evaluate:
            record.update(self._evaluate())
        self.not_applied = self.not_applied + 1 if record["skipped"] else 0
        if self.log is not None:
            self.log.write(record)
        if self.tensorboard is not None:
            self.tensorboard.write(record)
        steps = self.cfg.training.steps
        if (
            pending.step % self.cfg.logging.every == 0
            or pending.step in (1, steps)
            or evaluate
            or record["skipped"]
        ):
            say(step_line(record, steps, self.pace.left(steps - pending.step)))
        return record

    def _save(self, step: int, record: Record) -> None:
        train_state = {
            "step": step,
            "data": self.batches.state(),
            "seed": self.cfg.seed,
            "tokens": self.tokens,
            "not_finite": self.not_applied,
        }
        with jax.transfer_guard("allow"):  # a save copies the state to the host
            self.saver.save(self.state, train_state, before=self._sync_log, val_loss=record.get("val_loss"))
        self.watchdog.beat()

    def _sync_log(self) -> None:  # metrics.jsonl is on the disk before the step appears
        if self.log is not None:
            self.log.sync()

    def _evaluate(self) -> Record:
        """Loss on held-out data, its perplexity, bits per byte where the tokenizer stands for bytes, and how good the
        multi-token module is (`EvalSums`)."""
        if self.val_data is None:
            return {}
        cfg, size = self.cfg.training, 0
        total: Any = None
        rows = cfg.batch_size // cfg.accumulate
        assert rows % shards_of(self.mesh) == 0
        for batch in self.val_data.in_order(rows, cfg.eval_batches):
            placed = self.feed.place(self.feed.own_rows(batch))
            inputs = self.state.params, self.state.router, placed, self.state.frozen
            self._eval = compiled_by_all("evaluation", self._eval, *inputs)
            sums = jax.tree.map(lambda x: x.item(), jax.device_get(self._eval(*inputs)))
            self.watchdog.beat()
            total = sums if total is None else jax.tree.map(operator.add, total, sums)  # float64 and int
            if self.byte_lengths_V is not None:
                ids = batch["targets_BT"]
                size += int(self.byte_lengths_V[ids[ids >= 0]].sum())
        if total is None or not total.targets:
            say(
                "note: no held-out document was found: no evaluation (a higher data.val_fraction holds out more)"
            )
            return {}
        loss = total.nats / total.targets
        record: Record = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        if size:
            record["val_bits_per_byte"] = total.nats / math.log(2) / size
        if total.mtp_targets:
            record["val_mtp_loss"] = total.mtp_nats / total.mtp_targets
            record["val_mtp_accuracy"] = total.mtp_right / total.mtp_targets
            record["val_mtp_acceptance"] = total.mtp_accepted / total.mtp_targets
        return record


def _byte_lengths(folder: Path, vocab_size: int) -> np.ndarray | None:
    """Bytes that each id stands for (special tokens: 0), or None for a tokenizer that is not byte-level."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None or not tokenizer.byte_level:
        return None
    sizes_V = np.zeros(max(vocab_size, tokenizer.vocab_size), np.int64)
    for index in range(tokenizer.vocab_size):
        if not tokenizer.is_special(index):
            sizes_V[index] = len(tokenizer.token_bytes(index) or b"")
    return sizes_V
