"""Direct preference optimisation of the compact model, on candidates that it wrote itself.

The four steps of the method, closed into a loop: the tuned model answers rows several times over (`candidates`),
the checkers rank what it wrote under the row's meta-prompt (`rank`), and better answers are made likelier than worse
(`optimise`; Rafailov et al. 2023, with the winner's likelihood added, Pang et al. 2024, so that it does not fall).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from metaalign_edge_preferences.suite import survives
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

from .dataset import Row, row
from .model import Llama
from .parts import differentiate, one_core_each
from .progress import Progress
from .recipe import DpoRecipe
from .sft import pad
from .vocabulary import encode_prompt, encode_response

__all__ = ["Pair", "candidates", "fresh_rows", "optimise", "pairs", "rank"]


@dataclass(frozen=True)
class Pair:
    """A row's prompt, and two answers to it of which the first obeys better."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


# --- candidates -------------------------------------------------------------------------------------------------------


def candidates(
    model: Path, rows: Sequence[Row], recipe: DpoRecipe, threads: int, parallel: int = 32
) -> list[list[str]]:
    """Let a converted model answer each row `samples` times, all in one batch."""
    import metaalign_edge as edge

    settings = edge.Settings(
        temperature=recipe.temperature, top_k=0, top_p=1.0, min_p=0.0, max_tokens=200, threads=threads
    )
    file, interrupt = ModelFile(model), Interrupt()
    template = edge.choose_template("auto", file)

    def jobs() -> Iterator[edge.Request]:
        for number, one in enumerate(rows):
            turns = [edge.Turn(turn.query, turn.response) for turn in one.turns[:-1]]
            dialog = edge.Dialog(one.system_info, one.user_info, (*turns, edge.Turn(one.turns[-1].query)))
            for sample in range(recipe.samples):
                yield edge.Request(dialog, seed=number * recipe.samples + sample, tag=number)

    found: list[list[str]] = [[] for _ in rows]
    with (
        edge.Model(file, settings) as loaded,
        edge.Scheduler(loaded, template, settings, edge.AS_USUAL, interrupt, parallel, context=768) as engine,
    ):
        for done, (job, answer) in enumerate(engine.run(jobs()), 1):
            if isinstance(answer, edge.Answer):
                found[job.tag].append(answer.response)
            if done % 2000 == 0:
                print(f"DPO {done:,} of {len(rows) * recipe.samples:,} candidates", flush=True)
    return [sorted(texts) for texts in found]  # the order of completion is no matter


# --- ranking ----------------------------------------------------------------------------------------------------------


def rank(one: Row, texts: Sequence[str]) -> tuple[str, str] | None:
    """Return the best and the worst answer; None if all are equally good. Where none is good, the row's own is best.

    An answer's merit is the share of its checks that hold, and whether it says what the row's own response says.
    """

    def merit(text: str) -> float:
        held = [check.holds(text) for check in one.scene.checks]
        obeyed = sum(held) / len(held) if held else 0.0
        return obeyed + bool(survives(right, text))

    right = one.turns[-1].response
    merits = {text: merit(text) for text in dict.fromkeys((right, *texts))}
    worst = min(texts, key=lambda text: merits[text], default=right)
    best = max(texts, key=lambda text: merits[text], default=right)
    best = best if merits[best] >= merits[right] else right
    return (best, worst) if merits[best] > merits[worst] else None


def pairs(rows: Sequence[Row], texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[Pair]:
    """Return the pairs that the rankings give, as ids."""
    found = []
    for one, written in zip(rows, texts, strict=True):
        order = rank(one, written)
        if order:
            chosen, rejected = (tuple(encode_response(tokenizer, text)) for text in order)
            found.append(Pair(tuple(encode_prompt(tokenizer, one)), chosen, rejected))
    return found


# --- optimisation -----------------------------------------------------------------------------------------------------


def optimise(model: Llama, found: Sequence[Pair], recipe: DpoRecipe, losses: list[float], threads: int = 1) -> None:
    """Train the model on pairs, in place: one pass over them in an order that the seed decides."""
    order = list(found)
    Random(recipe.seed).shuffle(order)
    batches = [order[at : at + recipe.batch] for at in range(0, len(order), recipe.batch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)
    with one_core_each(threads) as pool, Progress("DPO", len(batches), 0, 20, losses) as progress:
        before = list(pool.map(partial(_begin, model), batches))
        for step, (batch, start) in enumerate(zip(batches, before, strict=True)):
            optimizer.param_groups[0]["lr"] = recipe.rate * min(1.0, (step + 1) / 10) * (1 - step / len(batches))
            parts = [slice(part, None, recipe.parts) for part in range(min(recipe.parts, len(batch)))]
            tokens = sum(len(pair.chosen) for pair in batch)
            share = partial(_loss, model, recipe, len(batch), tokens)
            loss = differentiate(pool, model, [partial(share, batch[part], start[:, part]) for part in parts])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.step(loss, sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in batch))


@torch.no_grad()
def _begin(model: Llama, batch: Sequence[Pair]) -> Tensor:
    """Return the likelihoods that the model starts from."""
    return _likelihoods(model, batch)


def _loss(model: Llama, recipe: DpoRecipe, count: int, tokens: int, batch: Sequence[Pair], start: Tensor) -> Tensor:
    """Return what some pairs of a batch of `count`, with `tokens` chosen tokens, add to its loss."""
    now = _likelihoods(model, batch)
    return preference_loss(now, start, recipe.beta) * len(batch) / count - recipe.likelihood * now[0].sum() / tokens


def preference_loss(now: Tensor, start: Tensor, beta: float) -> Tensor:
    """Return the mean of -log sigmoid(beta * margin); both (2, pairs): log-likelihoods of chosen and rejected."""
    margin = (now[0] - start[0]) - (now[1] - start[1])
    return -F.logsigmoid(beta * margin).mean()


def _likelihoods(model: Llama, batch: Sequence[Pair]) -> Tensor:
    """Return the log-likelihoods of chosen and rejected responses, (2, pairs)."""
    texts = [pair.chosen for pair in batch] + [pair.rejected for pair in batch]
    prompts = [pair.prompt for pair in batch] * 2
    learnt = [[False] * len(p) + [True] * len(t) for p, t in zip(prompts, texts, strict=True)]
    ids, wanted = pad([([*p, *t], mask) for p, t, mask in zip(prompts, texts, learnt, strict=True)])
    wanted = wanted[:, 1:]
    scores = F.log_softmax(model.logits(model.hidden(ids[:, :-1], wanted=wanted)), -1)
    said = scores.gather(1, ids[:, 1:][wanted].unsqueeze(1)).squeeze(1)
    owners = wanted.nonzero()[:, 0]
    return torch.zeros(len(texts)).index_add(0, owners, said).view(2, -1)


def fresh_rows(recipe: DpoRecipe) -> list[Row]:
    """Return the rows that the model is to answer: hard ones, which training has not shown."""
    return [row(recipe.seed, recipe.start + number, hard=True) for number in range(recipe.rows)]
