"""What transformers makes of conversations by chat templates.

    python tests/golden/chat/make.py

Made with transformers 5.24.0 and jinja2 3.1.6. The templates are our own: each writes turns as its family
does, with the constructs that the family's template uses (templates of models are their authors').
"""

import json
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather in a <place> & "time" – now',
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "  Answer shortly.\n"}
SAID = {"role": "assistant", "content": "Paris."}
AGAIN = {"role": "user", "content": "And of <b>Česko</b> & 日本?\n"}
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "n": 1}},
}
CONVERSATIONS = {
    "one": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "turns": {"messages": [USER, SAID, AGAIN]},
    "system_turns": {
        "messages": [SYSTEM, USER, SAID, AGAIN, {"role": "assistant", "content": " Praha, 東京 "}]
    },
    "twice": {"messages": [USER, USER]},
    "thought": {
        "messages": [
            USER,
            {"role": "assistant", "content": "<think>\nFrance...\n</think>\n\nParis."},
            AGAIN,
            {
                "role": "assistant",
                "content": "Praha",
                "reasoning_content": "\nČesko...\n",
                "tool_calls": None,
            },
        ]
    },
    "thinking": {"messages": [USER, {"role": "assistant", "content": "Paris.", "thinking": "Hm."}]},
    "not_thinking": {"messages": [USER], "enable_thinking": False},
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3 °C", "tool_call_id": "a"},
            {"role": "tool", "content": "4 °C", "tool_call_id": "b"},
        ],
        "tools": [TOOL],
    },
    "documents": {"messages": [SYSTEM, USER], "documents": [{"title": "Tall <penguins>", "text": 3}]},
    "date": {"messages": [USER], "date_string": "1 Jan 2020"},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": " What?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And "},
                    {"type": "image"},
                    {"type": "stop"},
                    {"type": "text", "text": "not this"},
                ],
            },
        ]
    },
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PARTS = ("gemma3", "parts")
"""Templates that take parts; the others are shown conversations of texts."""


def main() -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL.values())}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    made: dict[str, dict[str, dict[str, str]]] = {}
    for file in sorted((HERE / "templates").glob("*.jinja")):
        for name, conversation in CONVERSATIONS.items():
            if (name == "parts" and file.stem not in PARTS) or (name != "parts" and file.stem == "parts"):
                continue
            for prompted in (True, False):
                try:
                    text = tokenizer.apply_chat_template(
                        conversation["messages"],
                        chat_template=file.read_text(encoding="utf-8"),
                        tokenize=False,
                        add_generation_prompt=prompted,
                        **{key: value for key, value in conversation.items() if key != "messages"},
                    )
                    found = {"text": text}
                except (TemplateError, TypeError) as error:
                    found = {"error": str(error)}
                made.setdefault(file.stem, {})[f"{name} {prompted}"] = found
    all_of_it = {"special_tokens": SPECIAL, "conversations": CONVERSATIONS, "made": made}
    (HERE / "rendered.json").write_text(json.dumps(all_of_it, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
