"""The page of attention, opened in a browser: what it shows is the statistic, and nothing breaks out."""

import html as escapes
import json
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import xarray as xr

import interp
from interp.core import Prompt, Segment
from interp.figures import attention_view as views
from interp.figures.attention_view import attention_view
from interp.prompts import scenes
from interp.stream.reducers import TopKeys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --enable-logging=stderr "
         "--virtual-time-budget=6000 --dump-dom --window-size=1200,900").split()

DRIVER = """
<script>(async () => { const out = {};
const wait = () => new Promise(done => setTimeout(done, 60));
const cell = (l, h) => document.querySelector(`[data-cell="${l},${h}"]`);
const at = (p, where = "#tokens") => document.querySelector(`${where} [data-position="${p}"]`);
const rows = () => [...document.querySelectorAll("#rows tr[data-key]")].map(
  r => [+r.dataset.key, +r.dataset.weight, r.lastChild.textContent, r.children[1].textContent]);
const over = e => e.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const shades = () => [...document.querySelectorAll("rect")].map(
  r => [+r.dataset.position, +r.dataset.mass]);
for (let i = 0; i < 99 && !document.body.dataset.ready; i++) await wait();
try { SCRIPT } catch (error) { window.faults.push(String(error)); }
const pre = document.createElement("pre"); pre.id = "probe";
pre.textContent = JSON.stringify({ out, faults: window.faults }); document.body.append(pre); })();
</script>"""
FAULTS = """<script>window.faults = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, e => window.faults.push(
    kind + ": " + (e.message || e.reason || e.blockedURI)), true);
</script>"""


def browse(view, script, folder):
    """What a script finds on the opened page; the page must load without any error."""
    page = view.page.replace("<head>", "<head>" + FAULTS, 1)
    page = page.replace("</html>", DRIVER.replace("SCRIPT", script) + "</html>")
    (folder / "page.html").write_text(page, "utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=300)
    start = done.stdout.index('<pre id="probe">') + len('<pre id="probe">')
    found = json.loads(escapes.unescape(done.stdout[start:done.stdout.index("</pre>", start)]))
    assert found["faults"] == [] and "CONSOLE" not in done.stderr, (found["faults"], done.stderr)
    return found["out"]


def statistic(layers=(3, 7), heads=3, queries=20, ranks=4, seed=0, sink=0.0):
    """A made-up "top_keys" of causal attention; early queries see fewer keys than ranks."""
    rng = np.random.default_rng(seed)
    found = np.full((len(layers), heads, queries, ranks, 2), np.nan)
    for index in np.ndindex(*found.shape[:3]):
        row = rng.dirichlet(np.full(index[2] + 1, 0.3)) * (1 - sink)
        best = np.argsort(-row)[:ranks]
        found[index][: len(best)] = np.stack([row[best], best], -1)
    return xr.DataArray(found, {"layer": list(layers), "head": np.arange(heads),
                                "query": np.arange(queries), "rank": np.arange(ranks),
                                "quantity": ["value", "key"]},
                        ("layer", "head", "query", "rank", "quantity"))


def words(count):
    return [f"w{i}" for i in range(count)]


# -- in the browser --------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("small", [False, True])
def test_the_numbers_shown_are_the_statistic_in_every_head_that_is_clicked(
    tmp_path, monkeypatch, small
):
    if small:  # as for a large page: 8 bits a weight, compressed
        monkeypatch.setattr(views, "FINE", 0)
        monkeypatch.setattr(views, "PACK", 0)
    top = statistic(sink=0.1)
    asked = [(0, 2, 19), (1, 0, 12), (1, 2, 1), (0, 1, 5)]
    script = f"out.seen = []; for (const [l, h, q] of {json.dumps(asked)}) {{" \
        "cell(l, h).click(); over(at(q)); await wait(); out.seen.push([rows()," \
        "document.getElementById('where').textContent, document.querySelectorAll('.t.lit').length," \
        "document.querySelector('#rows tr:last-child').textContent]); }"
    found = browse(attention_view(top, words(20)), script, tmp_path)["seen"]
    whole, step = (255, 0.01) if small else (65535, 0.001)
    for (layer, head, query), (rows, where, lit, rest) in zip(asked, found):
        one = top.isel(layer=layer, head=head, query=query)
        value, key = (one.sel(quantity=name).values for name in ("value", "key"))
        kept = np.isfinite(value) & (value >= views.FAINT if small else True)
        assert [row[0] for row in rows] == key[kept].astype(int).tolist()
        np.testing.assert_allclose([row[1] for row in rows], value[kept], atol=0.51 / whole)
        for row, exact in zip(rows, value[kept]):
            assert row[3] == f"w{row[0]}"
            near = step * (1 if row[2].startswith("<") else 0.51) + 0.51 / whole
            assert abs(float(row[2].lstrip("<")) - exact) <= near
        assert where.startswith(f"layer {(3, 7)[layer]}, head {head}, query {query}")
        assert lit == kept.sum()
        left = float(rest.removeprefix("everything else").lstrip("<"))
        assert left == pytest.approx(1 - value[kept].sum(), abs=step + 4 / whole)


@in_browser
def test_keys_held_queries_and_themes(tmp_path):
    script = """
    const now = () => [document.body.dataset.layer, document.body.dataset.head,
                       document.body.dataset.query].map(Number);
    cell(0, 1).click(); over(at(9)); await wait(); out.first = now();
    press("ArrowRight"); await wait(); press("ArrowUp"); await wait(); press("."); await wait();
    out.moved = now(); over(at(3)); await wait(); out.held = now();
    press("Escape"); over(at(3)); await wait(); out.free = now();
    for (let i = 0; i < 9; i++) { press("ArrowDown"); press(","); press("ArrowLeft"); }
    await wait(); out.edge = now(); out.selected = cell(0, 0).getAttribute("aria-selected");
    const color = () => getComputedStyle(document.body).backgroundColor, before = color();
    document.getElementById("theme").click(); out.themes = [before, color()];
    """
    out = browse(attention_view(statistic(), words(20)), script, tmp_path)
    assert (out["first"], out["moved"]) == ([0, 1, 9], [1, 2, 10])
    assert (out["held"], out["free"]) == ([1, 2, 10], [1, 2, 3])
    assert (out["edge"], out["selected"]) == ([0, 0, 0], "true")
    assert out["themes"][0] != out["themes"][1]


@in_browser
def test_no_token_breaks_out_of_the_page(tmp_path):
    evil = ["</script><script>document.body.dataset.hacked = 1</script>", "<!--<script>",
            "<img src=x onerror=\"document.body.dataset.hacked = 2\">", "\u2028", "\u202e", "@ABOUT@",
            "@LAYERS@", "&lt;b&gt;", "'\"`${1}", "\ud800", "\x00", "]]>", ""]
    tokens = evil + words(20 - len(evil))
    script = "out.hacked = document.body.dataset.hacked || 'no'; out.title = document.title;" \
        "out.tokens = [...document.querySelectorAll('#tokens .t')].map(t => t.textContent);" \
        "out.images = document.images.length; out.ready = document.body.dataset.ready;"
    view = attention_view(statistic(), tokens, title="</title><script>bad()</script>")
    out = browse(view, script, tmp_path)
    assert (out["hacked"], out["images"], out["ready"]) == ("no", 0, "1")
    assert out["title"] == "</title><script>bad()</script>"
    assert out["tokens"] == [views.readable(token) for token in tokens]
    assert out["tokens"][0].startswith("</script><script>") and "@ABOUT@" in out["tokens"]


@in_browser
def test_another_head_paints_the_picture_with_its_own_weights(tmp_path):
    model = interp.open_model("looker")
    scene = scenes.draw(scenes.scene(np.random.default_rng(0)))
    prompt = model.prompt("what color is the triangle ?", images=[scene])
    run = model.run(prompt, stats=TopKeys(8), logits="none")
    last = len(prompt) - 1
    script = f"""
    out.chip = document.querySelector(".chip").textContent;
    out.painted = []; for (const h of [0, 3]) {{
      cell(4, h).click(); over(at({last})); await wait(); out.painted.push(shades()); }}
    document.querySelector("rect").dispatchEvent(new MouseEvent("click", {{ bubbles: true }}));
    await wait(); out.query = document.body.dataset.query;
    document.getElementById("mean").click(); await wait(); out.mean = shades();
    document.querySelector(".chip").click(); out.single = at(7).textContent;
    out.size = [document.images[0].naturalWidth, document.images[0].complete];
    """
    out = browse(attention_view(run, prompt), script, tmp_path)
    patches = prompt.positions("image")
    top = run.stats["top_keys"][0]

    def mass(head, queries):
        found = np.zeros(len(prompt))
        for one in top.sel(layer=4, head=head, query=queries).values.reshape(-1, 2):
            if np.isfinite(one[0]):
                found[int(one[1])] += one[0] / len(queries)
        return found

    for head, painted in zip((0, 3), out["painted"]):
        assert [p for p, _ in painted] == list(patches)
        np.testing.assert_allclose([w for _, w in painted], mass(head, [last])[list(patches)], atol=1e-5)
    assert out["painted"][0] != out["painted"][1]
    after = [q for q in range(len(prompt)) if q > max(patches)]
    np.testing.assert_allclose([w for _, w in out["mean"]], mass(3, after)[list(patches)], atol=2e-5)
    assert (out["chip"], out["query"]) == ("<image> × 36", str(patches[0]))
    assert (out["single"], out["size"]) == ("<image>", [84, True])


# -- without one -----------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_sits_in_a_frame_of_its_own(tmp_path):
    view = attention_view(statistic(), words(20))
    addresses = view.page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in addresses.replace("http-equiv", "") and "src=\"" not in addresses
    assert "default-src 'none'" in view.page
    shown = view._repr_html_()
    assert shown.startswith("<iframe srcdoc=") and "<script" not in shown
    assert 'sandbox="allow-scripts"' in shown
    assert view.save(tmp_path / "view.html").read_text("utf-8") == view.page
    assert view.size == (tmp_path / "view.html").stat().st_size
    assert repr(view) == "AttentionView(2 layers x 3 heads x 20 queries, 4 keys each; 0.0 MB)"


def test_a_long_prompt_makes_no_huge_page():
    layers, heads, queries, ranks = 2, 8, 2000, 8
    rng = np.random.default_rng(0)
    # Keys all over the prompt, which compress worst, and weights that fall like real ones.
    key = np.sort(rng.integers(0, queries, (layers, heads, queries, ranks)), -1).astype(float)
    value = 0.6 ** np.arange(1, ranks + 1) * rng.uniform(0.3, 1, key.shape)
    top = xr.DataArray(np.stack([value, key], -1), dims=("layer", "head", "query", "rank", "quantity"),
                       coords={"quantity": ["value", "key"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "FINE", 0)
        sizes = [attention_view(top, words(queries), least=x).size for x in (0.0, 0.05)]
    assert sizes[0] < 3.6 * top.size / 2 and sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("wide, bits", [(False, 16), (True, 16), (True, 8), (False, 8)])
def test_what_is_packed_can_be_unpacked(wide, bits):
    top = statistic(queries=5, ranks=4)
    value, key = (top.isel(layer=0).sel(quantity=q).transpose("rank", "head", "query").values
                  for q in ("value", "key"))
    blob = zlib.decompress(zlib.compress(views._encode(value, key + 70_000 * wide, bits, wide)))
    kind = np.dtype("<u4" if wide else "<u2")
    keys = np.frombuffer(blob[: key.size * kind.itemsize], kind).reshape(key.shape)
    found = np.frombuffer(blob[key.size * kind.itemsize:], "<u2" if bits == 16 else "u1")
    there = keys != np.iinfo(kind).max
    whole = 65535 if bits == 16 else 255
    assert (there == (np.isfinite(value) & (np.rint(value * whole) > 0))).all() or bits == 16
    assert (keys[there] == (key + 70_000 * wide)[there]).all()
    np.testing.assert_allclose(found.reshape(key.shape)[there] / whole, value[there], atol=0.51 / whole)


def test_a_prompt_of_a_batch_is_chosen_and_its_padding_left_out():
    long, short = statistic(queries=9), statistic(queries=6, seed=1)
    both = xr.concat([long, short], dim="prompt", join="outer")
    assert attention_view(both, words(9)).shape == (2, 3, 9, 4)
    of_short = attention_view(both, Prompt.from_tokens(range(6)), prompt=1)
    assert of_short.shape == (2, 3, 6, 4)
    assert of_short.page == attention_view(short, Prompt.from_tokens(range(6))).page


def test_bad_input_is_one_sentence():
    top, tokens = statistic(), words(20)
    with pytest.raises(ValueError, match="reaches position 19, but 18 tokens were given"):
        attention_view(top, tokens[:18])
    with pytest.raises(ValueError, match="no statistic 'top_keys' here"):
        attention_view({"received": top}, tokens)
    with pytest.raises(ValueError, match="is not the statistic 'top_keys'"):
        attention_view(top.isel(rank=0), tokens)
    with pytest.raises(ValueError, match="prompt 2 does not exist"):
        attention_view(xr.concat([top, top], dim="prompt"), tokens, prompt=2)
    with pytest.raises(ValueError, match="a picture needs the image segment"):
        attention_view(top, tokens, image=np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="the map of heads is"):
        attention_view(top, tokens, scores={"mine": np.zeros((3, 2))})
    boxed = Segment("image", (1, 2), "image", (1, 2), ((0, 0, 2, 4), (2, 0, 4, 4)))
    page = attention_view(top, tokens, np.zeros((4, 4, 3)), boxed, scores={"mine": np.eye(2, 3)}).page
    assert "data:image/png;base64," in page and '"mine"' in page
