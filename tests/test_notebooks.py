"""The notebooks run, their outputs are clean, and "change this line" is true."""

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

from interp.prompts import needle

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("01_first_look", "02_sinks", "03_heads_and_ablations", "04_horizons", "05_probes",
         "06_images", "07_your_own_model")
LINE = re.compile(r'^model = interp\.open_model\("([^"]+)"\)', re.M)

nbformat = pytest.importorskip("nbformat", reason="the extra 'notebooks' is not installed")
pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
pytest.importorskip("ipykernel", reason="the extra 'notebooks' is not installed")

_spec = importlib.util.spec_from_file_location("refresh_notebooks", FOLDER / "refresh.py")
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all: importing takes longer than running."""
    with refresh.kernel() as manager:
        yield manager


def test_these_are_the_notebooks():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom_in_a_kernel(name, kernel):
    notebook = refresh.clean(refresh.run(read(name), kernel))
    # As strict as for what is committed: no error, nothing on the error stream, not too large.
    assert refresh.problems(notebook) == []


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_clean_and_small(name):
    notebook = read(name)
    assert refresh.problems(notebook) == []
    assert [cell.execution_count for cell in code(notebook)] == [
        i + 1 for i in range(len(code(notebook)))]
    assert refresh.clean(read(name)) == notebook            # nothing of the machine is left in it
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not re.search(r"/(home|Users|root|tmp|work|opt)/", text)
    assert any("image/png" in out.get("data", {}) for cell in code(notebook) for out in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_computed_in_cells_never_typed_in_prose(name):
    text = re.sub(r"```.*?```|`[^`]*`|arXiv:\d{4}\.\d{5}", "", prose(read(name)), flags=re.S)
    text = re.sub(r"^# \d\. ", "", text, flags=re.M).replace("Layer -1", "")
    assert not re.findall(r"\d+", text)


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_with_the_one_line_to_change(name):
    notebook = read(name)
    assert len(LINE.findall("\n".join(cell.source for cell in code(notebook)))) == 1
    assert LINE.search(code(notebook)[0].source)
    last = notebook.cells[-1]
    assert last.cell_type == "markdown" and last.source.startswith("## On your model: change this line")
    assert 'model = interp.open_model("org/name")' in last.source


def test_a_notebook_that_fails_or_shows_the_machine_is_refused():
    notebook = read(NAMES[0])
    out = nbformat.v4.new_output("stream", name="stdout", text=f"{FOLDER}/x")
    code(notebook)[0].outputs = [out]
    assert "shows a path of this machine" in refresh.problems(notebook)[0]
    code(notebook)[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="Warning")]
    assert "error stream" in refresh.problems(notebook)[0]
    code(notebook)[0].outputs = [nbformat.v4.new_output("error", ename="E", evalue="v", traceback=[])]
    assert "fails: E: v" in refresh.problems(notebook)[0]
    code(notebook)[0].outputs = [nbformat.v4.new_output("display_data", {"image/png": "A" * 400_000})]
    assert "bytes" in refresh.problems(notebook)[0]
    code(notebook)[0].outputs, code(notebook)[0].execution_count = [], None
    assert "was not run" in refresh.problems(notebook)[0]


def word_tokenizer():
    """A tokenizer of English words and signs, none of a bundled model's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    rng = np.random.default_rng(0)
    text = " ".join([needle.haystack(rng, 3000), needle.TEMPLATE, *(
        part for fact in needle.facts(rng, 80) for part in (fact.sentence, fact.question)),
        *needle.COLORS, *needle.ANIMALS, *needle.PLACES])
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return t.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                     pad_token="<pad>", unk_token="<unk>")


def saved(folder, architecture):
    """A tiny random model on disk, of sizes unlike those of any bundled one."""
    torch.manual_seed(5)
    tokenizer = word_tokenizer()
    if architecture == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=40, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, initializer_range=0.2))
    else:
        model = t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=len(tokenizer), n_embd=36, n_layer=2, n_head=6, n_positions=512,
            bos_token_id=1, eos_token_id=2, initializer_range=0.2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name, architecture", [
    ("07_your_own_model", "llama"), ("03_heads_and_ablations", "gpt2")])
def test_another_model_in_that_line_is_all_it_takes(name, architecture, tmp_path, capsys):
    line = f"model = interp.open_model({str(saved(tmp_path / 'mine', architecture))!r})"
    scope, values = {}, []
    for number, cell in enumerate(code(read(name)), 1):
        source = LINE.sub(lambda _: line, cell.source)
        source = "\n".join(part for part in source.splitlines() if not part.startswith("%"))
        tree = ast.parse(source)
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}, cell {number}", "exec"), scope)
        if shown is not None:
            values.append(eval(compile(ast.Expression(shown.value), name, "eval"), scope))
    assert scope["model"].name == "mine" and scope["model"].n_layers == (3, 2)[architecture == "gpt2"]
    assert sum(hasattr(value, "savefig") for value in values) >= 1
    assert "mine" in repr(values[0]) and capsys.readouterr().out
