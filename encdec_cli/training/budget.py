"""`train.tokens: auto`: the largest micro-batches that fit the memory, found without running out of it."""

from __future__ import annotations

import gc
from contextlib import closing
from dataclasses import replace

import torch

from encdec_cli.bundle import checkpoint
from encdec_cli.errors import ResourceError
from encdec_cli.training.largest import need
from encdec_cli.training.memory import available
from encdec_cli.training.trainer import Setting, Trainer

MOST = 1 << 16
"""Tokens beyond which nothing gets faster, and learning only slower."""
_FIRST = 2048
_WHAT = "the forecast of memory"
_SHARE = 0.75
"""Of the free memory: what a process adds to what it has was seen to be up to 1.27 times what was predicted."""


def settle(setting: Setting) -> Setting:
    """Return the setting with a number in place of `train.tokens: auto`; others as they are.

    A run that goes on keeps the number that it began with, whatever is free now. Raises ResourceError if not even the
    longest example fits.
    """
    if setting.recipe.train.tokens != "auto":
        return setting
    before = setting.ranks.first_does("the start", lambda: checkpoint.newest_facts(setting.run / "checkpoints"))
    if before is not None:
        return _with(setting, before["recipe"]["train"]["tokens"])
    longest = setting.data.longest("train")
    if setting.recipe.risk.metric:
        setting.say("train.tokens: auto: to try sizes takes minutes with risk.metric; a number spares that")
    silent = replace(setting, say=_nothing, say_own=_nothing)  # what it would say the run says again
    trainer = Trainer(_with(silent, max(_FIRST, longest)))
    with closing(trainer):
        tokens = _largest(trainer, longest)
    del trainer
    gc.collect()  # it holds itself in circles, and its model counts twice
    setting.say(f"train.tokens: auto is {tokens} here")
    return _with(setting, tokens)


def _nothing(_sentence: str) -> None:
    return None


def _with(setting: Setting, tokens: int) -> Setting:
    return replace(setting, recipe=replace(setting.recipe, train=replace(setting.recipe.train, tokens=tokens)))


def _largest(trainer: Trainer, longest: int) -> int:
    """Return the largest step of a fixed ladder that fits all: small changes of what is free then change nothing."""
    device, ranks = torch.device(trainer.setting.device), trainer.ranks
    limit = int(ranks.least(_WHAT, _SHARE * available(device)))
    ladder = [longest, *(step for step in _ladder() if longest < step <= MOST)]
    first = max(_FIRST, longest)
    usual = need(trainer, first)
    if ranks.least(_WHAT, limit - usual.saving - usual.validation) < 0:
        raise ResourceError(
            f"train.tokens: auto: a validation does not fit into the {limit >> 20} MiB that may be used; lower "
            "decoding.beam, or use a smaller model."
        )
    guess = ranks.least(_WHAT, first * (limit - usual.gradients) / max(1, usual.activations + usual.waste))
    for tokens in reversed([step for step in ladder if step <= guess] or ladder[:1]):
        if ranks.least(_WHAT, limit - need(trainer, tokens).growth) >= 0:
            return tokens
    raise ResourceError(
        f"train.tokens: auto: a micro-batch of the longest example, {longest} tokens, does not fit into the "
        f"{limit >> 20} MiB that may be used; use a smaller model, or lower text.max_source and text.max_target."
    )


def _ladder() -> list[int]:
    """Return four steps for each power of two: 64, 80, 96, 112, 128 …"""
    return [quarter << power for power in range(4, 15) for quarter in (4, 5, 6, 7)]
