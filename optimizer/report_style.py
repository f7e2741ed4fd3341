"""The style sheet of the report pages."""

STYLE = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #ffffff; --ink: #1c2430; --soft: #5c6878;
  --faint: #d9dee6; --good: #1f8a5b; --bad: #c2453d; --tint: 92%; --tintink: 22%; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --card: #1b212a; --ink: #e4e9f0; --soft: #94a1b3;
  --faint: #343d4a; --good: #4cc38a; --bad: #f07a72; --tint: 24%; --tintink: 88%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header { margin-bottom: 18px; }
h1 { font-size: 27px; letter-spacing: -0.02em; margin: 0; }
.sub { color: var(--soft); margin: 2px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; margin-bottom: 16px; }
.tile, section { background: var(--card); border: 1px solid var(--faint); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile .label { font-size: 12px; color: var(--soft); }
.tile .value { font-size: 23px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tile .note { font-size: 11.5px; line-height: 1.35; color: var(--soft); }
section { padding: 18px 20px; margin-bottom: 16px; }
h2 { font-size: 17px; margin: 0 0 4px; }
.lead { color: var(--soft); margin: 0 0 12px; max-width: 90ch; font-size: 13.5px; }
.hint { color: var(--soft); font-size: 12.5px; margin: 6px 0 0; }
svg.figure { display: block; width: 100%; height: auto; }
svg.figure text { font-family: inherit !important; }
.split { display: flex; flex-wrap: wrap; gap: 24px; align-items: center; }
.split svg.figure { flex: 0 1 400px; min-width: 280px; }
.split .grow { flex: 1 1 420px; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--faint); vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; }
tbody tr:last-child td { border-bottom: 0; }
small { color: var(--soft); font-size: 11.5px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
.off { color: var(--bad); }
.yes { color: var(--good); font-weight: 600; }
.no { color: var(--bad); font-weight: 600; }
.chip { display: table; margin-top: 3px; padding: 1px 8px; border-radius: 6px; font-size: 12px;
  background: hsl(var(--hue) 55% var(--tint)); color: hsl(var(--hue) 60% var(--tintink)); }
.chip small { color: inherit; opacity: 0.8; }
.chip.none { background: none; padding-left: 0; color: var(--soft); }
details summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-bottom: 6px; }
ul { margin: 6px 0 0; padding-left: 20px; font-size: 13px; }
@media print { body { background: white; } section { break-inside: avoid; } details > * { display: block; } }
"""
