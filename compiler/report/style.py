"""The style sheet of the HTML report. Two palettes behind one set of names; text contrast is 4.5:1 or more in both."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1e21; --muted: #5c636b; --rule: #e3e5e8; --tint: #f5f6f7;
  --accent: #0b61a4; --accent-tint: #eaf2f9; --quiet: #b4bac1; --warn: #8a5300; --warn-tint: #fdf4e3;
  --shade: rgba(0, 0, 0, .14);
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e4e6e8; --muted: #9aa1a9; --rule: #2d3136; --tint: #1d2023;
    --accent: #6cb2ee; --accent-tint: #17283a; --quiet: #565d65; --warn: #e6b45c; --warn-tint: #2d2415;
    --shade: rgba(0, 0, 0, .6);
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 58rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
.kicker { margin: 0 0 .6rem; color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.3; font-weight: 650; letter-spacing: -.012em;
  overflow-wrap: anywhere; }
h1 .rest { font-weight: 400; color: var(--muted); font-size: 1.0625rem; letter-spacing: 0; display: block;
  margin-top: .5rem; line-height: 1.5; }
h2 { margin: 0 0 .9rem; font-size: 1.0625rem; font-weight: 650; }
section { margin-top: 2.75rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 1px; margin-top: 2rem;
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.card { box-shadow: 0 0 0 1px var(--rule); padding: 1rem 1.15rem 1.05rem; }
.card p { margin: 0; color: var(--muted); font-size: .8125rem; line-height: 1.45; overflow-wrap: anywhere; }
.card .value { margin: .2rem 0 .25rem; color: var(--ink); font-size: 1.625rem; line-height: 1.25; font-weight: 600;
  letter-spacing: -.015em; }
.card.none .value { font-size: 1.125rem; font-weight: 500; color: var(--muted); letter-spacing: 0;
  padding: .3rem 0 .25rem; }
.card.lead .value { color: var(--accent); }
.says { margin: 1.25rem 0 0; padding: .8rem 1.15rem; border-radius: 8px; list-style: none;
  background: var(--accent-tint); overflow-wrap: anywhere; }
.says.warning { background: var(--warn-tint); }
.says li + li { margin-top: .3rem; }
.says b { font-weight: 600; color: var(--accent); margin-right: .35rem; }
.says.warning b { color: var(--warn); }
figure { margin: 0 0 1.25rem; }
figcaption, .note { margin: .55rem 0 0; color: var(--muted); font-size: .8125rem; line-height: 1.5;
  overflow-wrap: anywhere; }
.note + .note { margin-top: .15rem; }
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .6rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .6rem 100% no-repeat scroll; }
.scroll + .scroll, .note + .scroll, .scroll + figure { margin-top: 1.1rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.45; }
th, td { padding: .42rem .9rem .42rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--muted); font-weight: 500; font-size: .8125rem; white-space: nowrap; vertical-align: bottom; }
td { white-space: pre-line; }
.number { text-align: right; white-space: nowrap; }
td.name { white-space: pre; }
td.prose { min-width: 13rem; }
.number + :not(.number) { padding-left: .9rem; }
tr.strong td { font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
details { border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); padding: .6rem 0; }
details + .note { margin-top: .7rem; }
summary { cursor: pointer; color: var(--accent); font-size: .875rem; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px;
  border-radius: 3px; }
details[open] summary { margin-bottom: .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; margin: 0; font-size: .875rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; overflow: visible; }
.plot { display: grid; grid-template-columns: max-content 1fr; padding-top: .4rem; }
.plot.three { grid-template-columns: max-content 1fr max-content; }
svg text { font-size: 13px; fill: var(--ink); }
svg .figure, svg .tick { fill: var(--muted); }
svg .tick { font-size: 12px; }
svg .strong.label, svg .strong.figure { font-weight: 600; fill: var(--ink); }
svg .track { fill: var(--tint); }
svg .bar { fill: var(--quiet); }
svg .bar.strong { fill: var(--accent); }
svg .whisker { stroke: var(--ink); stroke-width: 1.25; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .limit { stroke: var(--muted); stroke-width: 1.25; stroke-dasharray: 4 4; }
svg .frontier { stroke: var(--accent); stroke-width: 1.5; }
svg .dot { fill: var(--paper); stroke: var(--muted); stroke-width: 2; }
svg .dot.strong { fill: var(--accent); stroke: var(--accent); }
svg .hatch { stroke: var(--muted); stroke-width: 2; }
svg .hollow { fill: url(#hatch); opacity: .55; }
@media (max-width: 34rem) {
  th, td { padding-right: .75rem; }
  main { padding: 1.75rem 1.1rem 3rem; }
  h1 { font-size: 1.4375rem; }
  h1 .rest { font-size: .9375rem; }
  section { margin-top: 2.25rem; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .card { padding: .85rem .9rem .9rem; }
  .card .value { font-size: 1.3125rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .55rem; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .cards, .says, h2 { break-inside: avoid; }
  h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .scroll { overflow: visible; background: none; }
}
"""
