"""Claims of `position_probes`, with their sources and the papers' numbers."""

NOPOS, NEAR, PICTURES = "arXiv:2203.16634", "arXiv:2501.00073", "arXiv:2305.10046"
OWN = "measured by this toolkit, after arXiv:2203.16634"

TRIVIAL = ("readable", "input", "mask", "bidirectional", "alike_input", "alike_first", "alike_bare",
           "alike_free", "variance", "across", "down", "left", "above", "captions", "asks", "unused")
"""Claims that can hold of untrained models: of the mask, of patch indices, of not answering."""

CLAIMS = {
    "readable": ("Absolute position can be read from states of random tokens, better than by the best "
                 "constant guess.", NOPOS),
    "training": ("Training makes position more readable than it is in the untrained model.", OWN),
    "input": ("Without position encodings the embeddings hold no position.", NOPOS),
    "early": ("A model trained without position encodings has position within four layers: the error "
              "is below a tenth of the constant guess's.", NOPOS),
    "mask": ("The causal mask alone, untrained and without encodings, makes position readable from a "
             "state's similarities.", NEAR),
    "bidirectional": ("Without mask and encodings no block makes position readable.", NOPOS),
    "fades": ("Position fades in the last layers: the error after the last block is more than twice "
              "the least.", NOPOS),
    "curves": ("Without encodings position is read worse than with ALiBi at first, better soon after, "
               "and as well as with learned ones midway.", NOPOS),
    "perplexity": ("Without encodings a causal model predicts nearly as well, a masked one does not.",
                   NOPOS),
    "alike_input": ("Without encodings, embeddings of near positions are not more alike.", NEAR),
    "alike_first": ("The first block makes states of nearby positions more alike.", NEAR),
    "alike_bare": ("So does that of the untrained model without encodings.", NEAR),
    "alike_free": ("Without the mask it does not.", NEAR),
    "variance": ("A state's similarities tell its position better than its variance does.", NEAR),
    "across": ("How far right an object is can be read from its image tokens.", PICTURES),
    "down": ("How far down an object is can be read from its image tokens.", PICTURES),
    "left": ("Which of two objects is further left is in their states, beyond what their kinds tell.",
             PICTURES),
    "above": ("Which of two objects is higher up is in their states, beyond what their kinds tell.",
              PICTURES),
    "taught": ("Training makes mutual positions more readable than in the untrained model.", OWN),
    "asked": ("The last token of a question on an object's place holds that place.", PICTURES),
    "captions": ("The model cannot tell apart answers that differ in the position word only.", PICTURES),
    "asks": ("The model cannot tell apart questions that differ in the position word only.", PICTURES),
    "unused": ("Position is present in the objects' states, but not used in answers.", PICTURES),
    "depth": ("Which of two objects is nearer is in their states.", PICTURES),
    "remedies": ("Pretraining on positions, or contrastive learning, mends it, without effect on other "
                 "tasks.", PICTURES),
}
TEXT = tuple(key for key, (_, source) in CLAIMS.items() if source != PICTURES and key != "taught")
PICTURE = tuple(key for key in CLAIMS if key not in TEXT)

NUMBERS = {
    "early": ("mean distance 16.93 after 4 layers; the constant guess has 256", "data"),
    "input": ("mean distance 337.16 of 1024 positions; a random guess has 341.33", "data"),
    "fades": ("133.30 after the last of 24 layers, 16.46 at least", "data"),
    "curves": ("after 4 layers: none 16.93, ALiBi 183.51, learned 6.95", "data"),
    "perplexity": ("WikiText-103: none 20.97, learned 20.42; masked: none 147.18, learned 4.06",
                   "code"),
}
