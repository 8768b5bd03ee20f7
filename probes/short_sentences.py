"""Short English sentences of many kinds, made from lists: captions, headlines, questions, remarks.

They stand in for the sentences of similarity benchmarks, which cannot be shipped. What is found with
them depends on them.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

WHO = ("a man", "a woman", "two boys", "a little girl", "an old fisherman", "three children",
       "a cyclist", "a group of nurses", "the baker", "a brown dog", "a black cat", "two horses",
       "a small bird", "a street musician", "a young couple", "four soldiers", "a tennis player",
       "the waiter")
DOES = {
    "is playing": ("the guitar", "a wooden flute", "chess", "with a red ball", "the piano", "cards"),
    "is riding": ("a bicycle", "a white horse", "a small wave", "an old motorcycle", "the bus"),
    "is cutting": ("an onion", "a sheet of paper", "fresh bread", "the grass", "a thick rope"),
    "is looking at": ("the mountains", "a map", "the camera", "a shop window", "an old photograph"),
    "is carrying": ("a heavy box", "an umbrella", "a sleeping child", "two buckets of water"),
    "is eating": ("a slice of pizza", "an apple", "soup", "a piece of chocolate cake"),
    "is running": ("after a bus", "through deep snow", "along the river", "up the stairs"),
    "is waiting": ("for the train", "for a phone call", "at a red light", "in a long line"),
}
WHERE = ("on the beach", "in the kitchen", "in front of a crowd", "near the lake", "at night",
         "in the rain", "on a busy street", "behind the house", "in a quiet park", "under a bridge")
BODY = ("the central bank", "the prime minister", "the airline", "a federal court",
        "the health ministry", "the football club", "the power company", "the united nations",
        "the car maker", "the opposition party", "the space agency", "the police")
NEWS = ("raises its forecast", "cuts four hundred jobs", "rejects the peace plan", "delays the launch",
        "wins a second term", "reports record profits", "calls for an inquiry", "bans plastic bags",
        "closes two borders", "signs a trade deal", "arrests nine people", "sells its last factory")
WHEN = ("after the earthquake", "before the election", "as prices keep rising", "despite protests",
        "for the third year", "in a surprise move", "following a cyber attack", "over water rights")
TASK = ("fix a leaking pipe", "learn a new language", "remove rust from a pan", "write a short story",
        "train a nervous puppy", "save money for a house", "grow tomatoes indoors", "sleep better",
        "install a second monitor", "choose a good lawyer", "apply for a student visa",
        "keep bread fresh", "measure the length of a year", "prove that a number is prime")
LIMIT = ("without special tools", "in less than a week", "on a small budget", "if i live abroad",
         "when nobody can help", "in winter", "as a beginner", "without losing my patience")
ASK = ("how do i {}", "what is the best way to {}", "is it possible to {}", "should i try to {}")
THING = ("a virus", "the moon", "inflation", "a good teacher", "the immune system", "an old forest",
         "a database index", "jazz music", "the constitution", "a glacier", "photosynthesis",
         "the stock market", "a compass needle", "our memory", "volcanic soil", "a strong password")
IS = ("changes faster than most people think", "cannot be understood from a single example",
      "depends on what happened long before", "is more useful than it first appears",
      "needs very little energy to work", "was described two hundred years ago",
      "protects us from things we never see", "follows a simple rule")
LEAD = ("", "in my experience , ", "according to the report , ", "some say that ", "of course , ")


def short_sentences(n: SupportsIndex = 1000, seed: SupportsIndex = 0) -> list[str]:
    """Different sentences, a quarter of each kind, in random order.

    Example:
        >>> made = short_sentences(8)
        >>> len(set(made)), len(short_sentences())
        (8, 1000)
        >>> 3 < sum(len(s.split()) for s in made) / len(made) < 15
        True
    """
    rng = np.random.default_rng([int(seed), 7])

    def pick(of: Sequence[str]) -> str:
        return of[int(rng.integers(len(of)))]

    kinds = (
        lambda: f"{pick(WHO)} {(does := pick(list(DOES)))} {pick(DOES[does])} {pick(WHERE)} .",
        lambda: f"{pick(BODY)} {pick(NEWS)} {pick(WHEN)}",
        lambda: f"{pick(ASK).format(pick(TASK))} {pick(LIMIT)} ?",
        lambda: f"{pick(LEAD)}{pick(THING)} {pick(IS)} .",
    )
    made: dict[str, None] = {}
    while len(made) < int(n):
        text = kinds[len(made) % len(kinds)]()
        # "two boys is" would be read as another sentence.
        if text.startswith(("two ", "three ", "four ")):
            text = text.replace(" is ", " are ", 1)
        made.setdefault(text)
    return [list(made)[i] for i in rng.permutation(len(made))]
