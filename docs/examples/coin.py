"""A strategy in one file: at every step a coin decides between the best token and the second best.

encdec generate --plugin coin.py --strategy coin,bias=0.9 < in.txt
"""

from collections.abc import Sequence
from dataclasses import dataclass

from encdec_cli.decoding.draw import streams, uniform
from encdec_cli.decoding.frontier import Walk
from encdec_cli.decoding.hypothesis import Hypothesis, Limits, Strategy
from encdec_cli.decoding.rules import Rule
from encdec_cli.decoding.stepper import Stepper
from encdec_cli.registry import strategies


@strategies.register("coin")
@dataclass(kw_only=True)
class Coin(Strategy):
    """Take the best token with probability `bias`, else the second best; one output a sentence."""

    bias: float = 0.5

    def __call__(self, stepper: Stepper, limits: Limits, rules: Sequence[Rule]) -> list[list[Hypothesis]]:
        """Return one output for each sentence."""
        walk = Walk(stepper, limits, rules)
        coins = streams(1, stepper.keys, self.beam, stepper.device)
        while not walk.done:
            log_probs, tokens = walk.step().top(2)
            second = uniform(coins[walk.origin], walk.written) >= self.bias
            second &= log_probs[:, 1].isfinite()  # rules may leave a single token
            walk.move(tokens.gather(1, second.long()[:, None])[:, 0])
        return walk.best()
