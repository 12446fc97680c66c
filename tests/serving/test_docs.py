"""docs/serving.md says what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv3_jax.config.files import from_mapping, load_yaml
from dsv3_jax.serving.chat import FORMATS
from dsv3_jax.serving.rules import RuleFile, RuleFilter

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text("utf-8")


def test_the_example_of_rules_loads_and_does_what_it_says(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "rules.yaml").write_text(example, "utf-8")
    (tmp_path / "names.txt").write_text("Grey Owl\n", "utf-8")
    rules = RuleFilter(from_mapping(RuleFile, load_yaml(tmp_path / "rules.yaml")), tmp_path)
    text = rules.check("the grey owl, 蓝鹭 and 4111-1111-1111-1111", where="content").text
    assert text == "the [removed], [removed] and [removed]"


def test_the_formats_are_all_named() -> None:
    assert all(f"`{name}`" in TEXT for name in FORMATS)


def test_flags_and_routes_that_are_named_exist() -> None:
    pytest.importorskip("fastapi", reason="the `serve` extra is not installed")
    from dsv3_jax.serving.__main__ import Flags

    flags = {"--" + name.replace("_", "-") for name in Flags.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--full", "--help"}
    assert named and named <= flags, named - flags
    source = (Path(__file__).resolve().parents[2] / "dsv3_jax" / "serving" / "app.py").read_text("utf-8")
    for route in set(re.findall(r"`(?:GET|POST) (/[^`]*)`", TEXT)):
        assert f'"{route}"' in source, route


def test_extra_options_that_are_named_are_taken() -> None:
    pytest.importorskip("pydantic", reason="the `serve` extra is not installed")
    from dsv3_jax.serving.schemas import ChatRequest

    [listed] = re.findall(r"goes in `extra_body`:(.*?)\n\n", TEXT, re.DOTALL)
    names = re.findall(r"`(\w+)`", listed)
    assert len(names) > 5 and set(names) <= set(ChatRequest.model_fields)
