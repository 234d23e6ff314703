"""Makes hflm.json: what lm-evaluation-harness' own Hugging Face model says of a small random model.

    python -m tests.golden.harness.make folder FOLDER    # in this project's environment: writes the model
    python make.py hflm FOLDER                           # where torch, transformers and lm_eval are

The model is made anew by tests/evaluation/harness_model.py; the file holds requests and answers alone.
"""

import json
import sys
from pathlib import Path

OUT = Path(__file__).parent / "hflm.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = [
    ("hello", " you"),
    ("hello", " me there"),
    ("a", "b"),
    ("", "cde"),
    ("ab ", "cd"),
    ("what is it? ", "a dog"),
    (LETTERS + LETTERS, "qx"),
    ("q", LETTERS[:20]),
]
TEXTS = ["ab", LETTERS, LETTERS * 2 + " hello", "z"]
PROMPTS = [
    ("hello", {"until": ["?"], "max_gen_toks": 6}),
    (LETTERS * 2, {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}),
]


def hflm(folder: str) -> None:
    import lm_eval
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1, max_length=24)
    asked = lambda kind, several: [Instance(kind, {}, one, i) for i, one in enumerate(several)]
    found = {
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "loglikelihood": [
            [log_p, bool(greedy)] for log_p, greedy in model.loglikelihood(asked("loglikelihood", PAIRS))
        ],
        "loglikelihood_rolling": model.loglikelihood_rolling(
            asked("loglikelihood_rolling", [(text,) for text in TEXTS])
        ),
        "generate_until": model.generate_until(asked("generate_until", PROMPTS)),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    if what == "folder":
        from tests.evaluation.harness_model import write_model

        write_model(Path(folder))
    else:
        hflm(folder)
