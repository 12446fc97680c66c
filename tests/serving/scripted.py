"""A server over the fake engine with DeepSeek's tokenizer, whose answers are written here.

`python -m tests.serving.scripted FORMAT [FILTER]`: the last word in capitals of a prompt chooses the answer.
"""

from __future__ import annotations

import re
import sys

from dsv3_jax.inference.requests import Request
from dsv3_jax.text import Tokenizer
from tests.serving.fake import MODEL, FakeEngine
from tests.serving.marked import marked_ids

CITY = '{"city": "北京", "days": [1, 2]}'
V3 = (
    "Let me look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    f"```json\n{CITY}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V31 = (
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    f"{CITY}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
V32 = (
    'Let me look.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">北京</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
ANSWERS: dict[str, str | dict[str, str]] = {
    "HELLO": "Hello, 你好 🦩!",
    "REASON": "<think>\nLet me think: 1 + 1.\n</think>\n\nTwo.",
    "OPENED": "so it is\n</think>\n\nYes.",
    "TOOLS": {"deepseek-v3": V3, "deepseek-v3.1": V31, "deepseek-v3.2": V32},
    "FORCED": {
        "deepseek-v3": V3.split("```json\n")[1].split("\n<｜tool▁call▁begin｜>")[0],
        "deepseek-v3.1": V31.split("<｜tool▁sep｜>")[1].split("<｜tool▁call▁begin｜>")[0],
        "deepseek-v3.2": V32.split('"get_weather">\n')[1].split("\n<｜DSML｜invoke")[0],
    },
    "BROKEN": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>nothing<｜tool▁calls▁end｜>",
    "SECRET": "The code is Blue Heron, and the 绝密 word ends it. Never seen.",
}


class ScriptedEngine(FakeEngine):
    """Answers with the ids of ANSWERS."""

    def __init__(self, tokenizer: Tokenizer, chat_format: str) -> None:
        super().__init__(pages=1025)
        self._tokenizer, self._format = tokenizer, chat_format

    def submit(self, request: Request) -> int:
        """Queue."""
        ticket = super().submit(request)
        words = re.findall("|".join(ANSWERS), self._tokenizer.decode(request.ids))
        answer = ANSWERS[words[-1]]
        text = answer if isinstance(answer, str) else answer[self._format]
        self.requests[ticket] = (request, marked_ids(self._tokenizer, text))
        return ticket


def main() -> int:
    """The process."""
    from dsv3_jax.serving.chat import ChatTemplate
    from dsv3_jax.serving.command import serve
    from dsv3_jax.serving.filter import load_filter
    from dsv3_jax.serving.service import ServedModel
    from dsv3_jax.serving.settings import Settings

    chat_format, *rest = sys.argv[1:]
    tokenizer = Tokenizer.deepseek()
    return serve(
        ServedModel(tokenizer, tokenizer.vocab_size, 0, ChatTemplate(tokenizer, chat_format)),
        Settings(model_id=MODEL),
        lambda: ScriptedEngine(tokenizer, chat_format),
        host="127.0.0.1",
        port=0,
        context=4096,
        content_filter=load_filter(rest[0]) if rest else None,
    )


if __name__ == "__main__":
    from dsv3_jax.errors import run_main

    run_main(main)
