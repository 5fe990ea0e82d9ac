"""The source `builtin`: conversations of our own writing, so that training and tests need no data at hand.

Contract: `builtin_steps(count, seed)` is a function of its arguments alone; arguments follow from the user's words,
figures from the results, and arithmetic is right. Most conversations give planning, tool_call and answer steps under
the same tools, so that neither the presence of tools nor the length of the prompt gives the step type away.
Boundary: `intents` says what people ask for, `problems` writes word problems, `scripts` the courses of a
conversation, `talk` turns them into steps. No torch.
"""

from __future__ import annotations

from random import Random

from layerroute.data.builtin.scripts import SCRIPTS
from layerroute.data.builtin.talk import Talk
from layerroute.data.steps import Step

__all__ = ["builtin_steps"]


def builtin_steps(count: int, seed: int) -> list[Step]:
    """`count` steps, conversation after conversation; the last one may be left unfinished."""
    rng = Random(f"layerroute-builtin-{seed}")
    steps: list[Step] = []
    number = 0
    while len(steps) < count:
        talk = Talk(f"builtin-{seed}-{number}", rng)
        rng.choices(list(SCRIPTS), list(SCRIPTS.values()))[0](talk)
        steps += talk.steps
        number += 1
    return steps[:count]
