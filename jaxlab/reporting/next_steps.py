"""What a reader can do next with a model of his own: the last section of the page."""

from jaxlab.reporting.markup import tag
from jaxlab.reporting.page import Section, paragraph

STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Your model is a Hugging Face folder or hub id, a GGUF file or a run. See what it is; let it speak.",
        ("python run.py inspect MODEL", 'python run.py generate MODEL --prompt "Once upon a time"'),
    ),
    (
        "Time sparse attention on your device and at your length.",
        ("python run.py attention-speed configs/quickstart/nsa_speed.yaml --lengths 16384 32768",),
    ),
    (
        "Train a sparse model on your own text files, or make a dense model sparse (docs/retrofit.md).",
        (
            "python run.py train configs/quickstart/nsa_sparse.yaml --data.path FILE --steps 1000",
            "python run.py train configs/nsa/retrofit.yaml --check",
        ),
    ),
    (
        "Inject an expert into a vision-language model of the same base. The recipe that ships takes the "
        "models of this page; name your own in a copy, and look first what headers alone tell.",
        (
            "python run.py merge configs/merging/inject.yaml --out merged --verify",
            "python run.py merge RECIPE.yaml --out merged --check",
        ),
    ),
    (
        "Look at information flow in a model that learns in context; docs/information_flow.md has it for any "
        "model from Python.",
        ("python run.py icl configs/quickstart/icl_analysis.yaml --blocking.layers 1 2",),
    ),
    (
        "Put any finished runs on a page like this one.",
        ("python run.py report outputs/train/RUN --out my_page.html",),
    ),
)
"""Words, and commands; what is in capitals is the reader's."""


def build() -> Section:
    section = Section("next", "Next", "With your own model", None)
    for words, commands in STEPS:
        section.body.append(paragraph(words))
        section.body += [tag("code", command, class_="command") for command in commands]
    return section
