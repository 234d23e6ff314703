"""A real language model inside a VLM, and skills injected into it: what configs/injection/smollm2 needs.

    python docs/injection_smollm2.py                            # all of it; points go on where they were
    python docs/injection_smollm2.py --until vlm                # up to a point
    python docs/injection_smollm2.py --base MODEL.gguf --mini   # a few steps of each, to see that it runs
    python docs/injection_smollm2.py --page                     # the page alone, from docs/results

The pictures are scikit-learn's scans of handwritten digits in four colors. As a VLM's usually is, the vision
tower is trained on pictures first: the mean of an image's tokens is drawn to the embeddings of the words that
name its digit and its color. The VLM is then asked about pictures in English words; the experts are taught on
text alone, which tells digit and color in words: another language, an output format, sums. Whether a skill
has reached pictures is asked about pictures that no training saw.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.files import write_atomic, write_json

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONFIGS = Path("configs/injection/smollm2")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FRENCH = ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "white": (235, 235, 235)}
SIDE = 64
"""Pixels a side."""
TOWER_STEPS = 2000
HELD_OUT = 200
"""Pictures that are asked about at the end: a quarter of them to choose by, the others to measure on."""
SKILLS = ("french", "format", "arithmetic")
POINTS = (
    *("data", "start", "tower", "vlm"),
    *(f"expert_{s}" for s in SKILLS),
    *(f"search_{s}" for s in SKILLS),
    "page",
)
DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "injection_smollm2.json"


def question(skill: str, digit: int, color: str, number: int) -> tuple[str, str]:
    """What is asked, and the right answer; `number` makes questions vary."""
    match skill:
        case "words":
            return "Which digit is it? Answer with a word.", DIGITS[digit]
        case "color":
            return "What color is the digit?", color
        case "french":
            return "Quel est ce chiffre ? Réponds par un mot.", FRENCH[digit]
        case "format":
            return 'Answer in JSON, with the keys "color" and "digit".', json.dumps(
                {"color": color, "digit": digit}
            )
        case _:
            more = number % 9 + 1
            return f"How much is the digit plus {more}? Answer with a number.", str(digit + more)


def told(digit: int, color: str, number: int) -> str:
    """A picture in words, for models that see none."""
    return (
        f"The picture shows a {color} {DIGITS[digit]}.",
        f"There is a handwritten {DIGITS[digit]} in {color}.",
        f"One sees the digit {DIGITS[digit]}, written in {color}.",
    )[number % 3]


def write_data(folder: Path) -> None:
    """Pictures, conversations to learn and questions to ask; all follow from scikit-learn's digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = list(COLORS)
    rows: dict[str, list[dict]] = {"vlm": [], **{skill: [] for skill in SKILLS}}
    asked: dict[str, list[dict]] = {f"image_{s}": [] for s in ("words", *SKILLS)} | {
        f"text_{s}": [] for s in SKILLS
    }
    for number, index in enumerate(order):
        digit, color = int(found.target[index]), names[number % 4]
        pixels = np.kron(found.images[index] / 16, np.ones((SIDE // 8, SIDE // 8)))[..., None]
        image = (pixels * np.asarray(COLORS[color])).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        name, text = f"images/{number}.png", told(digit, color, number)
        if number < HELD_OUT:
            for skill in ("words", *SKILLS):
                prompt, answer = question(skill, digit, color, number)
                asked[f"image_{skill}"].append({"prompt": prompt, "image": name, "answer": answer})
                if skill in SKILLS:
                    asked[f"text_{skill}"].append({"prompt": f"{text} {prompt}", "answer": answer})
            continue
        for skill in ("words", "color"):
            prompt, answer = question(skill, digit, color, number)
            turns = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
            rows["vlm"].append({"image": name, "conversations": turns})
        for skill in SKILLS:
            prompt, answer = question(skill, digit, color, number)
            turns = [
                {"role": "user", "content": f"{text} {prompt}"},
                {"role": "assistant", "content": answer},
            ]
            rows[skill].append({"messages": turns})
    for name, lines in {**rows, **asked}.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def train_tower(start: Path, folder: Path, out: Path, steps: int) -> float:
    """Tower and projector of `start` before the language model reads them, written to `out` with the rest.

    Returns:
      How many of the last 200 pictures to learn from, which were kept from it, are told right, digit and
      color.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlab.checkpoints import open_model, save_model
    from jaxlab.models import encode_images

    opened = open_model(start)
    config, tokenizer, params = opened.config, opened.tokenizer, opened.read()
    seen = [json.loads(line) for line in (folder / "vlm.jsonl").read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["image"] for row in seen))
    said = [row["conversations"][1]["value"] for row in seen]  # of each picture its digit, then its color
    labels = np.asarray(
        [[DIGITS.index(d), list(COLORS).index(c)] for d, c in zip(said[::2], said[1::2], strict=True)]
    )
    images = [opened.processor("<image>", [folder / name], tokenizer)["images"] for name in names]
    images, kept = np.concatenate(images), 200
    words = [np.asarray([tokenizer.encode(f" {w}").ids[0] for w in group]) for group in (DIGITS, COLORS)]
    table = params["embedding"]["table"]
    apart = [table[group] - table[group].mean(0) for group in words]
    tables = [t / jnp.linalg.norm(t, axis=1, keepdims=True) for t in apart]
    eyes = {name: params[name] for name in ("vision", "projector")}
    rate = optax.warmup_cosine_decay_schedule(0, 1e-3, min(40, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05))

    def logits(eyes, images):
        tokens = encode_images(eyes, {"images": images}, config).tokens
        mean = tokens.reshape(len(images), -1, config.width).mean(1)
        return [20 * (mean / jnp.linalg.norm(mean, axis=1, keepdims=True)) @ t.T for t in tables]

    def loss(eyes, images, labels):
        found = logits(eyes, images)
        return sum(
            optax.softmax_cross_entropy_with_integer_labels(f, labels[:, i]).mean()
            for i, f in enumerate(found)
        )

    @jax.jit
    def step(eyes, state, images, labels):
        updates, state = optimizer.update(jax.grad(loss)(eyes, images, labels), state, eyes)
        return optax.apply_updates(eyes, updates), state

    rng, state = np.random.default_rng(0), optimizer.init(eyes)
    pixel = SIDE // 8
    for _ in range(steps):
        chosen = rng.integers(len(images) - kept, size=64)
        moved = [np.roll(images[i], rng.integers(-1, 2, 2) * pixel, axis=(-2, -1)) for i in chosen]
        eyes, state = step(eyes, state, np.stack(moved), labels[chosen])
    right = np.ones(kept, bool)
    for i, found in enumerate(jax.jit(logits)(eyes, images[-kept:])):
        right &= np.asarray(found).argmax(1) == labels[-kept:, i]
    save_model(
        out,
        config,
        {**params, **eyes},
        tokenizer,
        form="huggingface",
        source_files=opened.source_files,
        inputs=opened.inputs,
        overwrite=True,
    )
    return float(right.mean())


def commands(base: str, outputs: Path, mini: bool) -> dict[str, list[str]]:
    """The words after `python run.py` of each point but the first."""
    short = {"steps": 3, "log_every": 1, "eval_every": 3, "eval_batches": 1, "checkpoint_every": 3}
    small = [f"--{name}={value}" for name, value in {**short, "batch_size": 2}.items()]
    start, there = outputs / "start", ["--outputs", str(outputs)]
    data = lambda name: ["--data.path", str(outputs / "data" / name)]
    # 4 tokens an image, of 4 x 4 of the scan's pixels each: smaller patches learn more slowly.
    tower = ["--tower.patch_size", "32", "--tower.num_layers", "2"]
    found = {"start": ["build-vlm", base, str(start), "--family", "llava", *tower, "--overwrite"]}
    seeing = str(outputs / "tower")
    vlm = ["--init_from", seeing, "--data.model", seeing, *data("vlm.jsonl")]
    found["vlm"] = ["train", str(CONFIGS / "vlm.yaml"), *vlm, *there, *(small if mini else [])]
    for skill in SKILLS:
        source = f"[{{path: {outputs / 'data' / f'{skill}.jsonl'}, content: chat}}]"
        words = ["--init_from", base, "--data.tokenizer", base, "--data.sources", source]
        words += ["--data.chat_template", str(start / "chat_template.jinja")]  # the VLM's own
        config = str(CONFIGS / f"expert_{skill}.yaml")
        found[f"expert_{skill}"] = ["train", config, *words, *there, *(small if mini else [])]
        ask = lambda name, skill=skill: f"--evaluate.{name}.path={outputs / 'data' / f'{name}.jsonl'}"
        names = ("image_words", f"image_{skill}", f"text_{skill}")
        few = [f"--evaluate.{name}.limit=2" for name in names] if mini else []
        points = ["--operators", "{task_arithmetic: {lambda_v: [1.0], lambda_e: [0.5, 1.0]}}"] if mini else []
        search = ["--base", base, *map(ask, names), *few, *points]
        found[f"search_{skill}"] = ["merge-search", str(CONFIGS / f"search_{skill}.yaml"), *search, *there]
    return found


def collect(outputs: Path) -> dict:
    """What the searches found, as a study."""
    from jaxlab.reporting.papers.skill_injection.study import records_of

    told: dict = {
        "models": "SmolLM2-135M in a VLM (one seed)",
        "command": "python docs/injection_smollm2.py",
        "unmerged": [],
        "records": [],
        "examples": [],
    }
    for skill in SKILLS:
        run = trained(outputs, f"search_{skill}", "merge-search")
        env = json.loads((run / "env.json").read_text(encoding="utf-8"))
        changes = ", with changes" if env["dirty"] else ""
        origin = f"Commit {env['commit'][:10]}{changes}, {env['device_kind']}"
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        unmerged, records = records_of(skill, 0, results, origin)
        told["unmerged"].append(unmerged)
        told["records"] += records
        said = [[e["question"], e["expected"], *e["answers"].values()] for e in results["examples"]]
        said = [row for i, row in enumerate(said) if row not in said[:i]]
        told["examples"].append({"skill": skill, "operator": results["best"]["operator"], "said": said})
    return told


def write_page(told: dict, docs: Path) -> None:
    """Writes injection_smollm2.md and its figures."""
    from jaxlab.reporting.papers.skill_injection import study_page as pages
    from jaxlab.reporting.papers.skill_injection.study import Study

    study = Study(told)
    folder = docs / "injection_smollm2"
    folder.mkdir(exist_ok=True)
    pages.save_figure(study, "weights", folder)
    settings = len(told["records"][0]["points"])
    at_edges = ", ".join(f"`{label}` {study.at_an_edge(label)}" for label in study.ranked())
    weights = "Task arithmetic: accuracy in per cent by both weights, validation split."
    lines = [
        "# Skill injection on a real language model",
        "",
        "<!-- Written by `python docs/injection_smollm2.py --page` from docs/results. -->",
        "",
        *pages.wrapped(
            f"""SmolLM2-135M-Instruct becomes a VLM that sees handwritten digits in four colors and answers in
            English words; three experts are fine-tuned from SmolLM2 by LoRA on text alone. Each is injected
            into the VLM by {len(study.records)} operators with {settings} settings each. The setting that is
            best on {HELD_OUT // 4} validation questions is measured on {HELD_OUT - HELD_OUT // 4} others;
            numbers are exact match in per cent. The language model is real; the pictures, the questions and
            the single seed make it a small study all the same."""
        ),
        "## Operators and scenarios",
        "",
        *pages.scenario_table(study),
        *pages.wrapped(
            f"""The chosen weights are the least or the greatest of their list, so that better ones may lie
            beyond it, in so many of {len(study.cells)} scenarios: {at_edges}. One digit in ten, six, is
            the same word in French and in English."""
        ),
        "## The claims",
        "",
        *pages.claims(study),
        "",
        f"![{weights}](injection_smollm2/weights.svg)",
        "",
        f"*{weights}*",
        "",
        "## What it says",
        "",
        *examples(told["examples"]),
        "## How it was made",
        "",
        f"`{told['command']}`. {'; '.join(study.origins)}.",
    ]
    write_atomic(docs / "injection_smollm2.md", "\n".join(lines) + "\n")


def examples(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each skill some questions about pictures, what was expected and what was said."""
    lines = ["| question about a picture | expected | the VLM alone | injected |", "|---|---|---|---|"]
    plain = lambda text: " ".join(text.replace("|", "/").replace("`", "'").split())
    for one in found:
        for question, *texts in one["said"]:
            told = f"{plain(question.replace('<image>', ''))} (`{one['operator']}`)"
            lines.append(f"| {told} | {' | '.join(f'`{plain(text)}`' for text in texts)} |")
    return [*lines, ""]


def trained(outputs: Path, point: str, task: str = "train") -> Path:
    """The newest run of a point that is done.

    Raises:
      SystemExit: there is none.
    """
    done = [path.parent for path in (outputs / task).glob(f"{point}-*/results.json")]
    if not done:
        raise SystemExit(f"{point} is not done in {outputs}; run it first")
    return max(done, key=lambda path: path.stat().st_mtime)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--outputs", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--mini", action="store_true")
    parser.add_argument("--only", choices=POINTS)
    parser.add_argument("--until", choices=POINTS)
    parser.add_argument("--page", action="store_true", help="write the page from docs/results alone")
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")), DOCS)
        return
    outputs = arguments.outputs
    words = commands(arguments.base, outputs, arguments.mini)
    last = POINTS.index(arguments.until) + 1 if arguments.until else len(POINTS)
    for point in [arguments.only] if arguments.only else POINTS[:last]:
        began = time.monotonic()
        if point == "data":
            write_data(outputs / "data")
        elif point == "page":
            told = collect(outputs)
            if not arguments.mini:
                write_json(RESULTS, told)
                write_page(told, DOCS)
        elif point in ("start", "tower") and (outputs / point / "config.json").exists():
            pass
        elif point == "tower":
            steps = 3 if arguments.mini else TOWER_STEPS
            right = train_tower(outputs / "start", outputs / "data", outputs / "tower", steps)
            print(f"tower: {right:.0%} of pictures it did not learn from are told right")
        else:
            line = words[point]
            if point.startswith("search_"):
                expert = trained(outputs, f"expert_{point.removeprefix('search_')}")
                line += ["--vlm", str(trained(outputs, "vlm")), "--expert", str(expert)]
            print("python run.py", shlex.join(line), flush=True)
            subprocess.run([sys.executable, "run.py", *line], check=True)
        print(f"{point}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
