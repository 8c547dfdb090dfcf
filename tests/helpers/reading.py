"""Read prompts and write tokens with the bare engine, a sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metaalign_edge import BatchEntry, Engine, Sampler, SequenceState, common_prefix


def read(engine: Engine, sequence: SequenceState, prompt: Sequence[int]) -> int:
    """Bring a sequence to a prompt and compute the logits after it; return how many tokens were there already."""
    cached = engine.truncate(sequence, common_prefix(sequence.tokens, prompt[:-1]))
    for start in range(cached, len(prompt), engine.batch_size):
        chunk = prompt[start : start + engine.batch_size]
        engine.decode([BatchEntry(sequence, chunk, logits=start + len(chunk) == len(prompt))])
    return cached


def write(engine: Engine, sequence: SequenceState, prompt: Sequence[int], sampler: Sampler) -> Iterator[int]:
    """Yield the tokens that follow a prompt."""
    read(engine, sequence, prompt)
    while True:
        token = sampler.draw(engine, -1)
        yield token
        engine.decode([BatchEntry(sequence, [token])])
