"""Short problems with worked solutions, written for this project; does a text give the answer?"""

import re

PROBLEMS = (
    ("A gardener plants 7 rows with 12 tulips each and 5 rows with 9 roses each. How many "
     "flowers does she plant?",
     "The tulips are 7 times 12, which is 84. The roses are 5 times 9, which is 45. Together "
     "there are 84 + 45 = 129 flowers. The answer is 129.",
     129),
    ("The sum of three consecutive whole numbers is 72. What is the largest of them?",
     "Call the middle number m. The sum is (m - 1) + m + (m + 1) = 3m, so 3m = 72 and m = 24."
     " The largest is m + 1 = 25. The answer is 25.",
     25),
    ("A rectangle is 3 times as long as it is wide, and its perimeter is 64. What is its "
     "area?",
     "Let the width be w. The perimeter is 2(w + 3w) = 8w = 64, so w = 8 and the length is "
     "24. The area is 8 times 24, which is 192. The answer is 192.",
     192),
    ("How many different three-letter codes can be made of the letters A, B, C, D and E if no"
     " letter may be used twice?",
     "There are 5 choices for the first letter, 4 for the second and 3 for the third. The "
     "product is 5 * 4 * 3 = 60. The answer is 60.",
     60),
    ("A train covers 150 kilometers in 2 hours and then 90 kilometers in 1 hour. What is its "
     "mean speed in kilometers per hour?",
     "The whole way is 150 + 90 = 240 kilometers. The whole time is 2 + 1 = 3 hours. The mean"
     " speed is 240 / 3 = 80. The answer is 80.",
     80),
    ("What is the remainder when 2 to the power of 10 is divided by 7?",
     "Powers of 2 leave the remainders 2, 4, 1 on division by 7, again and again. Since 10 = "
     "3 * 3 + 1, the tenth remainder is the first of the cycle, which is 2. The answer is 2.",
     2),
    ("A shirt costs 40 after a discount of 20 percent. What did it cost before?",
     "After the discount 80 percent of the price is left. So 0.8 p = 40, and p = 40 / 0.8 = "
     "50. The answer is 50.",
     50),
    ("Two numbers add up to 30 and differ by 8. What is their product?",
     "The larger is (30 + 8) / 2 = 19 and the smaller is 30 - 19 = 11. Their product is 19 * "
     "11 = 209. The answer is 209.",
     209),
    ("A box holds 4 red and 6 blue balls. Two are taken out together. In how many ways can "
     "both be blue?",
     "We choose 2 of the 6 blue balls. That is 6 * 5 / 2 = 15 ways. The answer is 15.",
     15),
    ("The first term of an arithmetic sequence is 5 and the tenth is 41. What is the fourth "
     "term?",
     "From the first to the tenth term there are 9 steps, so each is (41 - 5) / 9 = 4. The "
     "fourth term is 5 + 3 * 4 = 17. The answer is 17.",
     17),
    ("How many whole numbers from 1 to 100 are divisible by 3 or by 5?",
     "There are 33 multiples of 3, 20 multiples of 5, and 6 multiples of 15 that were counted"
     " twice. So there are 33 + 20 - 6 = 47. The answer is 47.",
     47),
    ("A right triangle has legs of 9 and 12. What is its perimeter?",
     "The long side is the root of 81 + 144 = 225, which is 15. The perimeter is 9 + 12 + 15 "
     "= 36. The answer is 36.",
     36),
)
"""(question, worked solution, answer)."""


def gives(text: str, answer: int) -> bool:
    """Whether the last number of a text, or the last one in a box, is the answer.

    Example:
        >>> gives("First 12, so it is 1,290.", 1290), gives(r"\\boxed{25} of 30", 25), gives("none", 3)
        (True, True, False)
    """
    boxed = re.findall(r"\\boxed\{\s*(-?[\d,]+(?:\.\d+)?)\s*\}", text)
    found = boxed or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return False
    try:
        return float(found[-1].replace(",", "")) == float(answer)
    except ValueError:
        return False
