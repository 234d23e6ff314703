"""From outcomes to what a person reads in a minute, what a program reads, and the record of the kernels."""

import dataclasses
from typing import Any

from first_contact_parts.runner import Outcome
from first_contact_parts.steps import Row

MOST_LINES = 30


def result(outcomes: list[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """For results.json."""
    return {**facts, "steps": [dataclasses.asdict(o) | {"all_right": o.all_right} for o in outcomes]}


def rows(outcomes: list[Outcome], step: str = "") -> list[Row]:
    return [row for o in outcomes if step in ("", o.step) for row in o.rows]


def facts(outcomes: list[Outcome]) -> Row:
    found: Row = {}
    for row in rows(outcomes):
        found |= row.get("fact", {})
    return found


def summary(outcomes: list[Outcome], seconds: float, budget_s: float) -> str:
    """Markdown that can be read as it is."""
    known = facts(outcomes)
    lines = [
        f"# First contact: {known.get('device_kind', 'no device seen')}",
        "",
        f"jax {known.get('jax', '?')}, driver {known.get('driver', '?')}, {seconds:.0f} s of {budget_s:g} s.",
    ]
    if "copy_bytes_per_s" in known or "product_flops_per_s" in known:
        copy, product = (known.get(n, float("nan")) for n in ("copy_bytes_per_s", "product_flops_per_s"))
        lines += ["", f"Ceilings: copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s."]
    lines += ["", "| step | result | s |", "|---|---|---|"]
    lines += [f"| {o.step} | {_verdict(o)} | {o.seconds:.0f} |" for o in outcomes]
    if wrong := [(o.step, row) for o in outcomes for row in o.wrong]:
        lines += ["", f"## Wrong: {len(wrong)}", ""]
        lines += [f"- {_wrong(step, row)}" for step, row in wrong[:MOST_LINES]]
        if len(wrong) > MOST_LINES:
            lines.append(f"- and {len(wrong) - MOST_LINES} more in results.json")
    lines += _largest_errors(outcomes) + _times(outcomes)
    if reasons := [(o.step, row) for o in outcomes for row in o.rows if "reason" in row]:
        lines += ["", "## Not there", ""]
        lines += [f"- {step}, {row['name']}: {row['reason']}" for step, row in reasons[:MOST_LINES]]
    if dropped := [o for o in outcomes if o.dropped]:
        lines += ["", "## Dropped", "", *(f"- {o.step}: {o.dropped}" for o in dropped)]
    if (made := record(outcomes)) is not None:
        good = sum(e["right"] for e in made["entries"])
        lines += ["", f"record.json: {good} of {len(made['entries'])} kernels are right on this device."]
    return "\n".join(lines) + "\n"


def _verdict(outcome: Outcome) -> str:
    if outcome.dropped:
        return f"dropped: {outcome.dropped}"
    checks = [row for row in outcome.rows if "right" in row]
    parts = []
    if checks:
        parts.append(f"{sum(row['right'] for row in checks)} of {len(checks)} right")
    for what, told in (
        ("seconds", "timed"),
        ("failed", "FAILED"),
        ("cut", "cut off"),
        ("reason", "not there"),
    ):
        if count := sum(what in row for row in outcome.rows):
            parts.append(f"{count} {told}")
    if any("fact" in row for row in outcome.rows) and not parts:
        parts.append("done")
    return ", ".join(parts) or "nothing was found"


def _wrong(step: str, row: Row) -> str:
    name = " / ".join(dict.fromkeys(x for x in (row.get("case", ""), row.get("item", ""), row["name"]) if x))
    if "failed" in row:
        return f"{step}, {name}: FAILED: {row['failed']}"
    if "cut" in row:
        return f"{step}, {name}: cut off: {row['cut']}"
    return f"{step}, {name}: error {row.get('error', float('nan')):.2e}; {row.get('detail', '')}"


def _largest_errors(outcomes: list[Outcome]) -> list[str]:
    """A line for each case of the correctness."""
    cases: dict[str, list[Row]] = {}
    for row in rows(outcomes, "correctness"):
        if "right" in row:
            cases.setdefault(row.get("case", ""), []).append(row)
    if not cases:
        return []
    lines = ["", "## Errors beside XLA in float32 (RMS, the largest of each case)", ""]
    lines += ["| case | right | largest | of |", "|---|---|---|---|"]
    for case, found in cases.items():
        worst = max(found, key=lambda row: row["error"])
        good = sum(row["right"] for row in found)
        lines.append(f"| {case} | {good} of {len(found)} | {worst['error']:.1e} | {worst['name']} |")
    return lines


PARTS = ("forward", "backward")


def _times(outcomes: list[Outcome]) -> list[str]:
    """Milliseconds and the share of the ceiling; forward and backward of one thing in one line."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows(outcomes):
        if "seconds" in row:
            name, _, part = row["name"].rpartition(", ")
            name, part = (name, part) if part in PARTS else (row["name"], PARTS[0])
            share = f" ({row['floor_s'] / row['seconds']:.0%})" if row.get("floor_s") else ""
            lines.setdefault(name, {})[part] = f"{1e3 * row['seconds']:.3f}{share}"
    if not lines:
        return []
    found = ["", "## Times, ms (share of the ceiling: of products, for one token of bytes)", ""]
    found += ["| what | forward, or all of it | backward |", "|---|---|---|"]
    return found + [f"| {n} | {x.get(PARTS[0], '')} | {x.get(PARTS[1], '')} |" for n, x in lines.items()]


def record(outcomes: list[Outcome]) -> dict[str, Any] | None:
    """A record of kernels (kernels_pallas/nsa/records), as the correctness made it; None without one."""
    known = facts(outcomes)
    pieces = [row for row in rows(outcomes, "correctness") if "record" in row]
    failures = [row for row in rows(outcomes, "correctness") if "failed" in row or "cut" in row]
    if not pieces or "kernels" not in known:
        return None
    right: dict[str, Row] = {}
    for row in pieces:
        for entry in row["record"]:
            name = str([entry[n] for n in ("operator", "dtype", "group", "key_dim", "value_dim")])
            before = right.setdefault(name, dict(entry))
            before["right"] = before["right"] and entry["right"]
    for row in failures:
        for entry in right.values():
            entry["right"] = entry["right"] and not _concerns(row, entry)
    return {
        "format": 1,
        "device_kind": known["device_kind"],
        "versions": {n: str(known[n]) for n in ("jax", "jaxlib", "driver", "python") if n in known},
        "kernels": known["kernels"],
        "entries": [right[name] for name in sorted(right)],
        "facts": {"cases": sorted({row.get("case", "") for row in pieces})},
    }


def _concerns(row: Row, entry: Row) -> bool:
    """Whether a check that gave nothing would have been about these kernels; of an unknown one: yes. A kernel
    is not right because other lengths were."""
    about = (row.get("item") or row["name"]).split(" | ")
    if len(about) < 5:
        return True
    _, dtype, group, dims, _, *part = about
    key_dim, value_dim = dims.split("/")
    same = (dtype, group, key_dim) == (
        entry["dtype"],
        f"{entry['group']} heads a group",
        str(entry["key_dim"]),
    )
    same = same and str(entry["value_dim"]) in ("0", value_dim)
    return same and (not part or (part[0] == "decode") == entry["operator"].startswith("cached"))
