"""Prompts with known contents: plain builders that need neither a model nor a tokenizer.

`text`: natural, random and repeated-token inputs. `repeated`: random tokens twice, for induction.
`image`: flat pictures and rendered text with known boxes. `scenes`: shapes and handwritten numbers
with questions.
"""
