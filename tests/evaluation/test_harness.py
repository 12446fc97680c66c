"""lm-evaluation-harness with our model class gives our own figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.evaluation import __main__ as command
from tests.inference import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its dependencies' own


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed (the `eval` extra)")
    import lm_eval.evaluator

    return lm_eval


def test_the_same_figures_as_ours(
    lm_eval: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3_jax.evaluation.harness import HarnessModel

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    checkpoint = tiny.save(tmp_path)
    words = ["yes", "no", "maybe so", "é è"]
    data = {
        "mc": [{"prompt": f"item {n}\n", "choices": words[n % 3 :], "answer": n % 2} for n in range(8)],
        "ppl": [{"text": "some text " * n} for n in (1, 5, 40)],
        "gen": [{"prompt": f"go on {n}", "answer": "x"} for n in range(3)],
    }
    harness = {
        "mc": {"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}"},
        "ppl": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        "gen": {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"},
    }
    harness["mc"] |= {
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_bytes")],
    }
    harness["ppl"] |= {"metric_list": [{"metric": "bits_per_byte"}]}
    harness["gen"] |= {
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    configs = []
    for name, records in data.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        more = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        configs.append({"task": name, **more, **harness[name]})
    model = HarnessModel(str(checkpoint), batch_size=4)
    theirs = lm_eval.evaluator.simple_evaluate(
        model, tasks=configs, log_samples=True, bootstrap_iters=0, random_seed=None, torch_random_seed=None
    )
    kinds = {"mc": "multiple_choice", "ppl": "perplexity", "gen": "exact_match"}
    tasks = ",".join(f"{kind}:{tmp_path / name}.jsonl" for name, kind in kinds.items())
    flags = [
        "x",
        "--checkpoint",
        str(checkpoint),
        "--tasks",
        tasks,
        "--items",
        "--out",
        str(tmp_path / "o.json"),
    ]
    monkeypatch.setattr(sys, "argv", [*flags, "--max-new-tokens", "6", "--batch-size", "4"])
    assert command.main() == 0
    ours = json.loads((tmp_path / "o.json").read_text())["tasks"]
    for metric in ("acc", "acc_norm", "acc_bytes"):
        one = ours["multiple_choice:mc"]["metrics"][metric]
        assert theirs["results"]["mc"][f"{metric},none"] == pytest.approx(one["value"])
        values = [record[metric] for record in ours["multiple_choice:mc"]["records"]]
        assert lm_eval.api.metrics.mean_stderr(values) == pytest.approx(one["stderr"])
    want = [[one[0] for one in sample["filtered_resps"]] for sample in theirs["samples"]["mc"]]
    for scores, record in zip(want, ours["multiple_choice:mc"]["records"], strict=True):
        assert scores == pytest.approx(record["scores"], abs=0)
    bits = ours["perplexity:ppl"]["metrics"]["bits_per_byte"]["value"]
    assert theirs["results"]["ppl"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-12)
    texts = [sample["filtered_resps"][0] for sample in theirs["samples"]["gen"]]
    assert [text.split("\n")[0] for text in (r["text"] for r in ours["exact_match:gen"]["records"])] == texts
