"""The families of the benchmark: what is planted, in which units, and what is held against it."""

from experiments._ground_truth_depth import feature_places, horizon_places
from experiments._ground_truth_heads import conflict_places, image_places, retrieval_places
from experiments._ground_truth_sinks import secondary_places, visual_places
from experiments._ground_truth_table import Family, Method
from interp.heads.retrieval import RETRIEVAL

LEVEL = 0.05
"""Family-wise level of probes."""

JUST = 1e-6
"""A report exceeds a limit; detectors that report at their limit get this much less."""

FAMILIES = (
    Family(
        "secondary", "secondary sinks", "norm written (ordinary norms)",
        (0.5, 1.0, 2.0, 3.0, 4.0, 8.0),
        (Method("secondary.measure", 0.5, detector=True), Method("attention received"),
         Method("state norm")),
        "tokens", "a token joins the primary sink's direction for some blocks",
        "a token as massive, at cosine 0.6 to the primary", secondary_places),
    Family(
        "visual", "visual sinks", "coordinate written (ordinary norms)",
        (0.2, 0.4, 0.8, 1.6, 6.4),
        (Method("visual.measure", 0.5, detector=True), Method("attention received"),
         Method("state norm")),
        "tokens", "image tokens are massive in the first token's coordinates",
        "image tokens as massive in other coordinates", visual_places),
    Family(
        "retrieval", "retrieval heads", "logit of the needle token",
        (1.0, 2.0, 4.0, 8.0, 16.0),
        (Method("retrieval.measure", RETRIEVAL - JUST, detector=True),
         Method("attention on the needle"), Method("unembedding of the answer")),
        "heads", "a head looks at the needle token that is said next",
        "a head looks at the needle token that was said last", retrieval_places),
    Family(
        "image_centric", "image-centric heads", "logit of image content",
        (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        (Method("image_centric.measure", 0.5, detector=True), Method("attention on the image"),
         Method("norm of what it writes")),
        "heads", "a head looks at the image tokens that are no sinks",
        "a head looks at the image's sinks", image_places),
    Family(
        "memory_context", "memory and context heads", "logits written to the answer",
        (0.1, 0.3, 1.0, 3.0, 10.0),
        (Method("memory_context.measure", 1.0, detector=True), Method("attention on the source"),
         Method("unembedding of the answers")),
        "heads", "one head writes what was learned about the subject, one what the text states",
        "a head looks at the statement and writes what nothing reads", conflict_places),
    Family(
        "horizon", "information horizons", "fall of image keys (logits)",
        (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
        (Method("flow.horizon, H_info", 0.5, detector=True),
         Method("flow.horizon, H_out", 0.5, detector=True), Method("attention on the image"),
         Method("random layer", 0.5)),
        "depth", "from one block on no head reads the image",
        "from one block on all heads but one group stop reading the image", horizon_places),
    Family(
        "feature", "linear features", "shift (standard deviations)",
        (0.5, 1.0, 2.0, 3.0, 4.0),
        (Method("probes.sweep", 1 - LEVEL - JUST, detector=True),
         Method("probe, choice not corrected", 1 - LEVEL - JUST), Method("one coordinate"),
         Method("state norm")),
        "layers", "states of one class are shifted along a direction from one layer on",
        "as large a shift that has nothing to do with the classes", feature_places, natural=False),
)
