"""The report: one page with everything in it, whatever state the results are in."""

import base64
import shutil
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

import experiments.__main__ as cli


class Page(HTMLParser):
    """What a browser would find: links, pictures, texts by element, and unclosed elements."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.text, self.links, self.images, self.tags, self.open = text, [], [], [], []
        self.words, self.ids, self.verdicts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [found[name] for name in ("href", "src", "action", "data") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        if "verdict" in found.get("class", "").split():
            self.verdicts.append(found["class"].split()[1])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += data.split()

    @property
    def plain(self):
        return " ".join(self.words)


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return run


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Where the results of `ran` are kept, so that they are computed only once."""
    return tmp_path_factory.mktemp("once") / "figures"


@pytest.fixture
def ran(lab, call, tmp_path, once):
    """Two finished experiments in `figures`."""
    lab.add("alpha")
    lab.add("beta")
    if not once.exists():
        assert call("run", "all").exit_code == 0
        shutil.copytree(tmp_path / "figures", once)
    shutil.copytree(once, tmp_path / "figures", dirs_exist_ok=True)
    return tmp_path / "figures"


def read(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_page_needs_nothing_but_itself(ran, call):
    found = call("report")
    assert found.exit_code == 0 and "results: 2, broken: 0, not run yet: 0." in found.stdout
    page = read(ran)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in page.text and "url(" not in page.text
    for link in page.links:
        assert link.startswith(("data:image/png;base64,", "#", "https://arxiv.org/abs/"))
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert inside and set(inside) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert "https://arxiv.org/abs/2410.10781" in page.links


def test_every_figure_is_on_the_page_as_it_is_on_disk(ran, call):
    call("report")
    shown = [base64.b64decode(image["src"].split(",")[1]) for image in read(ran).images]
    drawn = [p.read_bytes() for p in sorted(ran.rglob("*.png"))]
    assert sorted(shown) == sorted(drawn) and len(drawn) == 4


def test_texts_are_escaped_and_complete(ran, call):
    call("report")
    page = read(ran)
    assert "<sink>" not in page.text and "<b>" not in page.text and "<i>more" not in page.text
    for text in ("Sinks & <b>other</b> tokens", "Where are they?", "Token 0 is a <sink>.",
                 "Attention on token 0 & <i>more</i>.", "18.2 % (paper)", "0.786 to 0.957",
                 "the model has 3 blocks", "on tiny-model", "share of 50, Wilson interval"):
        assert text in page.plain
    assert page.images[0]["alt"] == "heads: Attention on token 0 & <i>more</i>."
    assert page.tags.count("details") == 2 and '"revision": "abc"' in page.plain


def test_verdicts_have_a_color_and_a_word_and_are_counted(ran, call):
    call("report")
    page = read(ran)
    assert page.verdicts == ["supported", "refuted", "not-testable"] * 2
    assert "2 ✓ supported 2 ✗ refuted 0 ~ inconclusive 2 – not testable" in page.plain
    assert "Runs: 2. Figures: 4. Claims: 6." in page.plain


@pytest.mark.parametrize("damage, sentence", [
    (lambda f: (f / "heads.png").write_bytes(b"x"), "heads.png does not match its checksum"),
    (lambda f: (f / "manifest.json").write_text("{"), "is not readable JSON"),
    (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    (lambda f: [p.unlink() for p in f.rglob("*") if p.is_file()], "holds no manifest.json"),
])
def test_a_broken_result_is_a_named_problem_beside_the_others(ran, call, damage, sentence):
    damage(ran / "alpha")
    found = call("report")
    assert found.exit_code == 0 and "results: 1, broken: 1, not run yet: 0." in found.stdout
    page = read(ran)
    assert "Broken (1)" in page.plain and sentence in page.plain
    assert len(page.images) == 2 and "beta" in page.plain
    assert found.stderr.startswith("  alpha: ") and sentence in found.stderr
    assert str(ran) not in page.text


def test_experiments_that_were_not_run_are_one_line_at_the_end(ran, lab, call):
    lab.add("gamma")
    lab.add("delta")
    found = call("report")
    assert "results: 2, broken: 0, not run yet: 2." in found.stdout and found.stderr == ""
    page = read(ran)
    assert "Not run yet: delta, gamma." in page.plain and "problems" not in page.ids
    assert page.text.index("Not run yet") > page.text.index("</main>")


def test_runs_on_other_models_have_their_own_sections(ran, call):
    assert call("run", "alpha", "--model", "Qwen/Qwen3-4B", "--tiny").exit_code == 0
    call("report")
    page = read(ran)
    assert "Qwen3-4B/tiny/alpha" in page.plain and "A tiny run" in page.plain
    assert "Runs: 3." in page.plain


def test_undrawn_figures_are_listed_with_the_reason(lab, call, tmp_path):
    lab.add("alpha", **{'out.figure("heads", figure)': 'out.no_figure("heads", "no <heads>.")'})
    call("run", "alpha")
    call("report")
    assert "Not drawn: no <heads>." in read(tmp_path / "figures").plain


def test_a_folder_without_results_is_one_sentence_and_no_page(lab, call, tmp_path):
    found = call("report")
    assert found.exit_code == 1 and "there is no folder figures" in found.stderr
    (tmp_path / "figures" / "notes").mkdir(parents=True)
    found = call("report")
    assert found.exit_code == 1 and "there are no results in figures" in found.stderr
    assert not (tmp_path / "figures" / "report.html").exists()
