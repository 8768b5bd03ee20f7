"""What the sticky-token paper's repository reports: counts per model, and the list of one of them."""

import pandas as pd

RELEASED = pd.DataFrame(
    [("all-MiniLM-L6-v2", 23, 30522, 21), ("all-mpnet-base-v2", 109, 30527, 24),
     ("sup-simcse-bert-base-uncased", 109, 30522, 22), ("sup-simcse-bert-large-uncased", 335, 30522, 11),
     ("sup-simcse-roberta-base", 125, 50265, 27), ("sup-simcse-roberta-large", 355, 50265, 25),
     ("sentence-t5-base", 110, 32100, 21), ("sentence-t5-large", 336, 32100, 30),
     ("sentence-t5-xl", 1242, 32100, 34), ("sentence-t5-xxl", 4866, 32100, 22),
     ("gtr-t5-base", 110, 32100, 16), ("gtr-t5-large", 336, 32100, 14), ("gtr-t5-xl", 1242, 32100, 15),
     ("gtr-t5-xxl", 4866, 32100, 7), ("instructor-base", 110, 32100, 12),
     ("instructor-large", 336, 32100, 32), ("instructor-xl", 1242, 32100, 8),
     ("e5-small", 33, 30522, 17), ("e5-base", 109, 30522, 11), ("e5-large", 335, 30522, 21),
     ("e5-mistral-7b-instruct", 7111, 32000, 31),
     ("bge-small-en-v1.5", 33, 30522, 18), ("bge-base-en-v1.5", 109, 30522, 20),
     ("bge-large-en-v1.5", 335, 30522, 15), ("UAE-Large-V1", 335, 30522, 14),
     ("nomic-embed-text-v1", 137, 30522, 12), ("nomic-embed-text-v1.5", 137, 30522, 9),
     ("gte-small", 33, 30522, 15), ("gte-base", 109, 30522, 18), ("gte-large", 335, 30522, 18),
     ("gte-base-en-v1.5", 137, 30522, 20), ("gte-large-en-v1.5", 434, 30522, 17),
     ("gte-Qwen2-1.5B-instruct", 1543, 151643, 5), ("gte-Qwen2-7B-instruct", 7069, 151643, 103),
     ("GritLM-7B", 7111, 32000, 17), ("SFR-Embedding-2_R", 7111, 32000, 2),
     ("SFR-Embedding-Mistral", 7111, 32000, 46)],
    columns=["model", "parameters", "vocabulary", "sticky"])
"""Millions of parameters, tokens in the vocabulary, sticky tokens found."""

BENCHMARKS = pd.DataFrame(
    [("all-mpnet-base-v2", 56.24, 56.36), ("bge-base-en-v1.5", 61.68, 61.62),
     ("gte-base-en-v1.5", 62.13, 59.38)], columns=["model", "sticky", "benign"])
"""Mean benchmark score of three models with sticky and with benign tokens inserted."""

KNOWN = {
    "all-minilm-l6-v2": {
        "usable": 23699, "mean": 0.1998, "threshold": 49.204, "shortlist": 474,
        "rates": {101: 0.8760, 1063: 0.8382, 1549: 0.8400, 1648: 0.8371, 1987: 0.8458, 1994: 0.8687,
                  3832: 0.8327, 9414: 0.8415, 12285: 0.8644, 13225: 0.8469, 13237: 0.8407,
                  13474: 0.8342, 15090: 0.8404, 16432: 0.8400, 20903: 0.8556, 22793: 0.8356,
                  24833: 0.8324, 26090: 0.8367, 26728: 0.8476, 28575: 0.8320, 28626: 0.8313}},
}
"""Token id -> pull rate on cosine distances, by the name of the model."""
