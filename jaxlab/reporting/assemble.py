"""The page of any runs: which papers' sections they give, what is said above them, and what comes next."""

from collections.abc import Sequence
from typing import Any

from jaxlab.reporting import next_steps, other_runs
from jaxlab.reporting.folders import RunFolder
from jaxlab.reporting.formats import NONE, duration, size
from jaxlab.reporting.page import Section, page
from jaxlab.reporting.papers.label_words import section as label_words
from jaxlab.reporting.papers.nsa import long_input, retrofit
from jaxlab.reporting.papers.nsa import section as nsa
from jaxlab.reporting.papers.skill_injection import section as skill_injection

# Sections of papers in the order of the page, and what a page without them says is missing.
_PARTS = (
    (nsa, "native sparse attention", "a train run of text with NSA"),
    (long_input, "", ""),
    (skill_injection, "skill injection", "a merge-search run"),
    (label_words, "in-context learning", "an icl run"),
)


def render(runs: Sequence[RunFolder], left_out: Sequence[str] = ()) -> str:
    """The page of these runs; it names what is wrong with those that are `left_out`."""
    return compose(runs, build_sections(runs), left_out)


def split_by_form(runs: Sequence[RunFolder]) -> tuple[list[RunFolder], list[str]]:
    """The runs that a page can be made of, and of the others what is wrong: their results are JSON, and not
    what their task writes."""
    whole, left_out = [], []
    for run in runs:
        try:
            build_sections([run])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            left_out.append(f"{run.path}: its results are not those of the task {run.task} ({error!r})")
        else:
            whole.append(run)
    return whole, left_out


def build_sections(runs: Sequence[RunFolder]) -> list[Section]:
    """The sections that these runs give, the one for runs of no other section last."""
    runs = [r for r in runs if r.task != "quickstart"]
    modules = [*(module for module, _, _ in _PARTS), retrofit]
    sections = [section for module in modules if (section := module.build(runs))]
    told = {id(r) for section in sections for r in section.runs}
    more = other_runs.build([r for r in runs if id(r) not in told])
    if sections and more:
        more.kicker, more.title = "Besides", "Other runs"
    return sections + ([more] if more else [])


def compose(runs: Sequence[RunFolder], sections: Sequence[Section], left_out: Sequence[str] = ()) -> str:
    """The page of sections that `build_sections` made of these runs; it names what is wrong with those that
    are `left_out`."""
    whole = next((r for r in runs if r.task == "quickstart"), None)
    rest = [r for r in runs if r is not whole]
    keys = {section.key for section in sections}
    parts = [section for section in sections if section.verdicts]
    notes = []
    if parts or whole:
        notes = [_loaded(rest)]
        if whole and whole.setting("smoke"):
            notes.insert(0, "A smoke test: a few steps of everything. Its numbers and verdicts mean nothing.")
        notes += [
            f"Not on this page: {words}. It needs {needs}."
            for m, words, needs in _PARTS
            if words and m.KEY not in keys
        ]
    notes += [f"Not on this page, {problem}." for problem in left_out]
    shown = [*sections, next_steps.build()] if parts or whole else sections
    return page(_title(parts, sections), _lede(parts), _header(whole, rest), shown, notes)


def _title(parts: Sequence[Section], sections: Sequence[Section]) -> str:
    if len({part.kicker for part in parts}) > 1:
        return "Sparse attention, injected skills and information flow, on one model"
    return sections[0].title if sections else "Runs"


def _lede(parts: Sequence[Section]) -> str:
    if not parts:
        return "Curves and numbers, as the runs wrote them."
    papers = len({part.kicker for part in parts})
    which = ["A paper", "Two papers", "Three papers"][papers - 1]
    return (
        f"{which} in miniature, re-obtained with small models trained on this machine: what each claims, "
        "and what was seen here, including where it was not."
    )


def _header(whole: RunFolder | None, runs: Sequence[RunFolder]) -> list[tuple[str, Any]]:
    """Facts about the machine, the code and the runs; where these differ, all are named."""
    envs = [r.env for r in ([whole] if whole else [])] + [r.env for r in runs]

    def every(*keys: str) -> str:
        values = {" × ".join(str(env[k]) for k in keys) for env in envs if all(k in env for k in keys)}
        return "; ".join(sorted(values)) or NONE

    versions = envs[0].get("versions", {}) if envs else {}
    commits = {
        f"{env['commit'][:10] or 'no commit'}{' + changes' if env.get('dirty') else ''}"
        for env in envs
        if "commit" in env
    }
    times = [r.seconds for r in runs if r.seconds is not None]
    started = sorted(env["started"] for env in envs if "started" in env)
    pairs = [
        ("device", every("device_count", "device_kind")),
        ("system", every("system")),
        (
            "versions",
            ", ".join(
                f"{name} {versions[name]}" for name in ("python", "jax", "flax", "numpy") if name in versions
            ),
        ),
        ("commit", "; ".join(sorted(commits)) or NONE),
        ("date", started[0].replace("T", " ").replace("+00:00", " UTC") if started else NONE),
        ("time", duration(sum(times)) + " in runs" if times else NONE),
    ]
    if whole:
        reused = sum(bool(stage.get("reused")) for stage in whole.get("stages") or [])
        before = f"; {reused} stages were done before" if reused else ""
        pairs[-1] = ("total time", duration(whole.get("seconds")) + before)
        pairs.append(("peak memory", size(whole.get("peak_memory_bytes"))))
    return pairs


def _loaded(runs: Sequence[RunFolder]) -> str:
    """Which models were read that no run on the page made."""
    makers = [r for r in runs if r.task in ("train", "merge-search")]
    used: dict[str, None] = {}
    for r in runs:
        for key in ("init_from", "model", "vlm", "expert", "base"):
            value = r.setting(key)
            if isinstance(value, str) and value and not any(maker.is_named_by(value) for maker in makers):
                by = r.get("made_by", "config")
                used[f"{value} ({f'made by {by}, ' if by else ''}read by {r.label})"] = None
    if used:
        listed = ", ".join(used)
        return (
            f"Loaded, not trained in these runs: {listed}. Every other model on this page was trained by a "
            "run named on it."
        )
    return "Every model on this page was trained by a run named on it; none was loaded."
