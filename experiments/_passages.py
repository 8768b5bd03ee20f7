"""Passages of plain English in two halves that belong together, written for this project."""

from typing import Any

import numpy as np

from experiments import _texts
from interp.core import Prompt
from interp.organisms import backcopy

UNKNOWN = 0.2
"""With a larger share of unknown tokens, English says nothing to a model."""
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id",
                "vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id")

PASSAGES = (
    ("A lighthouse is a tower with a strong lamp that warns ships of rocks and shallow water. The "
     "first ones burned wood or coal on an open platform, and their keepers carried fuel up the "
     "stairs all night. In fog the light was useless, so bells and later horns were added.",
     "Today most of these towers work without a keeper. A small computer switches the lamp on at "
     "dusk, checks it, and reports a failure by radio. Sailors have satellite receivers, but many "
     "still look for the flash, because it tells them at once that their charts are right."),
    ("Bread rises because yeast eats sugar and gives off gas. When flour is mixed with water, its "
     "proteins join into long elastic threads, and kneading stretches them into sheets. The gas is "
     "caught between the sheets, so the dough swells slowly in a warm kitchen.",
     "In the oven the bubbles grow once more before the heat kills the yeast. Starch sets, the crust "
     "dries and turns brown, and the smell fills the house. A loaf that is cut too early seems wet "
     "inside, although it was baked long enough."),
    ("The city's first tram line opened in 1872 with wagons drawn by horses. Each animal worked four "
     "hours a day, and the company kept nearly three hundred of them in stables near the river. The "
     "tracks were uneven, but the ride was smoother than on the stone streets.",
     "Electric cars replaced the horses twenty years later. They were faster, cheaper and much "
     "cleaner, yet some passengers feared the wires above their heads. By 1910 the network reached "
     "every suburb, and on Sundays whole families rode to the forest at its end."),
    ("Honeybees tell each other where to find flowers. A worker that comes home with nectar runs in "
     "a figure of eight on the comb, and the angle of her run shows the direction from the sun. The "
     "longer the middle part of the dance lasts, the farther away the food is.",
     "Other bees follow the dancer closely in the dark, touching her with their antennae. After a "
     "few rounds they leave the hive and fly almost straight to the place. If a hill is in the way, "
     "they go around it, although the dance gave them the direct line."),
    ("Maria had rented the room above the bakery for its low price, not for its view. At four in "
     "the morning the ovens were lit, and warm air came up through the floor. In winter she was "
     "grateful; in August she slept on the roof, beside the chimney and the neighbor's cat.",
     "The baker, a quiet man, left a bag of rolls on her stairs every Saturday. She paid him with "
     "small drawings, which he pinned to the wall behind the counter. Customers asked about them, "
     "and by spring she had sold eleven, enough for a month without worry."),
    ("Rivers carry sand and mud to the sea, and drop them where the water slows down. Over centuries "
     "the deposits build a delta, flat land crossed by many channels. The soil is rich, so people "
     "settle there, although floods return every few years.",
     "Dams upstream hold the mud back, and the land, which always sinks a little, is no longer "
     "built up. Salt water moves in, wells turn bitter, and rice fails in the lowest fields. "
     "Engineers now let some floods pass on purpose, to feed the delta again."),
    ("Chess computers once examined millions of positions in a second and understood none of them. "
     "They counted pieces, added points for a safe king, and trusted that depth would make up for "
     "the crude judgment. Against strong players it did, from 1997 on.",
     "Newer programs learn by playing against themselves. They look at far fewer positions, but "
     "they have a sense of which ones matter, and they give up a pawn for a better square as a "
     "master would. Some of their ideas, such as early moves of the outer pawns, are now in fashion."),
    ("The expedition left the harbor on the second of May with three ships and ninety men. For two "
     "weeks the wind was fair. Then ice appeared in the north, first as a white line, later as "
     "floes that struck the hulls at night and kept everyone awake.",
     "In July the smallest ship was crushed, but its crew walked across the ice and was saved. The "
     "captain decided to spend the winter in a bay, where they built a hut of planks and sails. "
     "When the sun came back in February, all but four of them were alive."),
    ("A telescope collects light with a large mirror and sends it to a camera. The larger the mirror, "
     "the fainter the stars that it can see. Glass bends under its own weight, however, so the "
     "biggest mirrors are made of many small ones that are held in place by motors.",
     "Air is the other problem. It is never still, and stars seem to dance. Observatories stand on "
     "dry mountains for this reason, and a small mirror that changes its shape a thousand times a "
     "second takes most of the trembling out of the picture."),
    ("When the council met in June, there was one question left: what should be done with the old "
     "market hall? The roof leaked, the cellar was damp, and repairs would cost more than a new "
     "building. Nevertheless, two hundred people had signed a letter to keep it.",
     "After a long debate the members voted to save the front and the clock, and to build a library "
     "behind them. Nobody was quite happy, but nobody left the room in anger either. The work began "
     "in autumn, and the stalls moved to the square until it was done."),
    ("Salt was once so valuable that roads were named after it. It keeps meat and fish from spoiling, "
     "and before there was ice in houses nothing else did this so well. Towns that owned a spring "
     "or a mine grew rich, and kings put a tax on every sack.",
     "The mines went deep under the mountains. Miners cut the rock by hand, or let water dissolve it "
     "and boiled the brine in wide iron pans. So much wood was burned under the pans that the "
     "forests around the towns disappeared, and timber had to come down the river."),
    ("My grandfather repaired watches in a shop no wider than a door. He kept the smallest screws in "
     "a matchbox, sorted by size, and picked them up with a feather dipped in oil. If a customer "
     "was in a hurry, he worked more slowly, because haste, he said, bends springs.",
     "When cheap digital watches came, he lost half of his work in a year. He did not complain. He "
     "put clocks from churches and stations into the window, some of them taller than himself, and "
     "people came from far away to have theirs brought back to life."),
    ("Coral reefs are built by animals hardly larger than a grain of rice. Each of them sits in a cup "
     "of lime, and inside its body live algae that turn light into sugar. The colors of a reef are "
     "mostly the colors of these guests.",
     "If the sea becomes too warm, the algae are expelled and the coral turns white. It can survive "
     "for some weeks in this state, and recovers when the water cools. After longer heat it dies, "
     "and with it the fish, crabs and snails that found shelter between the branches."),
    ("The train was late, as always, and the waiting room had no heating. A woman with a violin case "
     "shared her tea with two students. They talked about the strike, the snow, and a film that "
     "none of them had seen, until the loudspeaker said something that nobody understood.",
     "At midnight a single wagon arrived, pulled by an engine of another company. The guard let "
     "everyone in without looking at the tickets. Somewhere after the tunnel the woman took out her "
     "violin, and for an hour nobody in the wagon thought about the cold."),
    ("Vaccines show the immune system a harmless part of a germ, so that it is prepared for the real "
     "one. White blood cells that fit this part multiply, and some of them remain for years. When "
     "the germ arrives, they answer within hours instead of days.",
     "Protection is never perfect, but if enough people have it, the germ finds no way from one "
     "person to the next. In this manner smallpox was driven from the whole world. The last "
     "natural case was a cook in Somalia, who recovered in the autumn of 1977."),
    ("Paper money began as a receipt. Merchants in China left heavy coins with someone they trusted "
     "and carried a printed note instead, which could be passed on. Around the year 1020 the state "
     "took over, and soon it printed more notes than it had coins.",
     "Prices rose, people lost their trust, and the notes became worthless within a few decades. The "
     "same story was repeated in other countries whenever a war had to be paid. Modern banks are "
     "kept apart from governments for this reason, at least on paper."),
    ("To paint a wall well, wash it first and let it dry. Fill the holes with plaster, sand them "
     "smooth, and remove the dust. Cover the floor with old sheets, because no one, however "
     "careful, has ever painted a ceiling without dropping some of it.",
     "Begin with the edges and the corners, using a small brush, then roll the large areas from top "
     "to bottom. Do not stop in the middle of a wall: the border between wet and dry paint stays "
     "visible. A second coat, on the next day, hides most of what went wrong."),
    ("Earthquakes happen where plates of rock slide past each other and get stuck. Stress builds up "
     "for a century or two, until the rock breaks and the ground jumps by several meters. The waves "
     "run around the whole planet and can be felt by instruments everywhere.",
     "Nobody can say when the next one will come, only how often they came before. Houses can be "
     "made safe, however. Steel bends where brick breaks, and some tall buildings stand on rubber "
     "feet, which let the ground move while the rooms above it hardly do."),
    ("The orchestra had played the symphony a hundred times, so the new conductor asked them to "
     "forget it. She took away the loud ending, moved the horns to the left, and began the slow "
     "movement at twice the usual speed. Several of the older players protested.",
     "On the evening of the concert the hall was half empty. After the first minutes people leaned "
     "forward, and at the end there was a long silence before the applause. The oldest cellist, who "
     "had protested most, was seen to wipe his glasses."),
    ("Trees in a forest are joined by threads of fungus that run from root to root. The fungus takes "
     "sugar from the trees and gives them water and minerals in return. Young trees in deep shade, "
     "which could not live by themselves, are fed through this network.",
     "How much the trees help each other is still disputed. Some experiments found that a dying "
     "tree sends its sugar to its neighbors; others found nothing of the kind. It is certain, "
     "though, that a seedling planted far from any forest grows more slowly."),
)


def pairs(
    model: Any, count: int, longest: int = 128
) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Whole passages as the tokenizer joins two texts ([CLS] a [SEP] b [SEP] in encoders), and both
    halves by themselves; cut to `longest` tokens, the closing token kept."""
    made: tuple[list[Prompt], list[Prompt], list[Prompt]] = ([], [], [])
    limit = min(longest, model.max_positions or longest)
    for first, second in PASSAGES[:count]:
        texts = (model.tokenizer(first, second), model.tokenizer(first), model.tokenizer(second)) \
            if model.kind == "encoder" else (
                model.tokenizer(f"{first}\n\n{second}"), model.tokenizer(first),
                model.tokenizer(second))
        for kept, found in zip(made, texts):
            kept.append(_cut(found, limit))
    return made


def readable(model: Any) -> bool:
    """Whether the model's tokenizer, if it has one, knows English."""
    if model.tokenizer is None:
        return False
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    ids = model.tokenizer(PASSAGES[0][0])["input_ids"]
    return unknown is None or float(np.mean(np.array(ids) == unknown)) < UNKNOWN


def other_texts(
    model: Any, count: int, length: int, rng: np.random.Generator
) -> tuple[list[Prompt], str]:
    """Texts for a model that reads no English, and what they are: the language of the toy task, or
    random tokens after the start token, with an end token here and there where there is one."""
    if _texts.knows(model, backcopy):
        return _texts.natural(model, count, length, rng), "sequences of the toy task"
    config, tokenizer = model.config.get_text_config(), model.tokenizer
    named = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ends = [int(e) for e in np.atleast_1d(named["eos"]) if e is not None]
    special = {named["bos"], named["pad"], *ends, *(getattr(tokenizer, "all_special_ids", None) or ()),
               *(getattr(model.hf.config, name, None) for name in PLACEHOLDERS)}
    tokens = rng.choice([t for t in range(model.d_vocab) if t not in special], (count, length))
    if named["bos"] is not None:
        tokens[:, 0] = named["bos"]
    for row in tokens if ends else ():
        row[rng.choice(np.arange(2, length), max(1, length // 16), replace=False)] = ends[0]
    return [Prompt.from_tokens(row) for row in tokens], "random tokens"


def _cut(found: Any, limit: int) -> Prompt:
    ids = list(found["input_ids"])
    kinds = found.get("token_type_ids")
    rest = {"token_type_ids": np.array([kinds])} if kinds is not None else {}
    if len(ids) > limit:
        ids = [*ids[: limit - 1], ids[-1]]
        rest = {name: np.concatenate([v[:, : limit - 1], v[:, -1:]], 1) for name, v in rest.items()}
    return Prompt(tuple(int(i) for i in ids), inputs=rest)
