"""The page's style sheet: one column of text, figures as wide as it, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --card: #ffffff; --sunk: #f4f2ee; --ink: #1b1f24; --faint: #666d78; --rule: #dcdad5;
  --accent: #0b5c8f; --blue: #0072b2; --orange: #c87700; --green: #008a64; --red: #c65300; --purple: #a8578a;
  --yes: #0a6b4c; --yes-back: #e1f2ea; --no: #9a4300; --no-back: #fbe9dc; --open: #5b626c;
  --open-back: #eeedea;
  --sans: "Inter", "Source Sans 3", "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --serif: "Charter", "Bitstream Charter", "Iowan Old Style", "Source Serif 4", "Gelasio", Georgia,
    "Liberation Serif", serif;
  --mono: "SF Mono", "JetBrains Mono", Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1a1e23; --sunk: #20252b; --ink: #e6e4df; --faint: #9aa1ab; --rule: #343a42;
    --accent: #7cc0ea; --blue: #56a9dd; --orange: #eca63a; --green: #3fc29a; --red: #ec8447;
    --purple: #d58ebb;
    --yes: #7fd9b6; --yes-back: #14352a; --no: #f2ae7e; --no-back: #3d2615; --open: #aab0b9;
    --open-back: #282d34;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.62 var(--serif); }
main, header.top, footer { max-width: 56rem; margin: 0 auto; padding: 0 1.5rem; }
header.top { padding-top: 4.5rem; }
h1 { font: 600 2.55rem/1.14 var(--serif); letter-spacing: -0.015em; margin: 0 0 1rem; text-wrap: balance; }
h2 { font: 600 1.72rem/1.2 var(--serif); letter-spacing: -0.01em; margin: 0 0 0.9rem; }
h3 { font: 600 1.02rem/1.3 var(--sans); margin: 2.6rem 0 0.7rem; }
p { margin: 0 0 1rem; max-width: 44rem; text-wrap: pretty; }
.lede { font-size: 1.2rem; line-height: 1.55; }
.faint { color: var(--faint); }
.key { font: 0.87rem/1.5 var(--sans); color: var(--faint); margin: 1rem 0 1.4rem; max-width: none; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
code { font-family: var(--mono); font-size: 0.8em; }
sub { line-height: 0; }
section { border-top: 1px solid var(--rule); margin-top: 4.2rem; padding-top: 2.6rem; }
.kicker { font: 600 0.76rem/1.2 var(--sans); letter-spacing: 0.09em; text-transform: uppercase;
  color: var(--accent); margin: 0 0 0.7rem; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.1rem 1.6rem;
  margin: 2.2rem 0 0; padding: 1.2rem 0; border-block: 1px solid var(--rule); font-family: var(--sans); }
.facts div { min-width: 0; }
.facts dt { font-size: 0.74rem; color: var(--faint); margin: 0 0 0.1rem; }
.facts dd { margin: 0; font-size: 0.93rem; line-height: 1.4; overflow-wrap: anywhere; }

.glance { display: grid; grid-template-columns: repeat(auto-fit, minmax(15.5rem, 1fr)); gap: 1rem;
  margin: 2rem 0 0; }
.card { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1.1rem 1.2rem 1.2rem; color: inherit; text-decoration: none; }
a.card:hover { border-color: var(--accent); }
.card strong { display: block; font: 600 1.02rem/1.3 var(--sans); margin-bottom: 0.5rem; }
.card .big { font: 600 1.9rem/1.1 var(--serif); letter-spacing: -0.01em; display: block; }
.card .of { font: 0.84rem/1.45 var(--sans); color: var(--faint); margin: 0.3rem 0 0.9rem; }
.card .beyond { font: 0.78rem/1.45 var(--sans); color: var(--faint); margin: -0.3rem 0 0.9rem; }
.dots { display: flex; flex-wrap: wrap; gap: 0.32rem; margin-top: auto; }

.badge { display: inline-block; font: 600 0.74rem/1.55 var(--sans); padding: 0 0.5rem; border-radius: 99px;
  white-space: nowrap; }
.seen { color: var(--yes); background: var(--yes-back); }
.not-seen { color: var(--no); background: var(--no-back); }
.not-examined { color: var(--open); background: var(--open-back); }
.breaks { color: var(--paper); background: var(--no); }
.harms { color: var(--no); background: var(--no-back); }
.badge.note { color: var(--open); background: var(--open-back); padding: 0 0.5rem; }

.claims { list-style: none; margin: 1.4rem 0 1.8rem; padding: 0; border-top: 1px solid var(--rule); }
.claims li { display: grid; grid-template-columns: 2.3rem minmax(0, 1fr) 7.2rem; gap: 0.1rem 0.9rem;
  padding: 0.85rem 0; border-bottom: 1px solid var(--rule); }
.claims .id { font: 600 0.84rem/1.9 var(--sans); color: var(--faint); }
.claims .what { line-height: 1.45; }
.claims .where { font: 0.78rem/1.4 var(--sans); color: var(--faint); white-space: nowrap; }
.claims .verdict { text-align: right; }
.claims .here { grid-column: 2 / 3; font: 0.87rem/1.5 var(--sans); margin-top: 0.25rem; }
.claims details { grid-column: 2 / 3; font: 0.8rem/1.5 var(--sans); color: var(--faint); }
.claims .quiet .what, .claims .quiet .here { color: var(--faint); }
.claims .quiet { padding: 0.55rem 0; }
summary { cursor: pointer; }
.folded { margin: 1.6rem 0; font: 0.9rem/1.5 var(--sans); }
.folded summary { color: var(--accent); }
.folded figure { margin-top: 0.8rem; }

figure { margin: 2.2rem 0; }
figure .plot { overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figure .row { display: flex; flex-wrap: wrap; gap: 0.6rem 2rem; justify-content: space-between; }
figure .row > * { flex: 1 1 15rem; max-width: 26rem; }
figcaption { font: 0.87rem/1.52 var(--sans); color: var(--faint); margin-top: 0.8rem; max-width: 46rem; }
figcaption b { color: var(--ink); font-weight: 600; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font: 0.87rem/1.4 var(--sans); width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 0.8rem; color: var(--faint); vertical-align: bottom; }
th, td { padding: 0.42rem 0.7rem 0.42rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { border-bottom: 1px solid var(--ink); }
td.number, th.number { text-align: right; padding-right: 0; padding-left: 1rem; }
td.number { white-space: nowrap; }
td.best { font-weight: 700; }
td small { font-size: 0.78rem; font-weight: 400; }

.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(16.5rem, 1fr)); gap: 1rem; }
.example { display: grid; grid-template-columns: 4rem minmax(0, 1fr); gap: 0.9rem; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 0.9rem; font: 0.84rem/1.45 var(--sans); }
.example img { width: 4rem; height: 4rem; image-rendering: pixelated; border-radius: 5px; display: block; }
.example .question { font-weight: 600; }
.example dl { margin: 0.35rem 0 0; display: grid; grid-template-columns: auto minmax(0, 1fr);
  gap: 0.05rem 0.6rem; }
.example dt { color: var(--faint); font-size: 0.78rem; line-height: 1.56; white-space: nowrap; }
.example dd { margin: 0; overflow-wrap: anywhere; }
.example .right { color: var(--yes); font-weight: 600; }
.example .wrong { color: var(--no); }

.runs { font: 0.84rem/1.5 var(--sans); }
.runs div { margin-bottom: 0.8rem; }
.command { display: block; background: var(--sunk); border-radius: 7px; padding: 0.5rem 0.8rem;
  margin: 0.2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.78rem; line-height: 1.5; }
.command + p { margin-top: 1.3rem; }
.note { background: var(--sunk); border-radius: 8px; padding: 0.8rem 1.1rem; font: 0.87rem/1.55 var(--sans);
  max-width: none; overflow-wrap: anywhere; }
footer { font: 0.82rem/1.6 var(--sans); color: var(--faint); margin-top: 4rem; padding-bottom: 4rem; }

@media (max-width: 40rem) {
  body { font-size: 16px; }
  main, header.top, footer { padding-left: 1.1rem; padding-right: 1.1rem; }
  header.top { padding-top: 2.4rem; }
  h1 { font-size: 1.9rem; }
  h2 { font-size: 1.42rem; }
  section { margin-top: 2.8rem; padding-top: 1.8rem; }
  .claims li { grid-template-columns: 2rem minmax(0, 1fr); }
  .claims .verdict { grid-column: 2 / 3; text-align: left; }
  .facts { grid-template-columns: 1fr 1fr; }
  figure .plot svg { min-width: 34rem; }
  figure .row .plot svg { min-width: 0; }
  table { min-width: 34rem; }
}
@media print { section { break-inside: avoid-page; } }
"""
