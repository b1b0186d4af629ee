"""The laws that every model and every strategy must obey, for our own tests and for the authors of plugins.

One line checks a model, `encdec_cli.testing.check(Gru)`, and one a strategy,
`encdec_cli.testing.check_strategy(Coin())`.
"""

from encdec_cli.testing.models import LawError, check
from encdec_cli.testing.strategies import check_strategy

__all__ = ["LawError", "check", "check_strategy"]
