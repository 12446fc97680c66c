"""Jobs: a file of prompts in, a file of results out; or one prompt to the terminal."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import dsv3_jax
from dsv3_jax.config import AUTO_KERNELS, Kernels
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.inputs import Line, PromptReader, check_top, parser_of
from dsv3_jax.inference.load import OpenedModel, open_model
from dsv3_jax.inference.options import Sampling, check, check_ids
from dsv3_jax.inference.partial import PartialFile, prompt_hash
from dsv3_jax.inference.progress import Progress, summary
from dsv3_jax.inference.requests import Request, Result
from dsv3_jax.inference.settings import MOST_DRAFTS, EngineOptions, context_of
from dsv3_jax.inference.stats import Stats
from dsv3_jax.parallel.mesh import make_mesh, parse_mesh
from dsv3_jax.text import StopChecker, StreamDecoder, Tokenizer

_NOT_SHOWN = ("logprobs", "prompt_logprobs")
"""Options that a prompt on the terminal has no place for."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to decode and how; the fields are the flags of infer.py."""

    checkpoint: Path
    sampling: Sampling
    batch_size: int = 16
    dtype: str | None = None
    force: bool = False
    page_size: int = EngineOptions.page_size
    pages: int | None = None
    kernels: Kernels = AUTO_KERNELS
    speculative: int = 0
    quantize: str | None = None
    mesh: str | None = None
    adapter: Path | None = None
    cache_dtype: str | None = None
    keep_kv_b_codes: bool = False

    def __post_init__(self) -> None:
        check(self.sampling, ConfigError, "--", dash=True)
        for flag, value in (("batch-size", self.batch_size), ("page-size", self.page_size)):
            if not 1 <= value <= 4096:
                raise ConfigError(f"--{flag} is {value}; expected 1 to 4096")
        if self.pages is not None and self.pages < 2:
            raise ConfigError(f"--pages is {self.pages}; expected 2 or more")
        if not 0 <= self.speculative <= MOST_DRAFTS:
            raise ConfigError(f"--speculative is {self.speculative}; expected 0 to {MOST_DRAFTS}")
        _ = self.devices  # a mesh that cannot be is told before anything is read

    @functools.cached_property
    def devices(self) -> Mesh | None:
        """The mesh of `--mesh`; None for one device."""
        if self.mesh is None:
            return None
        return make_mesh(parse_mesh(self.mesh))

    def open(self) -> OpenedModel:
        """The model, without its weights; notes go to stderr."""
        model = open_model(
            self.checkpoint,
            self.dtype,
            quantize=self.quantize,
            multi_token=self.speculative > 0,
            adapter=self.adapter,
        )
        for note in model.notes:
            print(f"note: {note}", file=sys.stderr)
        check_top(self.sampling, model.cfg.vocab_size, ConfigError, dash=True)
        check_ids(self.sampling, model.cfg.vocab_size, ConfigError, "--", dash=True)
        return model

    def engine(
        self, model: OpenedModel, requests: list[Request], steps_per_call: int | None = None
    ) -> Engine:
        """An engine of the size that these requests need, with the weights on the device."""
        samplings = [request.sampling for request in requests]
        counts = [n for s in samplings for n in (s.logprobs, s.prompt_logprobs) if n is not None]
        longest = max(len(request.ids) + request.sampling.max_new_tokens for request in requests)
        devices = 1 if self.devices is None else self.devices.size
        options = EngineOptions(
            rows=-(-self.batch_size // devices) * devices,
            page_size=self.page_size,
            pages=self.pages,
            context=context_of(longest, model.cfg),
            steps_per_call=steps_per_call or EngineOptions.steps_per_call,
            max_logprobs=max(counts, default=None),
            kernels=self.kernels,
            speculative=self.speculative,
            cache_dtype=self.cache_dtype,
            keep_kv_b_codes=self.keep_kv_b_codes,
        )
        weights = model.load(host=self.devices is not None)
        return Engine(
            model.cfg,
            weights,
            options=options,
            eos_ids=model.eos_ids,
            vocab_limit=model.vocab_limit,
            mesh=self.devices,
        )


class TextWatch:
    """The text of one row while it grows, up to its first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._checker = StopChecker(stop)
        self.pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._checker.stopped

    def push(self, ids: list[int]) -> int | None:
        """Take new ids; the number of them up to the one that completes a stop string, or None."""
        for count, index in enumerate(ids, 1):
            self.pieces.append(self._checker.push(self._decoder.push([index])))
            if self.stopped:
                return count
        return None

    def finish(self) -> str:
        """The whole text."""
        if not self.stopped:
            self.pieces.append(self._checker.push(self._decoder.finish()))
            self.pieces.append(self._checker.finish())
        return "".join(self.pieces)


def run_file(job: Job, source: Path, output: Path) -> int:
    """Decode a file of prompts into `output`; goes on with `output`.partial where an earlier run stopped.

    Returns the exit code: 0, or 65 when a line could not be answered (the others are).
    Raises ConfigError, DataError (checkpoint) and OSError (storage) before or between results, never half a file.
    """
    if output.exists() and not job.force:
        raise ConfigError(f"--output {output} exists; give --force to replace it")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: expected a file name in an existing folder")
    if not source.is_file():
        raise ConfigError(f"--input {source}: no such file")
    if source.resolve() == output.resolve():
        raise ConfigError(f"--output {output} is the input")
    model = job.open()
    reader = PromptReader(model, job.sampling)
    parser_of(source, reader)
    with PartialFile(output, _fingerprint(job, model, source), force=job.force) as partial:
        if partial.note:
            print(f"note: {partial.note}", file=sys.stderr)
        lines = list(reader.read(source))
        hashes = {line.index: prompt_hash(line.request.ids) for line in lines if line.request}
        todo = [
            line.request
            for line in lines
            if line.request and partial.done.get(line.index, ("",))[0] != hashes[line.index]
        ]
        requests = len(hashes)
        if len(todo) < requests:
            print(
                f"continuing {partial.path}: {requests - len(todo)} of {requests} prompts are done",
                file=sys.stderr,
            )
        failed = [line for line in lines if line.error]
        stats = _decode(job, model, todo, lines, hashes, partial) if todo else None
        partial.finish(_final_records(lines, partial, failed))
    if stats is not None:
        print(summary(stats), file=sys.stderr)
    print(f"{output}: {len(lines)} lines, {len(failed)} failed", file=sys.stderr)
    if failed:
        first = failed[0]
        print(f"error: {source}: line {first.index + 1}: {first.error}", file=sys.stderr)
        return DataError.exit_code
    return 0


def _decode(
    job: Job,
    model: OpenedModel,
    todo: list[Request],
    lines: list[Line],
    hashes: dict[int, str],
    partial: PartialFile,
) -> Stats:
    engine = job.engine(model, todo)
    engine.warm()  # before the clock of the progress starts
    watches: dict[int, TextWatch] = {}

    def watch(request: Request, ids: list[int]) -> int | None:
        if not request.sampling.stop:
            return None
        own = watches.setdefault(request.index, TextWatch(model.tokenizer, request.sampling.stop))
        return own.push(ids)

    refused, taken = [], []
    for request in todo:
        try:
            engine.check(request)
            taken.append(request)
        except DataError as error:  # more than the pages: a line of its own, like one that cannot be read
            refused.append(Result(request, [], "error", str(error)))
    with Progress(len(hashes), len(hashes) - len(todo)) as progress:
        for results in itertools.chain([refused], engine.run(taken, watch)):
            records = []
            for result in results:
                index = result.request.index
                record = _record(lines[index].id, result, model.tokenizer, watches.pop(index, None))
                records.append((index, hashes[index], record))
            partial.append(records)
            progress.update(len(results), engine.stats)
    return engine.stats


def _record(name: str | int, result: Result, tokenizer: Tokenizer, watch: TextWatch | None) -> dict[str, Any]:
    """The output line of a result."""
    text = tokenizer.decode(result.token_ids) if watch is None else watch.finish()
    reason = "stop" if watch is not None and watch.stopped else result.finish_reason
    record: dict[str, Any] = {
        "id": name,
        "token_ids": result.token_ids,
        "text": text,
        "finish_reason": reason,
        "prompt_tokens": len(result.request.ids),
        "completion_tokens": len(result.token_ids),
    }
    if result.error is not None:
        record["error"] = result.error
    if result.logprobs is not None:
        record["logprobs"] = result.logprobs
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = result.prompt_logprobs
    return record


def _final_records(lines: list[Line], partial: PartialFile, failed: list[Line]) -> Iterator[dict[str, Any]]:
    """Records in input order; rows that failed while decoding are added to `failed`."""
    for line in lines:
        if line.error is not None:
            yield {"id": line.id, "finish_reason": "error", "error": line.error}
            continue
        record = partial.record(line.index)
        if record["finish_reason"] == "error":
            failed.append(dataclasses.replace(line, error=record["error"]))
        yield record


def _fingerprint(job: Job, model: OpenedModel, source: Path) -> dict[str, Any]:
    """What a job must have in common with the one that it continues."""
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {
        "input": [source.suffix.lower(), digest.hexdigest()],
        "checkpoint": hashlib.sha256(repr(model.identity).encode()).hexdigest(),
        "settings": {
            **dataclasses.asdict(job.sampling),
            "stop": list(job.sampling.stop),
            "stop_token_ids": list(job.sampling.stop_token_ids),
            "logit_bias": [list(pair) for pair in job.sampling.logit_bias],
            "batch_size": job.batch_size,
            "mesh": job.mesh,
            "speculative": job.speculative,
            "page_size": job.page_size,
            "dtype": model.cfg.dtype,
            "cache_dtype": job.cache_dtype,
            "kernels": dataclasses.asdict(job.kernels),
        },
        "software": [dsv3_jax.__version__, jax.__version__, jax.default_backend()],
    }


def run_prompt(job: Job, text: str, write: Callable[[str], Any]) -> int:
    """Decode one prompt; `write` gets the text piece by piece as it is safe to show. Returns the exit code."""
    for name in _NOT_SHOWN:
        if getattr(job.sampling, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} needs --input and --output; --prompt shows text alone"
            )
    model = job.open()
    ids = PromptReader(model, job.sampling).request(0, {"prompt": text}).ids
    watch = TextWatch(model.tokenizer, job.sampling.stop)
    shown = 0

    def show(_: Request, new: list[int]) -> int | None:
        nonlocal shown
        keep = watch.push(new)
        write("".join(watch.pieces[shown:]))
        shown = len(watch.pieces)
        return keep

    request = Request(np.asarray(ids), job.sampling)
    engine = job.engine(model, [request], steps_per_call=4)
    (result,) = [result for found in engine.run([request], show) for result in found]
    watch.finish()
    write("".join(watch.pieces[shown:]) + "\n")
    if result.error is not None:
        raise DataError(result.error)
    print(f"{summary(engine.stats)}; finished: {result.finish_reason}", file=sys.stderr)
    return 0
