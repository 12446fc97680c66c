"""Tables of the latent cache by storage type and of kv_b in codes and whole, for `benchmarks.tables`."""

from __future__ import annotations

from typing import Any

from benchmarks.quality_tables import kl, load, perplexity


def quality_table() -> str:
    """Bytes and quality by storage type, of two trained models."""
    lines = [
        "| model | cache | bytes a token | perplexity | KL, nats a token | same next token | other text: perplexity "
        "| KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    told = []
    for name in ("cache_quality", "cache_quality_100m"):
        result = load(name)
        model = f"{result['parameters'] / 1e6:.1f}M"
        for row in result["rows"]:
            first, second = row["texts"]
            if row["dtype"] == "float32":
                cells = " | ".join([""] * 5)
            else:
                agreement = f"{100 * first['greedy_agreement']:.1f} %"
                cells = " | ".join([perplexity(first), kl(first), agreement, perplexity(second), kl(second)])
            lines.append(f"| {model} | {row['dtype']} | {row['token_bytes']:,} | {cells} |")
        first, second = result["rows"][0]["texts"]
        told.append(
            f"{model} parameters (step {result['step']:,}, held-out loss {result['trained']['val_loss']:.2f}): "
            f"latents of {result['latent']} columns, rotated keys of {result['rope']}, {first['tokens']:,} tokens "
            f"of {result['texts'][0]}, {second['tokens']:,} of {result['texts'][1]}, windows of {result['window']}."
        )
    when = load("cache_quality_100m")["environment"]
    about = (
        "Changes against a float32 cache ± standard error (bootstrap over windows); rotated keys in float32."
    )
    return "\n".join([*lines, "", f"{about} {' '.join(told)} {when['date']}, commit {when['commit']}."])


def _speed(one: dict[str, float]) -> str:
    return f"{one['speed']:.2f}× ({one['speed_min']:.2f} to {one['speed_max']:.2f})"


def speed_table() -> str:
    """Decoding by storage type of the cache."""
    result = load("cache_speed")
    lines = [
        "| cache | rows | bytes a token | ms a step | speed against float32, clock | processor time |",
        "|---|---|---|---|---|---|",
    ]
    for rows, found in result["batches"].items():
        for row in found:
            clock = row["clock"]
            lines.append(
                f"| {row['name']} | {rows} | {row['token_bytes']:,} | {clock['step_ms']:.1f} | {_speed(clock)} | "
                f"{_speed(row['threads'])} |"
            )
    rounds = f"Medians (least to most) of {result['rounds']} rounds in turn."
    about = f"Behind one prompt of {result['prompt']:,} tokens, whose pages all rows share. {rounds}"
    return "\n".join([*lines, "", f"{about} {_where(result)}"])


def kv_b_table() -> str:
    """Decoding of quantised weights with kv_b whole, against codes."""
    result = load("kv_b_speed")
    lines = [
        "| weights | MB with kv_b in codes | whole | rows | ms a step, codes | whole | speed, clock | processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["formats"].items():
        for rows in ("1", "16"):
            codes, whole = found[rows]
            lines.append(
                f"| {name} | {found['bytes_codes'] / 1e6:.1f} | {found['bytes_whole'] / 1e6:.1f} | {rows} | "
                f"{codes['clock']['step_ms']:.1f} | {whole['clock']['step_ms']:.1f} | {_speed(whole['clock'])} | "
                f"{_speed(whole['threads'])} |"
            )
    about = f"Contexts of up to 72 tokens. Medians (least to most) of {result['rounds']} rounds in turn."
    return "\n".join([*lines, "", f"{about} {_where(result)}"])


def _where(result: dict[str, Any]) -> str:
    env = result["environment"]
    busy = f" The machine was also doing other work (load {env['load_before']:.1f} before the run):"
    busy += " go by the processor time."
    where = f"{env['date']}, {env['cpu']} ({env['cores']} cores), jax {env['versions']['jax']}, commit {env['commit']}."
    return where + (busy if env["load_before"] > 0.5 else "")


TABLES = {"cache_quality": quality_table, "cache_speed": speed_table, "kv_b_speed": kv_b_table}
