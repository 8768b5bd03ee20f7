"""Constant visual tokens are found without hard-coded ids, alive ones are not flagged."""

import numpy as np
import pytest

import interp
from interp.core import OutOfRange, Prompt, PromptError
from interp.prompts import scenes
from probes import nearest_token, visual_tokens
from probes.nearest_token import LLAVA_1_5, NO_GROUPS, TokenClasses
from probes.token_interventions import (
    attention_without,
    enter_late,
    matched_sets,
    prune,
    skip,
    skipping,
)
from probes.visual_tokens import between_images, nearest_words

IMAGES, CELLS, D, WORDS = 30, 25, 48, 400
DEAD, SINK = (3, 4, 9), (12,)


def planted(seed=0, dead=DEAD, sink=SINK, own_place=False):
    """Alive tokens differ from image to image; dead and sink cells are near one word each."""
    rng = np.random.default_rng(seed)
    words = rng.standard_normal((WORDS, D))
    x = rng.standard_normal((IMAGES, CELLS, D))
    base = np.tile(words[100], (CELLS, 1))
    if own_place:
        # A direction of every place's own, which is no word.
        base = words[100] + 0.9 * np.random.default_rng(9).standard_normal((CELLS, D))
    x[:, dead] = base[list(dead)] + 0.05 * x[:, dead]
    x[:, sink] = 8 * words[7] + 0.05 * x[:, sink]
    received = np.ones((IMAGES, CELLS))
    received[:, list(sink)] = 40.0
    image, place = np.divmod(np.arange(IMAGES * CELLS), CELLS)
    truth = np.full((IMAGES, CELLS), "alive")
    truth[:, list(dead)], truth[:, list(sink)] = "dead", "sink"
    more = {"embeddings": words, "images": image, "places": place, "received": received.ravel()}
    return x.reshape(-1, D), truth.ravel(), more


def test_planted_classes_are_found_and_alive_tokens_are_left_alone():
    x, truth, more = planted()
    found = TokenClasses().fit(x, **more)
    marked = found.landmarks_[found.landmarks_["kind"] != ""]
    assert dict(marked["kind"]) == {100: "dead", 7: "sink"} and found.groups_ == "words"
    got = found.predict(x)
    assert (got[truth != "alive"] == truth[truth != "alive"]).all()
    # A few alive tokens have one of two words of 400 among their three nearest.
    assert (got[truth == "alive"] == "alive").mean() > 0.98
    row = marked.loc[100]
    assert row["entropy"] > 0.99 and row["images"] == 1.0 and row["cosine"] > 0.9
    assert marked.loc[7]["received"] == pytest.approx(40, rel=0.1)
    assert marked.loc[7]["origin"] == "V-sink"
    # New images, one at a time, and other units: the same classes.
    new, same, _ = planted(seed=0)
    assert (found.predict(9 * new[:CELLS]) == got[:CELLS]).all() and (same == truth).all()


def test_without_constant_tokens_all_are_alive():
    x, _, more = planted(dead=(), sink=())
    found = TokenClasses().fit(x, **more)
    assert found.groups_ == NO_GROUPS and set(found.predict(x)) == {"alive"}
    # The same word in every image, but other tokens: a frequent word alone is no landmark.
    rng = np.random.default_rng(5)
    near = np.arange(len(x)) % CELLS < 4
    x[near] = more["embeddings"][100] + 1.2 * rng.standard_normal((int(near.sum()), D))
    often = TokenClasses(min_share=0.05).fit(x, **more)
    assert often.landmarks_.loc[100]["images"] == 1.0 and often.landmarks_.loc[100]["kind"] == ""
    assert set(often.predict(x)) == {"alive"}


def test_tokens_that_say_where_they_are_are_constant_at_their_place():
    x, truth, more = planted(dead=tuple(range(2, 20)), sink=(), own_place=True)
    anywhere = TokenClasses().fit(x, **more)
    there = TokenClasses(constant="same place").fit(x, **more)
    row = there.landmarks_.loc[100]
    assert row["cosine"] < 0.7 and row["cosine_same_place"] > 0.95 and row["kind"] == "dead"
    assert set(anywhere.predict(x)) == {"alive"}
    assert (there.predict(x) == truth).mean() > 0.95


def test_images_without_content_tell_what_is_background():
    x, _, more = planted(sink=())
    plain = np.asarray(more["images"]) < 5
    x[plain] = more["embeddings"][100] + 0.05 * x[plain]
    assert TokenClasses().fit(x, **more, uniform=plain).landmarks_.loc[100]["kind"] == "dead"
    # A word for something that is in every picture, but not in an empty one.
    x[plain] = np.random.default_rng(1).standard_normal((int(plain.sum()), D))
    row = TokenClasses(min_images=0.7).fit(x, **more, uniform=plain).landmarks_.loc[100]
    assert row["kind"] == "" and row["uniform"] < row["share"]


def test_clusters_stand_in_where_no_word_is_a_landmark():
    x, truth, more = planted(sink=(), dead=tuple(range(12)))
    found = TokenClasses(groups="clusters", min_silhouette=0.0).fit(x, **more)
    assert found.groups_ == "clusters" and (found.predict(x) == truth).mean() > 0.9
    assert TokenClasses(groups="clusters", min_silhouette=0.9).fit(x, **more).groups_ == NO_GROUPS


def test_released_landmarks_are_taken_as_they_are_with_sinks_first():
    x, truth, more = planted()
    found = TokenClasses(landmarks={"sink": (7,), "dead": (100, 7)}).fit(x, **more)
    got = found.predict(x)
    assert found.groups_ == "released" and (got[truth != "alive"] == truth[truth != "alive"]).all()
    assert set(sum(LLAVA_1_5.values(), ())) == {1141, 26673, 30296}
    none = TokenClasses(landmarks={"dead": ()}).fit(x[:CELLS], **{
        k: v if k == "embeddings" else v[:CELLS] for k, v in more.items()})
    assert (none.predict(x[:CELLS]) == "alive").all()


def test_nearest_words_and_cosines_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    x, words = rng.standard_normal((9, 5)), rng.standard_normal((20, 5))
    words[4] = 0
    cosine, ids = nearest_words(x, words, 3)
    for i in range(9):
        all_of = {j: x[i] @ words[j] / np.linalg.norm(x[i]) / np.linalg.norm(words[j])
                  for j in range(20) if j != 4}
        best = sorted(all_of, key=all_of.get, reverse=True)[:3]
        assert ids[i].tolist() == best and np.allclose(cosine[i], [all_of[j] for j in best])
    images, places = np.array([0, 0, 1, 1, 2, 2, 2, 0, 1]), np.array([0, 1, 0, 1, 0, 1, 1, 2, 3])
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    for same in (False, True):
        pairs = [u[i] @ u[j] for i in range(9) for j in range(9)
                 if images[i] != images[j] and (not same or places[i] == places[j])]
        assert between_images(x, images, places if same else None) == pytest.approx(np.mean(pairs))


def test_bad_input_is_said():
    x, _, more = planted()
    with pytest.raises(ValueError, match="two or more"):
        TokenClasses().fit(x, **{**more, "images": 0 * more["images"]})
    with pytest.raises(ValueError, match="needs places"):
        TokenClasses(constant="same place").fit(x, **{**more, "places": None})
    with pytest.raises(ValueError, match="not numbers"):
        TokenClasses().fit(x * np.nan, **more)
    with pytest.raises(ValueError, match="there are 750 tokens"):
        TokenClasses().fit(x, **{**more, "images": [1, 2]})
    with pytest.raises(PromptError):
        visual_tokens.visual_tokens(interp.open_model("backcopy-1l"), [])


# -- interventions, on a small model --------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return interp.open_model("looker")


@pytest.fixture(scope="module")
def asked(model):
    made = scenes.scenes(np.random.default_rng(1), 3, shapes=3, numbers=0)
    return [model.prompt("what color is the circle ?", images=[scenes.draw(s)]) for s in made]


@pytest.fixture(scope="module")
def said(model, asked):
    """What the model answers: tokens whose probabilities are far from zero."""
    return [int(rows[-1].argmax()) for rows in model.run(asked, logits="last").logits]


def test_matched_sets_are_of_one_size_and_of_their_class():
    rng = np.random.default_rng(0)
    given = [dict(zip(range(2, 20), rng.choice(["sink", "dead", "alive"], 18, p=p)))
             for p in ((0.1, 0.7, 0.2), (0.1, 0.3, 0.6), (0.5, 0, 0.5))]
    made = matched_sets(given, "dead", seeds=4)
    for number, one in enumerate(given):
        own = {p for p, k in one.items() if k == "dead"}
        alive = {p for p, k in one.items() if k == "alive"}
        assert set(made["all of dead"][number]) == own
        assert set(made["only dead"][number]) == (set(one) - own if own else set())
        for draw in range(4):
            a, b = set(made[f"dead {draw}"][number]), set(made[f"alive {draw}"][number])
            assert a <= own and b <= alive and len(a) == len(b) == min(len(own), len(alive))
    assert made == matched_sets(given, "dead", seeds=4) != matched_sets(given, "dead", seeds=4, seed=1)


def test_pruned_tokens_are_gone_and_others_are_not(model, asked, said):
    image = asked[0].positions("image")
    sets = {"some": [list(image[:5])] * 3, "all": [list(image)] * 3, "none": [[], list(image[:2]), []]}
    found = prune(model, asked, said, sets)
    plain = [model.run(p, logits="last").logits[0][-1].softmax(-1) for p in asked]
    assert np.allclose(found["probability"].sel(condition="whole"),
                       [float(row[a]) for row, a in zip(plain, said)], atol=1e-5)
    # The same as keys that nobody may see.
    hidden = model.run(asked, write=interp.block("all", list(image[:5])), logits="last").logits
    assert np.allclose(found["probability"].sel(condition="some"),
                       [float(rows[-1].softmax(-1)[a]) for rows, a in zip(hidden, said)],
                       atol=1e-5)
    assert found["removed"].values[0].tolist()[:3] == [0, 5, 36]
    assert np.isnan(found["probability"].sel(condition="none").values[[0, 2]]).all()
    with pytest.raises(OutOfRange, match="no image token"):
        prune(model, asked[:1], said[:1], {"x": [[0]]})


def test_attention_is_all_accounted_for(model, asked):
    image = asked[0].positions("image")
    found = attention_without(model, asked, {"some": [list(image[:20])] * 3})["mass"]
    assert np.allclose(found.sum("target"), 1, atol=1e-4)
    assert (found.sel(condition="some", target="set") == 0).all()
    assert (found.sel(condition="whole", target="set") > 0).all()
    rows = model.run(asked[1], read="pattern", logits="none").reads["pattern"].values[0]
    behind = slice(max(image) + 1, None)
    assert float(found.sel(condition="whole", target="first")[1]) == pytest.approx(
        rows[2:, :, behind, 0].mean(), abs=1e-5)


def test_skipped_updates_leave_the_residual_stream_as_it_was(model, asked, said):
    image = list(asked[0].positions("image"))
    writes = skipping(image[:4], [1, 1.5])
    reads = model.run(asked[0], read=["resid_pre", "resid_post"], write=writes, logits="none").reads
    before, after = (reads[s].values[0, 1] for s in ("resid_pre", "resid_post"))
    assert np.allclose(before[image[:4]], after[image[:4]], atol=1e-5)
    assert not np.isclose(before[image[4:]], after[image[4:]], atol=1e-3).all(1).any()
    found = skip(model, asked, said, {"none": [[]] * 3, "image": [image] * 3}, [0, 0.5])
    assert np.isnan(found["correct"].sel(condition="none")).all()
    assert (found["removed"].sel(condition="image") == 36).all()
    with pytest.raises(ValueError, match="sub-layers are n"):
        skipping([1], [0.3])
    with pytest.raises(OutOfRange, match="sub-layer 6"):
        skip(model, asked, said, {}, [6])


def test_entering_at_block_0_is_the_model_and_late_text_does_not_see_the_picture(model, asked, said):
    found = enter_late(model, asked, said, layers=[0, 3])
    plain = [model.run(p, logits="last").logits[0][-1].softmax(-1) for p in asked]
    first = [float(row[a]) for row, a in zip(plain, said)]
    for condition in ("as they came", "resized"):
        assert np.allclose(found["probability"].sel(condition=condition, layer=0), first, atol=1e-4)
    # Before it enters, the picture is nowhere: with another one's tokens all that differs is these.
    states = [model.run(p, read="embed", logits="none").reads["embed"].values[0][
        list(p.positions("image"))] for p in asked]
    other = enter_late(model, asked, said, layers=[0, 3], other=[*states[1:], states[0]])
    swapped = model.run(Prompt(asked[0].ids, asked[0].segments, inputs=asked[1].inputs),
                        logits="last").logits[0][-1].softmax(-1)
    assert other["probability"].values[0, 2, 0] == pytest.approx(float(swapped[said[0]]), abs=1e-5)
    assert np.allclose(other["probability"].values[:, :2], found["probability"], atol=1e-5)
    same = enter_late(model, asked, said, layers=[0, 3], other=states)["probability"]
    assert np.allclose(same.sel(condition="other"), same.sel(condition="as they came"), atol=1e-5)
    with pytest.raises(PromptError, match="36 image tokens, but 4"):
        enter_late(model, asked[:1], said[:1], other=[states[0][:4]])
    # The same by other means: the text does not see the picture before block 3, where it is put.
    image = list(asked[0].positions("image"))
    text = [p for p in range(len(asked[0])) if p not in image]
    edited = model.run(asked[0], logits="last", write=[
        interp.block(text, image, layers=[0, 1, 2]),
        interp.patch("resid_post.2", states[0], positions=image)]).logits[0][-1].softmax(-1)
    assert found["probability"].values[0, 0, 1] == pytest.approx(float(edited[said[0]]), abs=1e-5)
    assert abs(found["probability"].values[:, 0, 1] - found["probability"].values[:, 0, 0]).max() > 0.01


def test_classes_of_a_model_s_own_pictures(model, asked):
    found = nearest_token.measure(model, asked, TokenClasses(constant="same place", min_images=0.6))
    assert found["word"].shape == (3 * 36, 3) and found.manifest["groups"] == "words"
    made = nearest_token.labels(found)
    assert len(made) == 3 and set(made[0]) == set(asked[0].positions("image"))
    state = model.run(asked[2], read="embed", logits="none").reads["embed"].values[0]
    tokens = visual_tokens.visual_tokens(model, asked)
    assert np.allclose(tokens["state"].values[72:], state[list(asked[2].positions("image"))], atol=1e-6)
    assert (tokens["received"] > 0).all() and tokens["place"].values[36:72].tolist() == list(range(36))
