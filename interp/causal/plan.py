"""What a sweep will run, before it runs: cells, passes, token-layers, memory, and which shortcuts."""

from dataclasses import dataclass, field
from typing import Optional


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep; print it.

    Example:
        >>> print(Plan("every head", 64, 1, 64, 1, 9, 310.0, 1024.0, 295.0, 64, 12.0, 4000.0,
        ...            used=("resume: blocks before the edit are not executed",)))
        every head: 64 cells x 1 prompt = 64 values
          passes        1 from the first block on, 9 begun in the middle
          token-layers  310: 3.3 times fewer than whole passes (1,024); of these no shortcut can save 295
          batch         64 cells at most
          memory        12 MiB expected, 4,000 MiB free
          used          resume: blocks before the edit are not executed

    Attributes:
        cells, prompts, values: the grid (values: cells that exist, over all prompts).
        forwards: whole passes. resumed: passes that begin in the middle: at the first block that an
            edit changes.
        token_layers: tokens through blocks, parts of a block by their share of its parameters;
            naive: with a whole pass per value; floor: what differs from the plain runs and can
            reach the metric, and nothing else.
        batch: the most cells that share a pass. memory, available: MiB.
        used, unused: shortcuts; the latter with the reason.
    """

    name: str
    cells: int
    prompts: int
    values: int
    forwards: int
    resumed: int
    token_layers: float
    naive: float
    floor: float
    batch: int
    memory: float
    available: float
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=())
    finished: Optional[int] = None

    def __str__(self) -> str:
        several = "" if self.prompts == 1 else "s"
        done = f", {self.finished:,} of them finished before" if self.finished else ""
        lines = [f"{self.name}: {self.cells:,} cells x {self.prompts:,} prompt{several} = "
                 f"{self.values:,} values{done}"]
        fewer = self.naive / max(1.0, self.token_layers)
        over = "" if self.floor <= 0 else f"; of these no shortcut can save {self.floor:,.0f}"
        said = [
            ("passes", f"{self.forwards:,} from the first block on, {self.resumed:,} begun in the "
                       "middle"),
            ("token-layers", f"{self.token_layers:,.0f}: {fewer:.1f} times fewer than whole passes "
                             f"({self.naive:,.0f}){over}"),
            ("batch", f"{self.batch:,} cells at most"),
            ("memory", f"{self.memory:,.0f} MiB expected, {self.available:,.0f} MiB free"),
            *(("used", one) for one in self.used), *(("not used", one) for one in self.unused),
        ]
        return "\n".join([*lines, *(f"  {name:<12}  {text}" for name, text in said)])

    def __repr__(self) -> str:
        return str(self)
