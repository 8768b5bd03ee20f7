"""Draws the README's figure from the results of `make figures`: python docs/first_figure.py [figures]"""

import sys
from pathlib import Path

from experiments._outcome import Outcome
from interp.figures import layer_curve
from interp.figures.style import PAGE, canvas, style
from interp.sinks import visual

out = Path(sys.argv[1] if len(sys.argv) > 1 else "figures")
with style():
    figure, (left, right) = canvas(1, 2, width=PAGE, height=2.6)
    alpha = Outcome.load(out / "sink_emergence").result("natural-all-minilm-l6-v2")["alpha"]
    share = alpha.mean("head")
    early = share.isel(key=slice(1, share.sizes["key"] // 2)).mean("key")
    layer_curve.draw(left, {"[CLS]": share.isel(key=0), "other tokens, mean": early},
                     label="share of all attention",
                     roles={"[CLS]": "primary", "other tokens, mean": "control"})
    left.set_title("all-MiniLM-L6-v2")
    visual.draw(Outcome.load(out / "visual_sinks").result("sinks-planted-looker"), right)
    right.set_title("planted visual sinks")
    figure.savefig(Path(__file__).parent / "first_figure.png", dpi=150,
                   metadata={"Software": None})
