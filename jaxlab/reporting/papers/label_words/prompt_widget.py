"""The paper's figure 1 to play with: a prompt whose flows are arcs over its own text, layer by layer.

Everything is in the page: nothing is loaded from elsewhere. Texts of tokens go into the page as JSON and from
there into text nodes, never into markup.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlab.icl import pack_maps
from jaxlab.reporting.markup import Markup, join, tag
from jaxlab.reporting.style import CSS

Results = Mapping[str, Any]

KINDS = {
    "label": "label words",
    "last": "the last token",
    "format": "format",
    "image": "the image",
    "text": "text",
}
SETS = {
    "wp": "into label words (S_wp)",
    "pq": "label words to the last token (S_pq)",
    "ww": "all others (S_ww)",
}
SETS_OF_IMAGES = {"wp": "from the image", "pq": "from the instruction to the last token", "ww": "all others"}
"""Of prompts without label words, in the same colours."""


def prompt_widget(results: Results, number: int = 0) -> Markup:
    """The figure as a part of a page.

    Args:
      results: of an `icl` run with figure1.
      number: unique on the page.
    """
    data = json.dumps(_data(results["figure1"]), ensure_ascii=True).replace("<", "\\u003c")
    name = f"flow-{number}"
    sets = SETS if results["figure1"]["labels"] else SETS_OF_IMAGES
    legend = tag(
        "p",
        *(
            tag(
                "label",
                tag(
                    "input",
                    type="checkbox",
                    class_=f"flow-set {key}",
                    **({"checked": "checked"} if on else {}),
                ),
                f" {text}",
            )
            for key, text, on in (
                ("wp", sets["wp"], True),
                ("pq", sets["pq"], True),
                ("ww", f"{sets['ww']}, drawn fainter", True),
                ("first", "from the first token, on which attention rests", False),
            )
        ),
        class_="flow-legend",
    )
    slider = lambda what, label, **rest: tag(
        "label", tag("span", label), tag("input", type="range", class_=what, **rest), tag("output")
    )
    controls = tag(
        "p",
        slider("flow-layer", "Layer", min="0", max="1", value="0"),
        slider("flow-least", "Arcs of each colour", min="5", max="200", value="40"),
        tag("button", "Play", type="button", class_="flow-play"),
        class_="flow-controls",
    )
    return join(
        [
            tag(
                "div",
                controls,
                legend,
                tag("div", tag("div", class_="flow-text"), class_="flow-stage"),
                tag("p", class_="flow-told", aria_live="polite"),
                tag("script", Markup(data), type="application/json"),
                id=name,
                class_="flow",
            ),
            tag("style", Markup(STYLE)),
            tag("script", Markup(SCRIPT)),
            tag("script", Markup(f'flowFigure(document.getElementById("{name}"));')),
        ]
    )


def prompt_page(results: Results, title: str) -> str:
    """A page of its own, with nothing but the figure."""
    prompt = results["figure1"]
    said = f"The answer is {prompt['answer']}, the model says {prompt['prediction']}."
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", EXPLAINED, " ", said), class_="top"),
        tag("main", prompt_widget(results)),
    )
    return join([Markup("<!doctype html>\n"), tag("html", head, body, lang="en")]) + "\n"


EXPLAINED = (
    "Arcs are flows from a token to a later one: its attention times the gradient of the loss to it. Thicker "
    "is stronger; the strongest of each colour are drawn, grey ones thinner than coloured ones of like "
    "strength. Point at a token to see its own flows and their values; click to keep it."
)


def _data(prompt: Results) -> dict[str, Any]:
    """What the script reads: tokens, their kinds, and the maps."""
    size, labels = len(prompt["tokens"]), set(prompt["labels"])
    told = prompt.get("parts") or ["text"] * size
    kind = lambda at: "last" if at == prompt["query"] else "label" if at in labels else told[at]
    maps = prompt["maps"]
    if not isinstance(
        maps, Mapping
    ):  # as they were before they were packed: rows of what is below the diagonal
        whole = np.zeros((len(maps), size, size), np.float32)
        for layer, rows in enumerate(maps):
            for i, row in enumerate(rows):
                whole[layer, i, : len(row)] = row
        maps = pack_maps(whole)
    kinds = [k if k in KINDS else "format" for k in map(kind, range(size))]
    return {"tokens": list(prompt["tokens"]), "kinds": kinds, "query": prompt["query"], "maps": dict(maps)}


STYLE = """
.flow { font-family: var(--sans); margin: 1.5rem 0; }
.flow-controls, .flow-legend { display: flex; flex-wrap: wrap; gap: 0.4rem 1.6rem; align-items: center;
  font-size: 0.85rem; margin: 0 0 0.5rem; max-width: none; }
.flow-controls label { display: flex; gap: 0.5rem; align-items: center; }
.flow-controls input { width: 13rem; accent-color: var(--accent); }
.flow-controls output { min-width: 5.5rem; font-variant-numeric: tabular-nums; color: var(--faint); }
.flow-play { font: inherit; color: var(--accent); background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: 0.15rem 0.8rem; cursor: pointer; }
.flow-set.wp { accent-color: var(--orange); } .flow-set.pq { accent-color: var(--blue); }
.flow-set.ww, .flow-set.first { accent-color: var(--faint); }
.flow-stage { position: relative; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 2.2rem 1.2rem 1rem; overflow: hidden; }
.flow-text { position: relative; z-index: 1; font: 0.9rem/2.7 var(--mono); overflow-wrap: anywhere; }
.flow-stage.dense .flow-text { font-size: 0.74rem; line-height: 2.3; }
.flow-token { white-space: pre-wrap; cursor: pointer; border-radius: 3px; padding: 0.12rem 0.05rem; }
.flow-token.label { color: var(--orange); font-weight: 700; }
.flow-token.image { color: var(--orange); }
.flow-token.last { color: var(--blue); font-weight: 700; }
.flow-token.format { color: var(--faint); }
.flow-token.on { outline: 2px solid var(--accent); }
.flow-token .mark { color: var(--faint); opacity: 0.7; }
.flow-stage svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.flow-stage path { fill: none; stroke-linecap: round; }
.flow-stage path.wp { stroke: var(--orange); } .flow-stage path.pq { stroke: var(--blue); }
.flow-stage path.ww, .flow-stage path.first { stroke: var(--faint); }
.flow-stage path.first { stroke-dasharray: 1 5; }
.flow-told { font: 0.82rem/1.5 var(--sans); color: var(--faint); min-height: 4.5em; margin: 0.6rem 0 0;
  max-width: none; white-space: pre-wrap; font-variant-numeric: tabular-nums; }
"""

SCRIPT = r"""
async function flowFigure(root) {
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const { tokens, kinds, query, maps } = data;
  const size = tokens.length, layers = maps.layers, pairs = size * (size - 1) / 2;
  const bytes = Uint8Array.from(atob(maps.data), c => c.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const steps = new Uint8Array(await new Response(inflated).arrayBuffer());
  const at = (i, j) => i * (i - 1) / 2 + j;
  const value = (layer, i, j) => (steps[layer * pairs + at(i, j)] / 255) ** 2 * maps.scale[layer];
  const labels = kinds.includes("label");
  const set = (i, j) => j === 0 ? "first" : labels ? (kinds[i] === "label" ? "wp"
    : i === query && kinds[j] === "label" ? "pq" : "ww")
    : kinds[j] === "image" ? "wp" : i === query && kinds[j] === "text" ? "pq" : "ww";
  const quiet = kind => kind === "ww" || kind === "first";
  const stage = root.querySelector(".flow-stage"), text = root.querySelector(".flow-text");
  const told = root.querySelector(".flow-told");
  const [layerInput, leastInput] = [".flow-layer", ".flow-least"].map(c => root.querySelector(c));
  layerInput.max = layers;
  const output = input => input.parentElement.querySelector("output");
  const shown = token => token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u2192");
  if (size > 120) stage.classList.add("dense");
  const spans = tokens.map((token, n) => {
    const span = document.createElement("span");
    span.className = "flow-token " + kinds[n];
    token.split("\n").forEach((part, k) => {
      if (k) {
        const mark = document.createElement("span");
        mark.className = "mark";
        mark.textContent = "\u21b5";
        span.append(mark, document.createElement("br"));
      }
      span.append(part || (token ? "" : "\u00b7"));
    });
    text.append(span);
    return span;
  });
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  stage.append(svg);
  let held = null, over = null, flow = [];
  function sums() {  // of one layer, or the mean over all, each layer by its largest
    const layer = Number(layerInput.value);
    output(layerInput).textContent = layer ? `${layer} of ${layers}` : "all, mean";
    const found = new Float64Array(pairs);
    for (let l = 0; l < layers; l++) {
      if (layer && l !== layer - 1) continue;
      for (let p = 0; p < pairs; p++) {
        const part = (steps[l * pairs + p] / 255) ** 2;
        found[p] += layer ? part * maps.scale[l] : part / layers;
      }
    }
    flow = [];
    for (let i = 1; i < size; i++) for (let j = 0; j < i; j++)
      if (found[at(i, j)] > 0) flow.push([found[at(i, j)], i, j, set(i, j)]);
    flow.sort((a, b) => b[0] - a[0]);
  }
  function draw() {
    const on = new Set([...root.querySelectorAll(".flow-set")].filter(b => b.checked)
      .map(b => b.classList[1]));
    const token = over ?? held, most = Number(leastInput.value);
    if (token !== null) on.add("first");
    let chosen = flow.filter(f => on.has(f[3]) && (token === null || f[1] === token || f[2] === token));
    const largest = chosen.length ? chosen[0][0] : 1;
    const drawn = {};
    chosen = chosen.filter(f => (drawn[f[3]] = (drawn[f[3]] ?? 0) + 1) <= most);
    chosen.sort((a, b) => quiet(b[3]) === quiet(a[3]) ? a[0] - b[0] : quiet(a[3]) ? -1 : 1);
    output(leastInput).textContent = `at most ${most}`;
    const box = stage.getBoundingClientRect();
    const place = n => {
      const drawn = [...spans[n].getClientRects()].filter(r => r.width);
      const r = drawn.at(-1) ?? spans[n].getBoundingClientRect();
      return [r.left + r.width / 2 - box.left, r.top - box.top, r.bottom - box.top];
    };
    svg.replaceChildren(...chosen.map(([strength, i, j, kind]) => {
      const [x1, top1] = place(j), [x2, top2] = place(i);
      const same = Math.abs(top1 - top2) < 4;
      const lift = same ? Math.min(34, 8 + Math.abs(x2 - x1) / 9) : 26;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", `M${x1},${top1} C${x1},${top1 - lift} ${x2},${top2 - lift} ${x2},${top2}`);
      path.setAttribute("class", kind);
      const part = Math.sqrt(strength / largest), less = quiet(kind) && token === null ? 0.4 : 1;
      path.setAttribute("stroke-width", (0.5 + 4.5 * less * part).toFixed(2));
      path.setAttribute("stroke-opacity", (less * (0.2 + 0.65 * part)).toFixed(2));
      return path;
    }));
    spans.forEach((s, n) => s.classList.toggle("on", n === token));
    tell(token);
  }
  function tell(token) {
    if (token === null) {
      told.textContent = flow.slice(0, 5).map(([s, i, j]) =>
        `${JSON.stringify(shown(tokens[j]))} (${j}) \u2192 ${JSON.stringify(shown(tokens[i]))} (${i})  `
        + s.toExponential(2)).join("\n");
      return;
    }
    const of = (which, other) => flow.filter(f => f[which] === token).slice(0, 6).map(f =>
      `${JSON.stringify(shown(tokens[f[other]]))} (${f[other]}) ${f[0].toExponential(2)}`).join("   ");
    told.textContent = `${JSON.stringify(shown(tokens[token]))}, token ${token}, ${kinds[token]}\n`
      + `from: ${of(1, 2) || "nothing"}\nto: ${of(2, 1) || "nothing"}`;
  }
  const again = () => { sums(); draw(); };
  spans.forEach((span, n) => {
    span.addEventListener("pointerenter", () => { over = n; draw(); });
    span.addEventListener("pointerleave", () => { over = null; draw(); });
    span.addEventListener("click", () => { held = held === n ? null : n; draw(); });
  });
  layerInput.addEventListener("input", again);
  leastInput.addEventListener("input", draw);
  root.querySelectorAll(".flow-set").forEach(b => b.addEventListener("change", draw));
  let timer = null;
  const play = root.querySelector(".flow-play");
  play.addEventListener("click", () => {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "Play"; return; }
    play.textContent = "Stop";
    timer = setInterval(() => {
      layerInput.value = Number(layerInput.value) % layers + 1;
      again();
    }, 700);
  });
  new ResizeObserver(draw).observe(stage);
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("layer")) layerInput.value = asked.get("layer");
  if (asked.has("token")) held = Number(asked.get("token"));
  again();
  root.dataset.ready = "yes";
}
"""
