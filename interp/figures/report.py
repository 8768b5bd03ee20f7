"""One HTML page of figures and claims that needs nothing but itself: no script, no other file."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import jinja2
import numpy as np

from interp.core.claim import VERDICTS as WORDS
from interp.core.claim import Claim
from interp.figures.style import VERDICTS

TAGS = {
    "paper": "paper", "code": "the paper's released code", "data": "released results",
    "checked": "checked by running", "derived": "derived here",
    "secondary": "second-hand: as others quote it",
}
"""How a provenance tag is worded beside a number."""


@dataclass(frozen=True)
class Picture:
    """A figure on the page: PNG bytes, or the reason why there is none."""

    name: str
    caption: str
    png: bytes = b""
    reason: str = ""


@dataclass(frozen=True)
class Section:
    """One run of one paper's experiment."""

    name: str
    title: str
    question: str
    arxiv: tuple[str, ...]
    models: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    claims: tuple[Claim, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Problem:
    """A result that is missing or cannot be shown, with the sentence that says why."""

    name: str
    sentence: str


def number(value: Optional[Union[int, float]]) -> str:
    """A number for people: three digits that matter, "–" where there is none.

    Example:
        >>> number(0.12345), number(50000.0), number(3), number(None), number(1e-6)
        ('0.123', '50,000', '3', '–', '1e-06')
    """
    if value is None:
        return "–"
    value = float(value)
    if not np.isfinite(value):
        return "undefined" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    whole = value == round(value) or abs(value) >= 1000
    if whole and abs(value) < 1e6:
        return f"{value:,.0f}" if value else "0"
    return f"{value:.3g}"


def measured(claim: Claim) -> str:
    """What was measured, with its unit.

    Example:
        >>> measured(Claim("s", "arXiv:2410.10781", 0.5, 0.1, (0.4, 0.6), unit="share"))
        '0.5 share'
        >>> measured(Claim.untestable("s", "arXiv:2410.10781", "the model has 4 blocks"))
        '–'
    """
    return f"{number(claim.measured)} {claim.unit}".strip() if claim.measured is not None else "–"


def interval(claim: Claim) -> str:
    """The interval, or "–".

    Example:
        >>> interval(Claim("s", "arXiv:2410.10781", 0.5, 0.1, (0.4, 0.6)))
        '0.4 to 0.6'
    """
    if claim.interval is None:
        return "–"
    low, high = claim.interval
    return "none" if np.isnan([low, high]).any() else f"{number(low)} to {number(high)}"


def expected(claim: Claim) -> str:
    """What the verdict compares with.

    Example:
        >>> expected(Claim("s", "arXiv:2410.10781", 0.5, 0.1, (0.4, 0.6)))
        'above 0.1'
    """
    if claim.null is None:
        return "–"
    if claim.direction == "equal":
        return f"within {number(claim.tolerance)} of {number(claim.null)}"
    return f"{claim.direction} {number(claim.null)}"


def published(claim: Claim) -> str:
    """The paper's number with its provenance, or "–".

    Example:
        >>> published(Claim.untestable("s", "arXiv:2410.10781", "too small",
        ...                            paper_number="18.2 %", paper_tag="data"))
        '18.2 % (released results)'
    """
    if not claim.paper_number:
        return "–"
    return f"{claim.paper_number} ({TAGS.get(claim.paper_tag, claim.paper_tag)})"


def counts(claims: Sequence[Claim]) -> dict[str, int]:
    """How many claims have each verdict, in the order of `interp.core.claim.VERDICTS`.

    Example:
        >>> counts([Claim.untestable("s", "arXiv:2410.10781", "too small")])["not testable"]
        1
    """
    verdicts = [claim.verdict for claim in claims]
    return {word: verdicts.count(word) for word in WORDS}


def markdown(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table.

    Example:
        >>> table = markdown([Claim("A sink.", "arXiv:2410.10781", 0.5, 0.1, (0.4, 0.6))])
        >>> print(table.splitlines()[2])
        | supported | A sink. | arXiv:2410.10781 | – | 0.5 | 0.4 to 0.6 | above 0.1 | – | – |
    """
    head = ["verdict", "claim", "source", "paper", "measured", "interval", "expected", "n",
            "control or reason"]
    rows = [head, ["---"] * len(head)]
    for claim in claims:
        rows.append([
            claim.verdict, _named(claim), claim.source, published(claim), measured(claim),
            interval(claim), expected(claim), number(claim.n),
            claim.reason or claim.control or "–",
        ])
    # A bar or a line end inside a cell would break the table.
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in clean)


def _named(claim: Claim) -> str:
    model = claim.details.get("model")
    return f"{claim.sentence} [{model}]" if model else claim.sentence


def page(
    sections: Sequence[Section],
    problems: Sequence[Problem] = (),
    title: str = "Undertow: reproduced figures and claims",
    absent: Sequence[str] = (),
) -> str:
    """The whole page as HTML; every text is escaped, every picture is inside.

    `absent` are experiments that were not run; they are named in one line at the end.

    Example:
        >>> section = Section("sinks", "Sinks & <heads>", "Where?", ("2410.10781",))
        >>> html = page([section])
        >>> "Sinks &amp; &lt;heads&gt;" in html, "<script" in html
        (True, False)
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        number=number, measured=measured, interval=interval, expected=expected,
        published=published, base64=lambda content: base64.b64encode(content).decode(),
        json=lambda content: json.dumps(content, indent=1, sort_keys=True, default=str),
    )
    claims = [claim for section in sections for claim in section.claims]
    return environment.from_string(PAGE).render(
        title=title, sections=sections, problems=problems, total=counts(claims),
        n_claims=len(claims), looks=VERDICTS, counts=counts, absent=absent,
        n_pictures=sum(bool(p.png) for section in sections for p in section.pictures),
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: #fff; color: #222;
 font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 0; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
a { color: #0b57a4; }
section { border-top: 2px solid #222; margin-top: 2.5rem; padding-top: 1rem; }
.quiet { color: #555; font-size: .9rem; margin: .2rem 0; }
.counts { display: flex; flex-wrap: wrap; gap: .6rem; padding: 0; margin: 1rem 0; }
.counts li { list-style: none; border-radius: .4rem; padding: .5rem 1rem; }
.counts strong { display: block; font-size: 1.5rem; line-height: 1.2; }
.contents { columns: 2 22rem; padding-left: 1.2rem; font-size: .95rem; }
.problem { background: #FBE6DA; border-left: 4px solid #9A3B00; padding: .5rem 1rem;
 margin: .5rem 0; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1.2rem; align-items: start;
 grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; border: 1px solid #ddd; border-radius: .4rem; padding: .8rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem; }
figcaption { font-size: .88rem; color: #333; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; min-width: 52rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem;
 border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #999; white-space: nowrap; }
td.n { font-variant-numeric: tabular-nums; }
.verdict { display: inline-block; border-radius: .3rem; padding: .05rem .5rem;
 white-space: nowrap; font-weight: 600; }
{% for word, (ink, paper, sign) in looks.items() %}
.{{ word | replace(" ", "-") }} { color: {{ ink }}; background: {{ paper }}; }
{% endfor %}
details { margin-top: 1rem; font-size: .88rem; }
summary { cursor: pointer; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .78rem; }
@media print { section { break-before: page; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="quiet">Runs: {{ sections | length }}. Figures: {{ n_pictures }}. Claims: {{ n_claims }}.
Every verdict is computed: the interval of what was measured against what the claim expects.</p>
<ul class="counts" id="summary">
{% for word, count in total.items() %}
<li class="{{ word | replace(' ', '-') }}"><strong>{{ count }}</strong>
 {{ looks[word][2] }} {{ word }}</li>
{% endfor %}
</ul>
{% if problems %}
<h3 id="problems">Broken ({{ problems | length }})</h3>
{% for problem in problems %}
<p class="problem"><strong>{{ problem.name }}</strong>: {{ problem.sentence }}</p>
{% endfor %}
{% endif %}
{% if sections | length > 1 %}
<nav><h3>Contents</h3><ol class="contents">
{% for section in sections %}
<li><a href="#run-{{ loop.index }}">{{ section.title }}</a>
 <span class="quiet">{{ section.name }}</span></li>
{% endfor %}
</ol></nav>
{% endif %}
</header>
<main>
{% for section in sections %}
{% set run = loop.index %}
<section id="run-{{ run }}">
<h2>{{ section.title }}</h2>
<p class="quiet"><code>{{ section.name }}</code>
{% for id in section.arxiv %}
 · <a href="https://arxiv.org/abs/{{ id | urlencode }}">arXiv:{{ id }}</a>
{% endfor %}
{% if section.models %} · models: {{ section.models | join(", ") }}{% endif %}
</p>
<p>{{ section.question }}</p>
{% if section.remark %}<p class="problem">{{ section.remark }}</p>{% endif %}
{% if section.pictures %}
<div class="figures">
{% for picture in section.pictures %}
<figure id="run-{{ run }}-{{ picture.name }}">
{% if picture.png %}
<img alt="{{ picture.name }}: {{ picture.caption }}"
 src="data:image/png;base64,{{ picture.png | base64 }}">
{% else %}
<p class="quiet">Not drawn: {{ picture.reason or "the run gave no reason." }}</p>
{% endif %}
<figcaption><strong>{{ picture.name }}</strong> {{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
{% if section.claims %}
<h3>Claims: {% for word, count in counts(section.claims).items() if count %}
{{ count }} {{ word }}{{ "" if loop.last else ", " }}{% endfor %}</h3>
<div class="wide" tabindex="0" role="region" aria-label="claims of {{ section.name }}">
<table>
<thead><tr><th scope="col">verdict</th><th scope="col">claim</th><th scope="col">paper</th>
<th scope="col">measured</th><th scope="col">interval</th><th scope="col">expected</th>
<th scope="col">n</th><th scope="col">control, or reason</th></tr></thead>
<tbody>
{% for claim in section.claims %}
<tr>
<td><span class="verdict {{ claim.verdict | replace(' ', '-') }}">
{{ looks[claim.verdict][2] }} {{ claim.verdict }}</span></td>
<td>{{ claim.sentence }}
{% set model = claim.details.get("model") %}
{% if model %}<br><span class="quiet">on {{ model }}</span>{% endif %}
{% if claim.statistic %}<br><span class="quiet">{{ claim.statistic }}</span>{% endif %}
{% if claim.causal %}<br><span class="quiet">causal, against a control</span>{% endif %}
{% if claim.figure %}<br><span class="quiet">figure {{ claim.figure }}</span>{% endif %}</td>
<td>{{ claim | published }}<br><span class="quiet">{{ claim.source }}</span></td>
<td class="n">{{ claim | measured }}</td>
<td class="n">{{ claim | interval }}</td>
<td class="n">{{ claim | expected }}</td>
<td class="n">{{ claim.n | number }}</td>
<td>{{ claim.reason or claim.control or "–" }}</td>
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
<details><summary>How this was run</summary><pre>{{ section.manifest | json }}</pre></details>
</section>
{% endfor %}
</main>
{% if absent %}
<footer><p class="quiet" id="absent">Not run yet: {{ absent | join(", ") }}.
<code>python -m experiments run NAME</code> adds one, <code>run all</code> all of them.</p></footer>
{% endif %}
</body>
</html>
"""
