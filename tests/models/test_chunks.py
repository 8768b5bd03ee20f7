"""Attention in chunks, whose size transformers hands over under the name of a window's."""

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from interp.core import Prompt
from interp.models.model import Model


def test_chunked_attention_is_not_taken_for_a_sliding_window():
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=56, intermediate_size_mlp=56,
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=640, num_local_experts=2, attention_chunk_size=5, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)
    hf = Llama4ForCausalLM(config).eval()
    model = Model(hf, "llama4")
    ids = torch.randint(3, 97, (1, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = hf(input_ids=ids, use_cache=False).logits[0]
    run = model.run(Prompt.from_tokens(ids[0].tolist()), read="pattern", stats="received")
    assert torch.allclose(run.logits[0], plain, atol=1e-4 * float(plain.abs().max()))
    pattern = run.reads["pattern"].values[0]
    chunked = [layer for layer in range(3) if not pattern[layer, :, 7, :5].any()]
    assert chunked, "no layer keeps to its chunk"
    for layer in chunked:  # the chunk of token 7 is 5 to 9: a window of five would see 3 to 7
        assert (pattern[layer, :, 7, 5:8] > 0).all()
