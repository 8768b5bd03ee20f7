"""A laboratory: a folder of experiments made up for one test, in place of the real ones."""

import string
import sys
import textwrap

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import experiments
import experiments._output

GOOD = '''
    import numpy as np
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from experiments._paper import Paper, Settings
    from experiments._output import Output
    from interp.core.statistics import mean, rate
    from interp.core import Claim, Prompt, Result
    from interp.figures import head_grid
    from interp.figures.style import canvas

    PAPER = Paper(
        "NAME", "Sinks & <b>other</b> tokens", ("2410.10781", "2512.22213"), "Where are they?",
        figures={"heads": "Attention on token 0 & <i>more</i>.", "levels": "Norm per layer."},
        models=("backcopy-1l",),
    )


    class Model:
        name = "tiny-model"

        def manifest(self):
            return {"revision": "abc", "lane": "hf", "dtype": "float32", "tokenizer": "words"}


    def run(settings: Settings, out: Output) -> None:
        rng = settings.rng()
        scores = rng.random((3, 4))
        out.record(Model(), [Prompt.from_tokens([1, 2, 3])])
        out.save("scores", Result(xr.Dataset({"score": (("layer", "head"), scores)})))
        out.table("heads", pd.DataFrame({"head": [0, 1], "score": [0.5, 0.25]}))
        figure, ax = canvas()
        head_grid.draw(ax, scores, label="attention (share)")
        out.figure("heads", figure)
        # Nothing in it: drawing is slow, and this one is only looked for.
        out.figure("levels", Figure((1, 1)), of="tiny-model")
        out.claim(Claim("Token 0 is a <sink>.", "arXiv:2410.10781", null=0.1, figure="heads",
                        paper_number="18.2 %", **rate(45, 50).for_claim()), model="tiny-model")
        out.claim(Claim("The norm is above 0.9.", "arXiv:2512.22213", null=0.9,
                        **mean(rng.random(30), resamples=100).for_claim()))
        out.claim(Claim.untestable("It needs depth.", "arXiv:2512.22213",
                                   reason="the model has 3 blocks"))
'''


class Lab:
    """Adds experiments by name; `body` is the source of the module."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, body=GOOD, **changes):
        """Write a module; `changes` maps a line's beginning to what replaces that line."""
        text = textwrap.dedent(body).replace("NAME", name)
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        (self.folder / f"{name}.py").write_text(text)

    def fails_with(self, name, error, when="out.claim(Claim(\"The norm"):
        """The good experiment, which raises in the middle of its run."""
        self.add(name)
        path = self.folder / f"{name}.py"
        text = path.read_text()
        assert text.count(when) == 1
        path.write_text(text.replace(when, f"raise {error}\n    {when}"))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """An empty laboratory; `experiments` sees only what is added to it, and what is imported."""
    folder = tmp_path / "lab"
    folder.mkdir()
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    before = set(sys.modules)
    yield Lab(folder)
    for name in set(sys.modules) - before:
        if name.startswith("experiments."):
            del sys.modules[name]
            monkeypatch.delattr(experiments, name.split(".")[1], raising=False)


@pytest.fixture(scope="session")
def letters():
    """A tokenizer of single characters with a start token, for the vocabulary of the tiny models.

    Ids 93 to 96 are those of the tiny vision-language models' image tokens.
    """
    known = ["<unk>", "<s>", "</s>", *string.ascii_letters, *string.digits,
             *"\n .,;:'()[]{}_=+*-/<>?!#%&@$"]
    assert len(known) == 93
    edges = ["<|vision_end|>", "<|vision_start|>", "<|video_pad|>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*known, *edges])}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=edges)
