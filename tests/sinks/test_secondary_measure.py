"""Secondary sinks on models: planted ones are found, explained and removed; the twins hold none."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.core import Prompt
from interp.core.errors import NumericalError, OutOfRange, PromptError, SiteRefused
from interp.figures.style import canvas
from interp.models.model import Model
from interp.organisms.plant import primary_sink, secondary_sink
from interp.sinks import mlp_formation, mlp_removal, residual_profile, secondary

BOS, SINK, DEPTH = 1, 9, 12
ONSET, UNTIL, WINDOW = 5, 9, (2, 11)
LENGTHS = (23, 31, 19, 27)


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(3)
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=40, intermediate_size=56, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=BOS, initializer_range=0.06,
        max_position_embeddings=64, tie_word_embeddings=False)).eval()
    return secondary_sink(
        primary_sink(base, WINDOW[0], 90.0, WINDOW[1], attract=2.0), SINK, ONSET, 30.0, UNTIL)


@pytest.fixture(scope="module")
def model(planted):
    return Model(planted.model, "planted")


@pytest.fixture(scope="module")
def twin(planted):
    return Model(planted.twin, "twin")


@pytest.fixture(scope="module")
def prompts():
    """Of different lengths; the last one holds no sink."""
    rng = np.random.default_rng(5)
    rows = [np.array([BOS, *rng.integers(10, 61, n - 1)]) for n in LENGTHS]
    for row, places in zip(rows, ((4, 12), (7,), (3, 6, 15))):
        row[list(places)] = SINK
    return [Prompt.from_tokens(row) for row in rows]


@pytest.fixture(scope="module")
def found(model, prompts):
    return secondary.measure(model, prompts)


def test_exactly_the_planted_sinks_are_found_with_their_layers(found, planted, prompts):
    table = secondary.sinks(found)
    truth = {(i, p) for i, one in enumerate(prompts) for p in planted.truth_positions(one.ids)}
    chosen = table[table["label"] == "secondary"]
    assert set(zip(chosen["prompt"], chosen["position"])) == truth and len(truth) == 6
    assert (chosen["onset"] == ONSET).all() and (chosen["lifetime"] == UNTIL - ONSET).all()
    assert (chosen["token"] == SINK).all() and (chosen["cosine"] > 0.9).all()
    assert found["primary"].values.tolist() == [0, 0, 0, 0]
    assert found["window_start"].values.tolist() == [WINDOW[0]] * 4
    assert found["window_stop"].values.tolist() == [WINDOW[1]] * 4
    assert (found["primary_ratio"].values > 10).all()


def test_the_twin_without_planted_sinks_has_the_primary_only(twin, prompts):
    table = secondary.sinks(secondary.measure(twin, prompts))
    assert table["label"].tolist() == ["primary"] * 4


@pytest.mark.parametrize("rule", ["official", "relative"])
def test_measure_is_score_on_what_the_blocks_put_out(model, prompts, rule):
    streamed = secondary.levels(secondary.measure(model, prompts, rule=rule))
    for prompt, one in zip(prompts, streamed):
        dense = model.run(prompt, read="resid_post").reads["resid_post"].values[0]
        pure = secondary.score(dense, primary=(0, 1), rule=rule, last_layer="raw")
        assert one.levels == pure.levels and one.window == pure.window
        assert one.primary == pure.primary


def test_attention_keys_and_values_are_those_of_the_model(model, prompts, found):
    for number, prompt in enumerate(prompts):
        run = model.run(prompt, read=["pattern", "k", "v"])
        attention = torch.from_numpy(run.reads["pattern"].values[0])
        n = len(prompt)
        for position in (0, 4, n - 2):
            np.testing.assert_allclose(
                found["received"].values[number, :, position],
                secondary.sink_score(attention, position), atol=1e-6)
        assert np.isnan(found["received"].values[number, :, n - 1 :]).all()
        for name, site in (("key_norm", "k"), ("value_norm", "v")):
            norm = np.linalg.norm(run.reads[site].values[0], axis=-1).mean(-1)
            np.testing.assert_allclose(found[name].values[number, :, :n], norm, rtol=1e-5)
            assert np.isnan(found[name].values[number, :, n:]).all()


def test_sinks_receive_attention_only_where_they_are_sinks(found):
    curve = secondary.by_class(found, "received")
    sinks, others = (curve[k].mean("prompt").values for k in ("secondary sinks", "other tokens"))
    reading = slice(ONSET + 1, UNTIL + 1)
    assert (sinks[reading] > 5 * others[reading]).all()
    assert (sinks[WINDOW[0] + 1 : ONSET + 1] < 2 * others[WINDOW[0] + 1 : ONSET + 1]).all()
    # Prompts without a sink have no such curve.
    assert np.isnan(curve["secondary sinks"].isel(prompt=3)).all()
    table = secondary.sinks(found)
    assert (table["lift"][table["label"] == "secondary"] > 5).all()


def test_the_pieces_in_which_it_is_run_do_not_matter(model, prompts, found, monkeypatch):
    monkeypatch.setattr(residual_profile, "ROOM", 1)
    monkeypatch.setattr(residual_profile, "TOKENS", 1)
    piecewise = secondary.measure(model, prompts)
    for name in residual_profile.NAMES:
        np.testing.assert_allclose(piecewise[name], found[name], rtol=2e-4, atol=2e-5)
    assert piecewise["member"].equals(found["member"])


def test_chance_counts_what_joins_a_random_position_and_leaves_out_sinks(model, prompts, found):
    table, seen = secondary.sinks(found), []
    for seed in range(8):
        position = int(np.random.default_rng(seed).integers(3, min(LENGTHS)))
        chance = secondary.measure(model, prompts, seed=seed)["chance"].values
        for number, prompt in enumerate(prompts):
            if position in set(table["position"][table["prompt"] == number]):
                assert np.isnan(chance[number])
                continue
            dense = model.run(prompt, read="resid_post").reads["resid_post"].values[0]
            joined = secondary.cosine_to(dense, position).abs() > 0.9
            layers = {position: tuple(range(*WINDOW))}
            for p in range(position + 1, len(prompt)):
                own = tuple(i for i in range(*WINDOW) if joined[i, p])
                layers.update({p: own} if own else {})
            labels = secondary.relabel(layers, DEPTH, "relative", primary=position)
            assert chance[number] == sum(label == "secondary" for _, label in labels.values())
            seen.append(chance[number])
    # Both occur here: strangers that are sinks, and strangers that some token joins.
    assert len(seen) < 8 * len(prompts) and max(seen) > 0


@pytest.mark.parametrize("given, error, sentence", [
    ({"primary": [40]}, OutOfRange, "primary candidate 40"),
    ({"primary": []}, ValueError, "no candidate"),
])
def test_bad_candidates_are_named(model, prompts, given, error, sentence):
    with pytest.raises(error, match=sentence):
        secondary.measure(model, prompts, **given)


def test_no_prompt_and_short_prompts_are_refused(model):
    for bad in ([], [Prompt.from_tokens([1, 2, 3])]):
        with pytest.raises(PromptError, match="at least"):
            secondary.measure(model, bad)


def test_infinite_residuals_are_named_with_prompt_and_layer(model, prompts, monkeypatch):
    run = model.run

    def broken(*args, **more):
        made = run(*args, **more)
        if "norm" in made.stats:
            made.stats["norm"].values[2, 7, 3] = np.inf
        return made

    monkeypatch.setattr(model, "run", broken)
    with pytest.raises(NumericalError, match="prompt 2 .* layer 7"):
        secondary.measure(model, prompts)


def test_the_mlp_of_the_creation_layer_writes_the_sink(model, prompts, found):
    formed = mlp_formation.measure(model, prompts, found)
    is_sink = formed["is_sink"].values
    assert formed.manifest["creation_layer"] == ONSET and is_sink.sum() == 6
    assert (formed["layer"].values == ONSET).all()
    assert (formed["cosine_write"].values[is_sink] > 0.95).all()
    assert (np.abs(formed["cosine_write"].values[~is_sink]) < 0.6).all()
    assert (formed["write_norm"].values[is_sink] > 5 * formed["write_norm"].values[~is_sink]
            .max()).all()
    assert (formed["update_share"].values[is_sink] > 0.9).all()
    assert list(formed["stage_cosine"].stage.values) == [
        "input", "up", "gate", "activated", "product", "output"]
    # Controls are ordinary positions of the same prompts.
    pairs = set(zip(formed["prompt"].values[~is_sink], formed["position"].values[~is_sink]))
    table = secondary.sinks(found)
    assert not pairs & set(zip(table["prompt"], table["position"])) and len(pairs) > 0


def test_controls_have_the_same_token_where_they_can(model, prompts, found):
    # A second copy of the token at an ordinary position: what is a sink is what `found` says.
    chosen = found.data.isel(sink=found.data["sink_position"].values != 12)
    one = type(found)(chosen, found.manifest)
    formed = mlp_formation.measure(model, prompts, one)
    first = (formed["prompt"].values == 0) & ~formed["is_sink"].values
    assert formed["position"].values[first].tolist() == [12]
    assert formed["same_token"].values[first].all()


def test_directions_of_the_mlp_repeat_and_answer_to_the_tag(model, prompts, found):
    formed = mlp_formation.measure(model, prompts, found)
    one, two = (mlp_formation.directions_of(model, formed) for _ in range(2))
    assert torch.equal(one.norm, two.norm)
    sinks = np.flatnonzero(formed["row_is_sink"].values)
    with pytest.raises(ValueError, match="0 controls"):
        mlp_formation.directions_of(model, formed, sinks)


@pytest.mark.parametrize("how", ["zero", "mean", "rescale", "project_out"])
def test_removing_the_write_of_the_creation_layer_deletes_the_sink_and_controls_do_not(
    model, prompts, found, how
):
    before = model.run(prompts[0]).logits[0]
    edited = mlp_removal.intervene(model, prompts, found, how=how, n_seeds=5)
    assert edited["prompt"].values.tolist() == [0, 1, 2]
    assert edited["count"].values.tolist() == [2, 1, 3]

    def row(name, quantity="deleted"):
        return edited[quantity].sel(edit=name).values

    assert (row("none", "survival") == 1).all()
    assert (row("layer 0") == 1).all() and (row("layer 0", "survival") == 0).all()
    for name in ("layer -2", "layer -1", "layer +1"):
        assert (row(name) == 0).all()
    for kind in ("positions", "layers"):
        assert (mlp_removal.control(edited, "deleted", kind) == 0).all()
    control = mlp_removal.control(edited, "on_sinks", "positions")
    assert (row("layer 0", "on_sinks") < 0.5 * control).all()
    assert (row("layer 0", "on_content") > mlp_removal.control(
        edited, "on_content", "positions")).all()
    total = sum(row("none", f"on_{name}") for name in mlp_removal.ON)
    assert ((total > 0.85) & (total <= 1 + 1e-5)).all()
    assert torch.equal(model.run(prompts[0]).logits[0], before)


def test_only_so_many_prompts_and_layers_as_there_are(model, prompts, found):
    edited = mlp_removal.intervene(
        model, prompts, found, offsets=(0, 50), n_seeds=1, most=2)
    assert edited["prompt"].values.tolist() == [0, 1]
    assert np.isnan(edited["survival"].sel(edit="layer +50")).all()


def test_without_secondary_sinks_there_is_nothing_to_explain_or_remove(twin, prompts):
    nothing = secondary.measure(twin, prompts)
    with pytest.raises(ValueError, match="no secondary sink"):
        mlp_removal.intervene(twin, prompts, nothing)
    with pytest.raises(ValueError, match="no secondary sink"):
        mlp_formation.measure(twin, prompts, nothing)


def test_stages_of_a_gated_mlp_are_those_of_its_weights(model, tiny):
    block = model.hf.model.layers[4].mlp
    x = torch.randn(3, model.d_model)
    with torch.no_grad():
        stages = model.mlp_stages(4)(x)
        expected = mlp_formation.gated_chain(
            x, block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight)
    assert list(stages) == list(expected)
    for name in expected:
        torch.testing.assert_close(stages[name], expected[name])
    with pytest.raises(SiteRefused, match="not one gate"):
        Model(tiny("gpt2"), "gpt2").mlp_stages(0)
    with pytest.raises(OutOfRange, match="layer 12"):
        model.mlp_stages(12)


def test_drawings_show_true_layers_and_every_class(model, prompts, found):
    for quantity in ("key_norm", "value_norm", "residual_in", "received", "cosine"):
        _, ax = canvas()
        secondary.draw(found, ax, quantity)
        assert {t.get_text() for t in ax.get_legend().get_texts()} == set(secondary.ROLES)
    _, ax = canvas()
    secondary.draw(found, ax, "residual_in")
    line = next(x for x in ax.lines if x.get_label() == "primary")
    # What leaves block 2 enters block 3: the jump is seen there.
    assert line.get_xdata()[np.diff(line.get_ydata()).argmax() + 1] == WINDOW[0] + 1
    _, ax = canvas()
    secondary.draw(found, ax, "levels")
    image = ax.images[0].get_array()
    assert image[UNTIL - ONSET, ONSET] == pytest.approx(np.log1p(6))
    assert image[WINDOW[1] - WINDOW[0], WINDOW[0]] == pytest.approx(np.log1p(4))
    assert (np.asarray(image) > 0).sum() == 2
    _, ax = canvas()
    mlp_formation.draw(mlp_formation.measure(model, prompts, found), ax, threshold=0.9)
    assert all(len(line.get_ydata()) == 6 for line in ax.lines[:6])
    edited = mlp_removal.intervene(model, prompts, found, n_seeds=1)
    _, ax = canvas()
    mlp_removal.draw(edited, ax, "on_sinks")
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "untouched", "creation layer", "other positions"]
