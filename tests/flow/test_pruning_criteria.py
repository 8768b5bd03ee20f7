"""Scores and choices of image tokens: exact forms, naive loops, planted tokens, invariances."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import interp
from interp.core import ModelRefused, NumericalError, OutOfRange, Prompt, PromptError, Segment
from interp.flow import pruning_by_attention as by_attention
from interp.flow import pruning_by_diversity as by_diversity
from interp.flow import pruning_by_encoder as by_encoder
from interp.flow.pruning_criteria import CRITERIA, criterion, selecting
from interp.flow.pruning_evidence import Evidence
from interp.models.model import Model

IMAGE, N = tuple(range(3, 12)), 18


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(*shape, seed=0):
    return tensor(*shape, seed=seed).softmax(-1).float()


# -- zeroth order, exactly -------------------------------------------------------------------------


def projector(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), activation, nn.Linear(11, 5)).double()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_zeroth_order_is_the_squared_jacobian(activation):
    module, x = projector(activation), tensor(6, 7)
    score = by_encoder.zeroth_order(x, *by_encoder.projector_layers(module, x))
    for token in range(6):
        jacobian = torch.autograd.functional.jacobian(module, x[token])
        assert abs(float(score[token] / jacobian.pow(2).sum()) - 1) < 1e-10


def test_zeroth_order_is_what_random_differences_estimate():
    module, x = projector(nn.GELU()), tensor(6, 7)
    score = by_encoder.zeroth_order(x, *by_encoder.projector_layers(module, x))
    noise, mu = tensor(20000, 1, 7, seed=3), 1e-4
    with torch.no_grad():
        change = (module(x + mu * noise) - module(x - mu * noise)) / (2 * mu)
    each = change.pow(2).sum(-1)
    error = each.std(0) / math.sqrt(len(each))
    assert bool(((each.mean(0) - score).abs() < 5 * error).all())
    assert float(score.max() / score.min()) > 1.5


def test_a_linear_projector_says_nothing():
    x = tensor(6, 7)
    for module in (projector(nn.Identity()), nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5)).double()):
        with pytest.raises(NumericalError, match="responds equally to noise on every token"):
            by_encoder.zeroth_order(x, *by_encoder.projector_layers(module, x))
    normed = nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5))
    for module in (nn.Linear(7, 5).double(), normed.double()):
        with pytest.raises(ModelRefused, match="not two linear maps around an activation"):
            by_encoder.projector_layers(module, x)

    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.act, self.two = nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 5)

        def forward(self, x):
            return 2 * self.two(self.act(self.one(x)))

    with pytest.raises(ModelRefused, match="more than its two linear maps"):
        by_encoder.projector_layers(More().double(), x)


# -- attention -------------------------------------------------------------------------------------


def test_scores_of_attention_are_their_loops():
    rows, text = attention(4, 5, 9), attention(4, 5, 5, seed=1)
    score = by_attention.adaptinfer(rows, text)
    weight = np.array([np.mean([[float(text[h, i, t]) for i in range(5)] for h in range(4)])
                       for t in range(5)])
    weight /= weight.sum()
    for token in range(9):
        expected = sum(weight[t] * np.mean([float(rows[h, t, token]) for h in range(4)])
                       for t in range(5))
        assert float(score[token]) == pytest.approx(expected, abs=1e-6)
    guided = by_attention.guided_attention(rows)
    assert float(guided[2]) == pytest.approx(float(rows[:, :, 2].mean()), abs=1e-7)
    before, after = tensor(8, 6), tensor(8, 6, seed=1)
    found = by_attention.transition(before, after)
    e = [math.exp(1 - float(a @ b / a.norm() / b.norm())) for a, b in zip(before, after)]
    for i in range(8):
        assert float(found[i]) == pytest.approx(
            float(after[i].norm() / before[i].norm()) * e[i] / sum(e), abs=1e-9)
    # Norm ratios do not notice a common scale, and neither does the direction.
    assert torch.allclose(found, by_attention.transition(3 * before, 3 * after))
    made = by_attention.transprune([found, 2 * found], rows[:, :, :8])
    iga = by_attention.guided_attention(rows[:, :, :8]).double()
    assert torch.allclose(made, found / found.sum() + iga / iga.sum(), atol=1e-6)
    assert float(made.sum()) == pytest.approx(2, abs=1e-6)


def test_raters_are_the_text_that_the_image_calls_for():
    image, text = tensor(9, 6), 0.01 * tensor(5, 6, seed=1)
    text[3] = 5 * image.mean(0)
    raters = by_attention.text_raters(text, image)
    assert raters.tolist() == [False, False, False, True, False]
    rows = attention(4, 5, 9)
    assert torch.allclose(by_attention.sparsevlm(rows, raters), rows[:, 3].mean(0))
    assert by_attention.text_raters(torch.ones(4, 6), image).all()
    # Version 2: what position alone explains is divided out, and heads that read the image count.
    trend = by_attention.attention_by_position(range(9, 14), range(9), 0.5 ** torch.arange(3.0))
    assert torch.allclose(trend.sum(1), torch.ones(5), atol=1e-6) and float(trend.std()) > 0
    flat = by_attention.sparsevlm(trend.expand(4, 5, 9), raters, by_position=trend)
    assert torch.allclose(flat, torch.ones(9), atol=1e-5)
    loud = rows.clone()
    loud[2] *= 3
    assert torch.allclose(by_attention.sparsevlm(loud, raters, n_heads=1), loud[2, 3])


def test_a_trend_over_positions_is_taken_out():
    at = torch.arange(40.0)
    trend = 0.01 * torch.exp(0.07 * at)
    assert torch.allclose(by_attention.position_trend(trend), trend, rtol=1e-4)
    planted = trend.clone()
    planted[5] *= 3
    assert by_attention.top(planted, 1) != (5,)
    assert by_attention.top(by_attention.debiased(planted, trend), 1) == (5,)
    padding = torch.zeros(40, dtype=torch.bool)
    padding[5] = True
    assert float(by_attention.debiased(planted, trend, padding)[5]) == 0


def test_layers_keep_more_where_the_last_row_looks_at_the_image():
    rate = {"attentive": 0.25, "indifferent": 0.1, "rate": 0.4, "step": 0.3}
    share = by_attention.plphp_retention(torch.tensor([0.3, 0.2, 0.05]), **rate)
    assert torch.allclose(share, torch.tensor([0.7, 0.4, 0.1]))
    rows = attention(3, 4, 10)
    kept = by_attention.plphp_kept(rows, share)
    assert kept.sum(-1).tolist() == [[7] * 4, [4] * 4, [1] * 4]
    for layer in range(3):
        for head in range(4):
            mine = rows[layer, head]
            assert float(mine[kept[layer, head]].min()) >= float(mine[~kept[layer, head]].max())


def test_exits():
    kl = np.array([[0.9, 0.002, 0.5, 0.002], [0.7, 0.004, 0.1, 0.001]])
    assert by_attention.withdrawal_layer(kl, [4, 5, 6, 7]) == 5
    assert by_attention.withdrawal_layer(kl, [4, 5, 6, 7], first=6) == 7
    assert by_attention.withdrawal_layer(kl, [4, 5, 6, 7], eta=1e-5) is None
    text = [tensor(5, 6, seed=s) for s in range(3)]

    def gate(x):
        assert x.shape == (12,) and torch.allclose(x[6:], text[calls[0]][-1])
        assert torch.allclose(x[:6], text[calls[0]][:-1].mean(0))
        calls[0] += 1
        return torch.tensor([0.0, 1.0 if calls[0] == 3 else -1.0])

    calls = [0]
    assert by_attention.exit_layer(text, [gate] * 3) == 2
    assert by_attention.exit_layer(text, [lambda x: torch.zeros(2)] * 3) is None


# -- diversity -------------------------------------------------------------------------------------


def clusters(seed=0):
    """Three tight clusters of 5, 4 and 3 tokens."""
    centers = 10 * torch.eye(3, 6, dtype=torch.float64)
    which = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    return centers[which] + 0.01 * tensor(12, 6, seed=seed), which


@pytest.mark.parametrize("choose", [
    by_diversity.divprune, by_diversity.k_center, by_diversity.max_sum,
    lambda x, n: by_diversity.apet(x, n, basis=3),
    lambda x, n: by_diversity.agile(torch.arange(12.0), x, n, similarity=0.9),
    lambda x, n: by_diversity.sensitive_and_diverse(torch.ones(12), x, n)])
def test_diverse_choices_take_one_of_each_cluster(choose):
    features, which = clusters()
    assert sorted(which[list(choose(features, 3))].tolist()) == [0, 1, 2]
    for number in (0, 1, 7, 12):
        kept = choose(features, number)
        assert len(set(kept)) == len(kept) == number and list(kept) == sorted(kept)
    with pytest.raises(OutOfRange, match="cannot keep 13 of 12 image tokens"):
        choose(features, 13)
    # The order in which tokens come does not matter where no two are equal.
    turned = choose(features.flip(0), 3)
    assert sorted(which.flip(0)[list(turned)].tolist()) == [0, 1, 2]


def test_divprune_is_the_greedy_loop():
    x = tensor(11, 5)
    unit = x / x.norm(dim=1, keepdim=True)
    far = 1 - unit @ unit.T
    start = max(range(11), key=lambda i: min(float(far[i, j]) for j in range(11) if j != i))
    kept = [start]
    while len(kept) < 5:
        rest = [i for i in range(11) if i not in kept]
        kept.append(max(rest, key=lambda i: min(float(far[i, j]) for j in kept)))
    assert by_diversity.divprune(x, 5) == tuple(sorted(kept))
    assert by_diversity.divprune(7 * x, 5) == tuple(sorted(kept))


def test_dart_keeps_pivots_and_what_resembles_them_least():
    x, _ = clusters()
    keys = 0.1 * tensor(2, 12, 4)
    keys[:, 7] *= 100
    text, text_keys = x[:2] + 0, tensor(2, 2, 4, seed=2)
    kept = by_diversity.dart(x, keys, text, text_keys, 3, image_pivots=1, text_pivots=1)
    assert 7 in kept and len(kept) == 3
    cosine = torch.nn.functional.cosine_similarity(x, x[7][None])
    least = int(cosine.argmin())
    assert least in kept
    assert len(by_diversity.dart(x, keys, text, text_keys, 9)) == 9
    assert by_diversity.dart(x, keys, text, text_keys, 0) == ()


def test_apet_scores_what_the_basis_does_not_explain():
    x = tensor(10, 6)
    x[7] = 2 * x[1] - x[4]
    error = by_diversity.apet_error(x, [1, 4, 5], ridge=1e-12)
    assert float(error[[1, 4, 5, 7]].abs().max()) < 1e-6 < float(error[0])
    q, _ = torch.linalg.qr(x[[1, 4, 5]].T)
    assert torch.allclose(error, (x - x @ q @ q.T).norm(dim=1), atol=1e-6)


def test_merging_keeps_the_mean_and_ranks_are_dimensions():
    x, which = clusters()
    merged = by_diversity.merge_into_nearest(x, [0, 5, 9])
    for row, cluster in zip(merged, range(3)):
        assert torch.allclose(row, x[which == cluster].mean(0))
    assert torch.allclose(by_diversity.merge_into_nearest(x, range(12)), x)
    assert by_diversity.effective_rank(x) < by_diversity.effective_rank(tensor(12, 6))
    assert by_diversity.effective_rank(torch.eye(5)) == pytest.approx(5)
    added = by_diversity.recycled(x, torch.arange(12.0), [0, 1], share=0.3)
    assert added.shape == (1, 6) and torch.allclose(added[0], x[9:12].mean(0))


# -- encoder ---------------------------------------------------------------------------------------


def test_hiprune_takes_neighbors_inside_the_picture():
    middle, late = torch.zeros(20), torch.arange(20.0)
    middle[[7, 0]] = torch.tensor([9.0, 8.0])
    kept = by_encoder.hiprune(middle, late, 10, 5, alpha=1.0)
    assert set(kept) == {7, 6, 8, 2, 12} | {0, 1, 5} | {18, 19}


def test_flowcut_follows_the_class_token_and_the_values():
    rows, values = attention(4, 2, 9), tensor(4, 2, 9, 3).float()
    kept = by_encoder.flowcut(rows, values, tensor(4, 2, 3, seed=5).float(), 3)
    assert len(kept) == 3
    values[:, :, 4] *= 50
    rows[:, :, 4] = rows.max()
    assert 4 in by_encoder.flowcut(rows, values, torch.zeros(4, 2, 3), 1)
    # One block: the score alone.
    one = by_encoder.flowcut(rows[:1], values[:1], torch.zeros(1, 2, 3), 4)
    flow = rows[0].mean(0) / rows[0].mean(0).sum() + 1 / 9
    assert one == by_attention.top(flow * values[0].mean(0).abs().sum(-1), 4)


def test_quotas_follow_the_scores():
    assert by_encoder.shares([1, 1, 1], [5, 5, 5], 4) in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    assert by_encoder.shares([0, 0], [3, 3], 5) in ([3, 2], [2, 3])
    a = torch.full((16,), 0.001)
    a[4:8] = torch.tensor([0.2, 0.4, 0.1, 0.1])
    kept = by_encoder.holov(a, tensor(16, 6).float(), 4, crops=4)
    assert len(kept) == 4 and 5 in kept and sum(4 <= i < 8 for i in kept) >= 2
    early = torch.tensor([0.1, 0.5, 0.3, 0.1])
    tiles = by_encoder.hired(early, [torch.arange(3.0), torch.arange(3.0)], [0, 1, 1, 0], 3, alpha=0.5)
    assert tiles == [(), (0, 1, 2)]


def test_busy_patches_have_more_bits():
    from PIL import Image

    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 8:] = np.arange(64).reshape(8, 8)
    found = by_encoder.patch_entropy(Image.fromarray(pixels),
                                     [(0, 0, 8, 8), (8, 0, 16, 8), None, (4, 0, 12, 8)])
    assert np.allclose(found[:3], [0, 6, 0]) and 0 < found[3] < 6
    even = torch.full((2, 6, 6), 1 / 6)
    score = by_encoder.vflowopt(even, torch.tensor([0.0, 6, 0, 1, 2, 0]))
    assert by_attention.top(score, 1) == (1,)


# -- the table, on models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tiny):
    return Model(tiny("llava"), "tiny-llava")


def picture_prompt(seed=0, grid=(3, 3)):
    """A picture for the tiny LLaVA: 9 tokens, the class token left out."""
    rng = np.random.default_rng(seed)
    ids = [*rng.integers(3, 90, 3).tolist(), *[96] * 9, *rng.integers(3, 90, 6).tolist()]
    boxes = tuple((8 * x, 8 * y, 8 * x + 8, 8 * y + 8) for y in range(3) for x in range(3))
    from PIL import Image

    picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3)).astype(np.uint8))
    return Prompt(tuple(ids), (Segment("image", IMAGE, "image", grid, boxes),), images=(picture,),
                  inputs={"pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)})


def test_every_row_of_the_table_keeps_what_it_is_asked_for(llava):
    evidence = Evidence(llava, picture_prompt())
    rng = np.random.default_rng(0)
    assert len(selecting()) >= 20 and "random" not in selecting()
    for name in ("random", *selecting()):
        row = CRITERIA[name]
        assert row.source and row.needs and row.provenance in ("code", "paper", "secondary")
        for layer in range(row.first, llava.n_layers):
            for number in (0, 1, 4, 9):
                kept = row.keep(evidence, layer, number, rng)
                assert len(set(kept)) == len(kept) == number and set(kept) <= set(IMAGE)
                assert list(kept) == sorted(kept)
        if row.first:
            with pytest.raises(OutOfRange, match="reads the block before"):
                row.keep(evidence, 0, 3, rng)


def test_rows_of_attention_are_those_of_the_model(llava):
    prompt = picture_prompt()
    evidence = Evidence(llava, prompt)
    pattern = llava.run(prompt, read="pattern").reads["pattern"].values[0]
    states = llava.run(prompt, read="resid_pre").reads["resid_pre"].values[0]
    for layer in range(llava.n_layers):
        assert np.allclose(evidence.asking(layer), pattern[layer][:, 12:, 3:12], atol=1e-5)
        assert np.allclose(evidence.among_text(layer), pattern[layer][:, 12:, 12:], atol=1e-5)
        assert np.allclose(evidence.among_image(layer),
                           pattern[layer][:, 3:12, 3:12].mean((0, 1)), atol=1e-6)
        assert np.allclose(evidence.states(layer), states[layer, 3:12], atol=1e-5)
        fastv = np.argsort(-pattern[layer][:, -1, 3:12].mean(0), kind="stable")[:4]
        assert set(criterion("PyramidDrop").keep(evidence, layer, 4)) == {int(i) + 3 for i in fastv}
        if layer + 1 < llava.n_layers:
            assert (criterion("FastV").keep(evidence, layer + 1, 4)
                    == criterion("PyramidDrop").keep(evidence, layer, 4))
    key = llava.run(prompt, read="k").reads["k"].values[0]
    assert np.allclose(evidence.keys(1), key[1, 3:12].transpose(1, 0, 2), atol=1e-5)


def test_attention_without_positions_does_not_know_the_order(llava):
    """Equal states at every place: with RoPE the weights differ, without it they are equal."""
    prompt = Prompt.from_tokens([5] * N, {"image": (3, 12)})
    evidence = Evidence(llava, prompt)
    assert float(evidence.last(0).std(-1).max()) > 1e-4
    assert float(evidence.position_free(0).std(-1).max()) < 1e-6


def test_after_pruning_a_criterion_sees_the_pruned_run(llava):
    evidence = Evidence(llava, picture_prompt())
    kept = (3, 5, 6, 8, 11)
    pruned = evidence.pruned(1, kept)
    assert pruned.tokens == kept and pruned.cells == [0, 2, 3, 5, 8]
    gone = [p for p in IMAGE if p not in kept]
    cut = interp.block([p for p in range(3, N) if p not in gone], gone, layers=[1, 2])
    run = llava.run(picture_prompt(), read=["pattern", "resid_pre", "k"], write=cut)
    pattern, states = (run.reads[x].values[0] for x in ("pattern", "resid_pre"))
    for layer in (1, 2):
        assert np.allclose(pruned.asking(layer), pattern[layer][:, 12:][:, :, kept], atol=1e-5)
        assert np.allclose(pruned.states(layer), states[layer, list(kept)], atol=1e-4)
        assert np.allclose(pruned.among_image(layer),
                           pattern[layer][:, kept][:, :, kept].mean((0, 1)), atol=1e-5)
        assert np.allclose(pruned.keys(layer),
                           run.reads["k"].values[0][layer, list(kept)].transpose(1, 0, 2), atol=1e-4)
    for name in selecting():
        if name != "HiPrune":
            assert set(CRITERIA[name].keep(pruned, 2, 3)) <= set(kept)
    with pytest.raises(OutOfRange, match="block 0 is past"):
        pruned.states(0)
    with pytest.raises(OutOfRange, match="no image token any more"):
        pruned.pruned(2, [4])


def test_bad_input_is_one_sentence(tiny, llava):
    qwen = Model(tiny("qwen2_5_vl"), "tiny-qwen")
    ids = [5, 6, 7, 94, *[96] * 6, 93, *range(20, 25)]
    rng = np.random.default_rng(0)
    given = Prompt(tuple(ids), (Segment("image", tuple(range(4, 10)), "image", (2, 3)),), inputs={
        "pixel_values": rng.standard_normal((24, 96)).astype(np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
        "mm_token_type_ids": np.array([[int(i == 96) for i in ids]])})
    evidence = Evidence(qwen, given)
    with pytest.raises(ModelRefused, match="tiny-qwen has no class token"):
        criterion("[CLS] attention").keep(evidence, 1, 2)
    assert len(criterion("DivPrune").keep(evidence, 1, 2)) == 2
    assert len(criterion("HiPrune").keep(evidence, 1, 2)) == 2
    with pytest.raises(PromptError, match="several axes"):
        Evidence(qwen, given, how="drop_compact_ids")
    plain = Evidence(llava, picture_prompt())
    with pytest.raises(OutOfRange, match="cannot keep 10 of 9 image tokens"):
        criterion("DivPrune").keep(plain, 1, 10)
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        criterion("DivPrune").keep(plain, 3, 2)
    with pytest.raises(PromptError, match="no criterion 'Fast'; there are: random, FastV"):
        criterion("Fast")
    with pytest.raises(PromptError, match="HiRED keeps no number of tokens"):
        criterion("HiRED").keep(plain, 1, 2)
    with pytest.raises(interp.core.SegmentNotFound, match="no segment 'image'.*images="):
        Evidence(llava, Prompt.from_tokens(range(3, 12)))
    with pytest.raises(PromptError, match="nothing follows the image"):
        Evidence(llava, Prompt.from_tokens(range(3, 12), {"image": (4, 9)}))
    tiled = Prompt(plain.prompt.ids, (Segment("image", IMAGE, "image"),), inputs=plain.prompt.inputs)
    with pytest.raises(PromptError, match="not one grid of cells"):
        criterion("HiPrune").keep(Evidence(llava, tiled), 1, 2)
    with pytest.raises(PromptError, match="need one picture in the prompt, and boxes"):
        criterion("VFlowOpt").keep(Evidence(llava, tiled), 1, 2)
    text = Model(tiny("llama"), "tiny-llama")
    with pytest.raises(ModelRefused, match="tiny-llama is a text model"):
        some = Prompt.from_tokens(range(3, 15), {"image": (2, 8)})
        criterion("HiPrune").keep(Evidence(text, some), 1, 2)
    with pytest.raises(NumericalError, match="1 of 2 scores are NaN"):
        by_attention.top(torch.tensor([0.0, float("nan")]), 1)
