"""Misspelt names and swapped arguments are answered with what was meant, in one sentence."""

import inspect

import pytest

import interp
from interp.core.errors import UndertowError, did_you_mean, near
from interp.core.head import heads
from interp.core.site import Site
from interp.prompts.first_token import token_id
from interp.stream import reducers, residual


@pytest.mark.parametrize("given, known, found", [
    ("recieved", ["entropy", "received"], "received"), ("Needle", ["needle"], "needle"),
    ("raeder", ["looker", "reader"], "reader"), ("planet", ["reader", "looker"], ""), ("x", [], ""),
])
def test_the_near_name_is_found_and_a_far_one_is_not(given, known, found):
    assert near(given, known) == found
    assert did_you_mean(given, known) == (f" Did you mean {found!r}?" if found else "")


@pytest.mark.parametrize("call, meant", [
    (lambda: Site("resid_pots"), "resid_post"),
    (lambda: interp.Prompt.from_tokens([1, 2], {"needle": [1]}).positions("nedle"), "needle"),
    (lambda: reducers.by_name("recieved"), "received"),
    (lambda: residual.by_name("cosin"), "cosine"),
    (lambda: interp.ablate("L0H0", by="unifrom"), "uniform"),
    (lambda: interp.ablate("L0H0", phase="decod"), "decode"),
    (lambda: interp.edit("z", "replcae", 0.0), "replace"),
])
def test_an_unknown_name_is_answered_by_the_near_one(call, meant):
    with pytest.raises((UndertowError, ValueError), match=rf"\. Did you mean '{meant}'\?$"):
        call()


def test_a_name_far_from_all_is_not_answered_by_a_guess():
    with pytest.raises(UndertowError) as caught:
        Site("attention")
    assert "Did you mean" not in str(caught.value) and "resid_post" in str(caught.value)


@pytest.mark.parametrize("hook, site", [
    ("blocks.0.hook_resid_post", "resid_post.0"), ("blocks.11.attn.hook_z", "z.11"),
    ("blocks.3.attn.hook_attn_scores", "scores.3"), ("hook_embed", "embed"),
])
def test_the_name_of_a_hook_is_answered_by_the_site(hook, site):
    with pytest.raises(UndertowError, match=f"TransformerLens hook; the site is '{site}'"):
        Site.parse(hook)


def plain(function):
    """Without the type checks of the test run, which would speak first."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("call, sentence", [
    (lambda: plain(Site.parse.__func__)(Site, 3), "3 is not a site; .* like 'resid_post.3'"),
    (lambda: plain(interp.scale)(0.5, ["L1H0"]), r"the heads first.*scale\(heads, 0.5\)"),
    (lambda: plain(heads)(0.5), "0.5 is neither a head nor a list of heads"),
    (lambda: plain(interp.Prompt.from_tokens.__func__)(interp.Prompt, [1], ["amber"]),
     "by name, as a dict like .*not as .'amber'."),
    (lambda: token_id("seven"), "one token id, not 'seven'"),
    (lambda: token_id([4, 5]), r"one token id, not \[4, 5\]"),
])
def test_arguments_of_another_kind_are_answered_by_how_to_write_them(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
