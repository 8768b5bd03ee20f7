"""The whole examination of a model: open it, then look at everything a user relies on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from interp.core.errors import ModelNotFound, ModelRefused, near
from interp.doctor.attention import examine_attention
from interp.doctor.costs import examine_costs
from interp.doctor.lanes import compare, open_lanes, prove_sites, sentence, weigh_sites
from interp.doctor.picture import examine_picture
from interp.doctor.report import Report
from interp.doctor.tokens import examine_tokens
from interp.models.model import Model
from interp.models.open import bundled, open_model


def examine(
    name: str,
    *,
    out: Optional[Path] = None,
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    trust_remote_code: bool = False,
    quick: bool = False,
    lanes: Optional[Sequence[str]] = None,
) -> Report:
    """Open a model and examine it; a model that cannot be opened gives a report that says why.

    Example:
        >>> examine("no/such/folder/anywhere").exit_code
        2

    Args:
        name: a bundled name, a folder or a hub id, as for `interp.open_model`.
        out: where the picture of image tokens is drawn; nowhere if None.
        quick: sites in the middle layer alone, no decoding and no comparison of sites.
        lanes: the lanes to look at, each of which must do everything. If None, all of them: then
            what one lane cannot and another can is only noted.

    Never raises for a fault of the model: whatever breaks is a finding.
    """
    given: dict[str, Any] = {
        "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code,
    }
    try:
        model = open_model(name, **given)
    except Exception as error:  # damaged files raise anything
        if isinstance(error, ModelRefused) and "lane='bridge'" in str(error):
            try:
                model = open_model(name, lane="bridge", **given)
            except Exception as second:
                return Report(name, refused=f"{sentence(error)} In lane 'bridge': "
                              f"{sentence(second)}", nearest=_nearest(name, second))
        else:
            return Report(name, refused=sentence(error), nearest=_nearest(name, error))
    return examine_model(model, out=out, quick=quick, lanes=lanes)


def examine_model(
    model: Model,
    *,
    out: Optional[Path] = None,
    quick: bool = False,
    lanes: Optional[Sequence[str]] = None,
) -> Report:
    """Examine a model that is open already; see `examine`.

    Example:
        >>> import interp
        >>> report = examine_model(interp.open_model("backcopy-1l"), quick=True, lanes=["hf"])
        >>> report.verdict, report.kv_heads
        ('all right', (0,))
    """
    report = Report(model.name, _about(model))
    opened = open_lanes(model, report, lanes)

    def guarded(about: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except Exception as error:
            report.fault(about, f"the examination of {about} broke off: {sentence(error)}")
            return None

    for lane in opened:
        guarded(f"sites in lane {lane.lane}", lambda lane=lane: prove_sites(lane, report, quick))
    weigh_sites(report, lanes)
    guarded("tokens", lambda: examine_tokens(model, report))
    guarded("attention", lambda: examine_attention(model, report))
    prompt = guarded("pictures", lambda: examine_picture(model, report, out))
    window = min((w for w in report.windows if w is not None), default=None)
    for lane in opened:
        compare(lane, report, prompt, quick, window)
    guarded("costs", lambda: examine_costs(model, report, quick))
    return report


def _about(model: Model) -> dict[str, Any]:
    parameters = list({id(p): p for p in model.hf.parameters()}.values())
    return {
        **model.manifest(), "d_head": model.d_head, "d_vocab": model.d_vocab,
        "max_positions": model.max_positions, "has_images": model.has_images,
        "parameters": sum(p.numel() for p in parameters),
        "weights_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _nearest(name: str, error: Exception) -> str:
    """The nearest way that is supported, in one sentence."""
    text = str(error)
    if isinstance(error, ModelNotFound):
        if near(name, bundled()):
            return "" if "Did you mean" in text else f"Did you mean {near(name, bundled())!r}?"
        return ("Give a folder that save_pretrained wrote, a hub id like 'org/model' (with network "
                f"or a filled cache), or a bundled model: {', '.join(bundled())}.")
    if "trust_remote_code" in text:
        return ("Read the code that comes with the model, then call the doctor with "
                "--trust-remote-code if you trust it.")
    if "safetensors" in text:
        return ("Load it once with transformers where you trust the file and save it with "
                "save_pretrained(folder), which writes safetensors.")
    if isinstance(error, ImportError):
        return "Install the package that is named above, or open an unquantized checkpoint."
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return "Try --dtype bfloat16, --device auto (spread over devices), or a smaller model."
    if "NaN" in text or "infinity" in text:
        return "Try --dtype float32; if that fails too, the weights are damaged: fetch them again."
    return ("Supported are transformers models whose attention goes through transformers' attention "
            "interface (Llama, Qwen, Gemma, Mistral, gpt-oss, GPT-2, LLaVA, Qwen-VL, BERT, ...); "
            "models without attention (state-space models) are not.")
