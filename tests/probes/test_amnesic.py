"""The causal arm: what decides the answer is destroyed by erasing it, what is only decodable is not."""

import numpy as np
import pytest
import xarray as xr
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

import interp
from interp.core import OutOfRange, PromptError
from interp.models.model import Model
from interp.organisms import hidden_use
from probes import amnesic, erasure, linear, nulls, sweep

CASES = hidden_use.cases(48, seed=0)
PROMPTS = [prompt for prompt, _, _ in CASES]
ANSWERS = [answer for _, answer, _ in CASES]
OTHERS = [other for _, _, other in CASES]


@pytest.fixture(scope="module")
def planted():
    """kind -> a model whose answer is the secret word, by one known head in block 1, or is not."""
    return {kind: Model(hidden_use.build(kind), kind) for kind in ("open", "unused")}


def erased(model, layer, positions, kind="leace", fitted=16, asked=16, **more):
    """Erase the secret's identity, fitted on other prompts than the ones that are asked."""
    states = nulls.layer_states(model, PROMPTS[fitted:], positions).sel(layer=layer).values
    eraser = {"leace": erasure.Leace(),
              "inlp": erasure.Inlp(rounds=3, estimator=LogisticRegression()),
              "known": erasure.KnownDirections(np.eye(model.d_model)[list(hidden_use.SECRET)])}[kind]
    eraser.fit(states, ANSWERS[fitted:])
    return amnesic.amnesic(model, PROMPTS[:asked], ANSWERS[:asked], eraser, layer=layer,
                           positions=positions, controls=20, **more)


@pytest.mark.parametrize("layer, positions, kind", [
    (0, "secret", "leace"), (0, "secret", "inlp"), (0, "secret", "known"), (-1, "secret", "leace"),
    (1, "last", "leace")])
def test_erasing_what_decides_the_answer_destroys_it_and_random_directions_do_not(
    planted, layer, positions, kind
):
    found = erased(planted["open"], layer, positions, kind, metric="logit_difference",
                   others=OTHERS[:16])
    clean = float(found["clean"].mean())
    assert clean > 3 and abs(float(found["erased"].mean())) < 0.35 * clean
    assert float(found["random"].sel(kind="projection").mean()) > 0.6 * clean
    for control in ("projection", "rotation"):
        assert amnesic.used_claim(found, "So.", "arXiv:2006.00995", kind=control).verdict == "supported"


def test_what_is_decodable_but_not_used_can_be_erased_without_harm(planted):
    """The same word, as readable in the twin that writes nothing, and in the other one read already."""
    for kind, layer in (("unused", 0), ("open", 1)):
        model = planted[kind]
        states = nulls.layer_states(model, PROMPTS, "secret")
        probe = sweep.sweep(states, ANSWERS, groups=None, folds=2, permutations=20, alpha=1.0)
        assert float(probe["score"].sel(layer=layer)) > 0.95
        found = erased(model, layer, "secret")
        assert float(found["change"].mean()) > 0.2
        assert np.allclose(found["erased"], found["clean"], atol=1e-3)
        claim = amnesic.used_claim(found, "So.", "arXiv:2006.00995", kind="rotation")
        assert claim.verdict != "supported"


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss", "llava", "qwen2_5_vl"])
def test_resuming_equals_whole_passes(tiny, architecture):
    """Other states at some positions of a prompt, run on from there or patched into a whole pass."""
    model = Model(tiny(architecture), architecture)
    prompts = [interp.Prompt.from_tokens(np.random.default_rng(n).integers(3, 90, n)) for n in (9, 12)]
    if architecture == "llava":
        pixels = np.random.default_rng(0).standard_normal((1, 3, 24, 24)).astype(np.float32)
        prompts[0] = interp.core.Prompt((5, *[96] * 9, 7, 8), inputs={"pixel_values": pixels})
    rng = np.random.default_rng(1)
    for layer, places in ((0, [[2, 5], [11]]), (-1, [[1], [3, 4]]), (1, [[-1], []]), (2, [[-1], [11]])):
        places = nulls.places_of(prompts, places)
        made = [rng.standard_normal((3, len(p), model.d_model)) for p in places]

        def variants(i, states, made=made, places=places):
            assert states.shape == (len(places[i]), model.d_model)
            return np.concatenate([states[None], states + made[i]])

        ways = [list(amnesic.replaced(model, prompts, variants, layer=layer, places=places,
                                      batch_size=3, resume=resume)) for resume in (True, False)]
        for i, (fast, slow) in enumerate(zip(*ways)):
            assert fast.shape == (4, model.d_vocab)
            assert np.allclose(fast, slow, atol=2e-4)
            plain = model.run(prompts[i]).logits[0][-1].numpy()
            assert np.allclose(fast[0], plain, atol=2e-4)
            assert not places[i] or not np.allclose(fast[1], plain, atol=1e-2)


def test_an_encoder_is_run_whole(tiny):
    model = Model(tiny("bert"), "bert")
    prompts = [interp.Prompt.from_tokens([3, 4, 5, 6, 7])]
    eraser = erasure.KnownDirections(np.eye(48)[:2]).fit(np.zeros((3, 48)))
    found = amnesic.amnesic(model, prompts, [9], eraser, layer=1, positions=[1], controls=3)
    assert found["random"].shape == (2, 3, 1) and not np.allclose(found["erased"], found["clean"])


def test_controls_change_as_much_as_they_say(planted):
    """A rotation keeps the size of every change, a projection the number of directions."""
    model, seen = planted["open"], {}

    def watch(model, prompts, variants, **more):
        for i, _ in enumerate(prompts):
            states = np.random.default_rng(i).standard_normal((2, model.d_model))
            seen[i] = (states, variants(i, states))
            yield np.zeros((len(seen[i][1]), model.d_vocab))

    eraser = erasure.Leace().fit(np.random.default_rng(0).standard_normal((200, model.d_model)),
                                 np.arange(200) % 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amnesic, "replaced", watch)
        amnesic.amnesic(model, PROMPTS[:2], ANSWERS[:2], eraser, layer=0, controls=4)
    for states, made in seen.values():
        assert np.allclose(made[0], states) and np.allclose(made[1], eraser.transform(states))
        size = np.linalg.norm(made[1] - states, axis=1)
        for turned in made[6:]:
            assert np.allclose(np.linalg.norm(turned - states, axis=1), size)
            assert not np.allclose(turned, made[1])
        assert np.linalg.matrix_rank(made[2] - states) <= eraser.rank_ == 2
    assert len(made) == 2 + 4 + 4


def test_only_permuted_labels_tell_a_concept_from_whatever_varies(planted):
    """Eraser of a label that is not there: it takes out what varies, as its decoys do, while random
    directions take out next to nothing and would make it seem used."""
    model = planted["open"]
    states = nulls.layer_states(model, PROMPTS[16:], "secret").sel(layer=0).values
    coin = np.random.default_rng(0).integers(6, size=len(states))
    # In the second case other things vary as well, so that there is something else to take out.
    varied = np.repeat(states, 20, 0)
    varied = varied + 0.3 * np.random.default_rng(1).standard_normal(varied.shape)
    claims = []
    for X, labels in ((states, coin), (varied, np.repeat(ANSWERS[16:], 20))):
        eraser = erasure.Leace().fit(X, labels)
        lures = amnesic.decoys(eraser, X, labels, groups=None, number=20)
        found = amnesic.amnesic(model, PROMPTS[:16], ANSWERS[:16], eraser, layer=0,
                                positions="secret", decoys=lures, kinds=amnesic.KINDS)
        claims.append([amnesic.used_claim(found, "So.", "arXiv:2006.00995", kind=kind,
                                          resamples=500).verdict for kind in amnesic.KINDS])
    assert claims[0][0] == "supported" and claims[0][2] != "supported"
    assert claims[1][2] == "supported"


def test_steering_along_what_is_read_moves_the_answer_and_random_directions_do_not(planted):
    """At the secret word, from one secret towards another, as the embedding itself has it."""
    model = planted["open"]
    a, b = list(hidden_use.SECRET)[:2]
    chosen = [i for i, answer in enumerate(ANSWERS) if answer == a]
    states = nulls.layer_states(model, PROMPTS, "secret").sel(layer=0).values
    two = [i for i, answer in enumerate(ANSWERS) if answer in (a, b)]
    probe = linear.DifferenceOfMeans().fit(states[two], np.array(ANSWERS)[two] == b)
    way = erasure.steering(probe, np.linalg.norm(probe.coef_))
    found = amnesic.steered(model, [PROMPTS[i] for i in chosen], [a] * len(chosen), way, (0, 0.5, 1),
                            layer=0, positions="secret", others=[b] * len(chosen), controls=20)
    moved, random = found["steered"].mean("prompt"), found["random"].mean("prompt")
    assert np.allclose(found["steered"].sel(strength=0), found["clean"], atol=1e-3)
    # One secret becomes the other: the difference turns its sign.
    assert np.allclose(moved.sel(strength=1), -found["clean"].mean(), rtol=0.05)
    assert float(random.sel(strength=1).median()) > 0.5 * float(found["clean"].mean())
    assert float(moved.sel(strength=1)) < -8 < 0 < float(random.sel(strength=1).min())


def test_bad_input(planted, tiny):
    model = planted["open"]
    eraser = erasure.KnownDirections([1.0] * model.d_model).fit(np.zeros((1, model.d_model)))
    with pytest.raises(NotFittedError):
        amnesic.amnesic(model, PROMPTS[:1], [0], erasure.Leace(), layer=0)
    with pytest.raises(PromptError, match="2 answers for 1 prompts"):
        amnesic.amnesic(model, PROMPTS[:1], [0, 1], eraser, layer=0)
    with pytest.raises(OutOfRange, match="layer 2 does not exist"):
        amnesic.amnesic(model, PROMPTS[:1], [0], eraser, layer=2)
    with pytest.raises(ValueError, match="controls must be at least 1"):
        amnesic.amnesic(model, PROMPTS[:1], [0], eraser, layer=0, controls=0)
    with pytest.raises(ValueError, match="needs `others`"):
        amnesic.amnesic(model, PROMPTS[:1], [0], eraser, layer=0, metric="logit_difference")
    with pytest.raises(ValueError, match="not zero"):
        amnesic.steered(model, PROMPTS[:1], [0], np.zeros(model.d_model), [1], layer=0, others=[1])
    with pytest.raises(ValueError, match="cannot be removed"):
        erasure.KnownDirections(np.ones((2, 3))).fit(np.zeros((4, 5)))


def test_the_most_harmful_control_is_chosen_again_in_every_resample():
    """With controls that are no different from the erasure, few runs are called a use."""
    called = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((21, 1)) * 0.5 + rng.standard_normal((21, 12))
        random = np.broadcast_to(values[1:], (2, 20, 12))
        data = interp.Result(xr.Dataset(
            {"clean": ("prompt", np.zeros(12)), "erased": ("prompt", values[0]),
             "random": (("kind", "control", "prompt"), random)}, {"kind": ["projection", "rotation"]}))
        called += amnesic.beyond(data, resamples=200).interval[1] < 0
    assert called / 200 <= 0.07
