"""The doctor's report as plain text: readable in a terminal and in a log."""

from collections.abc import Iterable, Sequence
from typing import Optional, Union

from interp.doctor.report import Report, SiteRow

Real = Union[int, float]
SINKS = {
    "none": "none (no learned sink logits, no gates on head outputs)",
    "learned": "a learned sink logit per head", "gated": "gates on head outputs",
}
"""What a kind of sink means, in words."""


def write(report: Report) -> str:
    """The report as lines of text, without colors or control characters.

    Example:
        >>> print(write(Report("toy", refused="there is no folder 'toy'.", nearest="Make one.")))
        toy: cannot be opened
        <BLANKLINE>
          there is no folder 'toy'.
          Make one.
    """
    lines = [f"{report.name}: {report.verdict}", ""]
    if report.refused:
        return "\n".join([*lines, *(f"  {x}" for x in (report.refused, report.nearest) if x)])
    for finding in report.findings:
        lines.append(f"  {finding.level.upper():<6} {finding.about}: {finding.sentence}")
    lines += [""] * bool(report.findings)
    for title, body in (
        ("Model", _model(report)), ("Lanes and sites", _sites(report)),
        ("Parity", _parity(report)), ("Tokens", _tokens(report)),
        ("Attention", _attention(report)), ("Image tokens", _picture(report)),
        ("Estimates for this machine (not measurements)", _costs(report)),
    ):
        if body:
            lines += [title, *(f"  {line}" for line in body), ""]
    return "\n".join(lines).rstrip()


def _model(report: Report) -> list[str]:
    m = report.model
    return [
        f"{m['architecture']}, {m['kind']}, {m['dtype']} on {m['device']}",
        f"{m['n_layers']} layers x {m['n_heads']} heads ({m['n_kv_heads']} key-value heads), "
        f"d_model {m['d_model']}, d_head {m['d_head']}, vocabulary {m['d_vocab']:,}, "
        f"{m['max_positions'] or 'any number of'} positions",
        f"{m['parameters']:,} parameters, {_bytes(m['weights_bytes'])} of weights",
    ]


def _sites(report: Report) -> list[str]:
    lanes = [lane.name for lane in report.lanes if lane.available]
    by_site: dict[str, dict[str, SiteRow]] = {}
    for row in report.sites:
        by_site.setdefault(row.site, {})[row.lane] = row
    rows = []
    for site, found in by_site.items():
        cells = []
        for lane in lanes:
            one = found.get(lane)
            if one is None:
                cells.append("-")
            elif not one.exists:
                cells.append("no such place")
            else:
                cells.append(" ".join(word for word, yes in (("read", one.readable),
                                                             ("write", one.writable)) if yes) or "-")
        rows.append([site, *cells])
    tried: dict[tuple[int, ...], list[str]] = {}
    total = int(report.model.get("n_layers", 0))
    for lane in lanes:
        layers = tuple(sorted({n for r in report.sites if r.lane == lane for n in r.layers}))
        tried.setdefault(layers, []).append(lane)
    found = _table([["site", *lanes], *rows])
    found += [f"proven in {_layers(layers, total)} ({', '.join(names)})"
              for layers, names in tried.items() if layers]
    found += [f"{lane.name}: closed ({lane.reason})" for lane in report.lanes if not lane.available]
    return found


def _parity(report: Report) -> list[str]:
    rows = [["lane", "what", "against", "rows compared", "largest difference", "allowed",
             "same top token", ""]]
    for p in report.parity:
        same = "" if p.same_top is None else f"{100 * p.same_top:.0f} %"
        rows.append([p.lane, p.what, p.against, str(p.positions), f"{p.difference:.1e}",
                     f"{p.tolerance:g}", same, "alike" if p.alike else "DIFFERENT"])
    if len(rows) == 1:
        return []
    return [*_table(rows), "differences are divided by the standard deviation of what is compared"]


def _tokens(report: Report) -> list[str]:
    t = report.tokens
    if t is None or t.tokenizer is None:
        return ["no tokenizer"]
    first = f"the first token of a text is {t.bos!r}" if t.first_token_is_bos else (
        "a text does not begin with a special token "
        + ("(the tokenizer has no BOS token)" if t.bos is None else f"(the BOS token is {t.bos!r})"))
    return [
        f"{t.tokenizer}, {t.vocabulary:,} tokens; {first}",
        f"chat template: {'yes' if t.chat_template else 'no'}; "
        f"double BOS when tokenized with special tokens: {'YES' if t.double_bos else 'no'}",
        *t.remarks,
    ]


def _attention(report: Report) -> list[str]:
    found = []
    s = report.sink
    if s is not None:
        found.append(f"built-in sink: {SINKS.get(s.kind, s.kind)}" + (
            f"; it takes {100 * s.external:.0f} % of a row" if s.external is not None else ""))
        found.append(
            f"the first of {s.tokens} tokens ({s.text}) receives {100 * s.first:.1f} % of the "
            f"attention of those that see it, token {max(1, s.tokens // 4)} "
            f"{100 * s.middle:.1f} %; if every token looked at all it sees alike, the first would "
            f"receive {100 * s.uniform:.1f} %; {s.heads:.0f} % of heads give the first more than 30 %")
    if report.kv_heads:
        groups: dict[int, list[int]] = {}
        for head, kv in enumerate(report.kv_heads):
            groups.setdefault(kv, []).append(head)
        one = max(map(len, groups.values())) == 1
        found.append("key-value heads: one for every query head" if one else
                     "query heads by key-value head: " + "; ".join(
                         f"{kv}: {_span(heads)}" for kv, heads in groups.items()))
    if report.windows:
        if all(w is None for w in report.windows):
            found.append("windows: none, every layer sees all earlier tokens"
                         if report.model.get("kind") == "decoder" else "windows: none")
        else:
            kinds: dict[Optional[int], list[int]] = {}
            for layer, window in enumerate(report.windows):
                kinds.setdefault(window, []).append(layer)
            found.append("windows: " + "; ".join(
                f"{'all keys' if w is None else f'last {w} keys'}: layers {_span(layers)}"
                for w, layers in kinds.items()))
    return found


def _picture(report: Report) -> list[str]:
    p = report.picture
    if p is None:
        return []
    grid = f"grid {p.grid[0]} x {p.grid[1]} (rows x columns)" if p.grid else (
        ", ".join(p.parts) or "geometry not known")
    found = [f"a picture of {p.size[0]} x {p.size[1]} pixels: {p.tokens} tokens, positions {p.first} "
             f"to {p.last}, {grid}{' (assumed)' if p.assumed else ''}"]
    if p.covered is not None:
        wide = "" if p.wide is None else (
            f", and {100 * p.wide:.0f} % of the pixels of a picture twice as wide as high")
        found.append(f"image tokens cover {100 * p.covered:.0f} % of its pixels{wide}")
    found.append(f"drawn in {p.file}" if p.file else "with --out DIR the grid is drawn")
    return found


def _costs(report: Report) -> list[str]:
    rows = [["analysis", "tokens", "token-layers", "time", "memory beside the weights"]]
    for c in report.costs:
        if c.reason:
            rows.append([c.analysis, f"{c.tokens:,}", "", c.reason, ""])
            continue
        rows.append([c.analysis, f"{c.tokens:,}", f"{c.token_layers:,}",
                     "not timed" if c.seconds is None else "about " + _seconds(c.seconds),
                     "" if c.bytes is None else "about " + _bytes(c.bytes)])
    return _table(rows) if len(rows) > 1 else []


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows]


def _layers(layers: Sequence[int], total: int) -> str:
    """Layers in which something was tried, and why these.

    Example:
        >>> _layers((2,), 4), _layers((0, 2, 3), 4)
        ('layer 2, the middle one', 'layers 0, 2 and 3: the first, the middle one and the last')
    """
    if tuple(layers) == (total // 2,):
        return f"layer {layers[0]}" + (", the middle one" if total > 2 else "")
    said = ", ".join(map(str, layers[:-1])) + f" and {layers[-1]}" if len(layers) > 1 else str(layers[0])
    usual = total > 3 and tuple(layers) == (0, total // 2, total - 1)
    return f"layer{'s' if len(layers) > 1 else ''} {said}" + (
        ": the first, the middle one and the last" if usual else "")


def _span(numbers: Iterable[int]) -> str:
    """Numbers as runs: "0-3, 6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _seconds(value: Real) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if value >= 2 * size:
            return f"{value / size:.2g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:.2g} s"


def _bytes(value: Real) -> str:
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{value / 2**power:.3g} {unit}"
    return f"{value} B"
