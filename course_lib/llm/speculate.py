"""Many prompts at once, and two tokens a step.

`generate_batch` continues prompts of different lengths in one batch. `speculate` decodes greedily with the layer that
predicts a further token (multi-token prediction): it drafts a token, and the model's next step reads the last token and
the draft together. Where the model itself would have chosen the draft, the step has made two tokens for one reading of
the weights; where not, the draft is dropped. So the tokens are those of plain greedy decoding, whatever the draft.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.generate import check, choose
from course_lib.llm.model import Transformer


class Speculation(NamedTuple):
    """What `speculate` made: the rows' tokens, the model's steps after the prefill, and the share of drafts taken."""

    rows: list[Tensor]
    steps: int
    accepted: float


@torch.no_grad()
def generate_batch(
    model: Transformer, prompts: list[Tensor], new: int, temperature: float = 0.0, top_k: int | None = None,
    seed: int = 0, cache: Cache | PagedCache | None = None,
) -> list[Tensor]:  # fmt: skip
    """Each of the `prompts`, int64 (P,) of any length, with `new` tokens after it; as `generate`, in one batch."""
    cache, logits, _ = prefill(model, prompts, new, cache, temperature, top_k)  # logits (B, V)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = []  # (B, 1) each
    while len(made) < new:
        if made:
            logits = model(made[-1], cache=cache)[:, -1]  # (B, V)
        made.append(choose(logits, temperature, top_k, generator))
    return [torch.cat((prompt, *(tokens[row] for tokens in made))) for row, prompt in enumerate(prompts)]


@torch.no_grad()
def speculate(
    model: Transformer, prompts: list[Tensor], new: int, cache: Cache | PagedCache | None = None
) -> Speculation:
    """Each of the `prompts`, int64 (P,) of any length, with `new` tokens after it: the likeliest each time."""
    cache, logits, hidden = prefill(model, prompts, new, cache)  # (B, V), (B, P, D)
    lengths, device = cache.lengths, hidden.device
    last = logits.argmax(-1)  # (B,), chosen but not yet read by the model
    shifted = [torch.cat((p[1:], last[row : row + 1])) for row, p in enumerate(prompts)]  # (P,) each
    following = pad_sequence(shifted, batch_first=True)  # (B, P)
    draft = guess(model, hidden, following, cache, [0] * len(prompts), lengths)  # (B,)
    made, steps, drafted, taken = [[token] for token in last.tolist()], 0, 0, 0
    while min(len(row) for row in made) < new:
        before = [min(n, model.config.context - 2) for n in cache.lengths]  # rows that are done make room for the pair
        cache.cut(before)
        hidden = model.body(torch.stack((last, draft), dim=1), cache)  # (B, 2, D)
        true = model.unembedding(model.norm(hidden)).argmax(-1)  # (B, 2), after the last token, and after the draft
        agreed, chosen = (true[:, 0] == draft).tolist(), true.tolist()
        grown = []
        for row, (right, pair) in enumerate(zip(agreed, chosen)):
            wanted = new - len(made[row])  # a row that is done stands still
            grown.append(min(wanted, 1 + right))
            made[row] += pair[: grown[-1]]
            drafted, taken = drafted + (wanted > 0), taken + (wanted > 0 and right)
        steps += 1
        stood = torch.tensor([max(n, 1) - 1 for n in grown]).to(device)  # (B,), the last of the pair that counts
        moved = torch.tensor([n > 0 for n in grown]).to(device)  # (B,)
        last = last.where(~moved, true.gather(1, stood[:, None])[:, 0])  # (B,)
        draft = guess(model, hidden, true, cache, before, [n + more for n, more in zip(before, grown)])  # (B,)
    rows = [torch.cat((p, torch.tensor(tokens).to(device))) for p, tokens in zip(prompts, made)]
    return Speculation(rows, steps, taken / max(drafted, 1))


def prefill(
    model: Transformer, prompts: list[Tensor], new: int, cache: Cache | PagedCache | None,
    temperature: float = 0.0, top_k: int | None = None,
) -> tuple[Cache | PagedCache, Tensor, Tensor]:  # fmt: skip
    """Read all prompts at once, padded: the cache without padding, logits (B, V) of the next, hidden (B, P, D)."""
    for prompt in prompts:
        check(model, prompt[None], new, temperature, top_k)
    weight, lengths = model.embedding.weight, [len(prompt) for prompt in prompts]
    cache = cache or Cache(model.config, len(prompts), weight.device, weight.dtype)
    hidden = model.body(pad_sequence(prompts, batch_first=True), cache)  # (B, P, D)
    cache.cut(lengths)
    ends = torch.tensor(lengths).to(weight.device) - 1  # (B,)
    rows = torch.arange(len(prompts), device=weight.device)  # (B,)
    return cache, model.unembedding(model.norm(hidden[rows, ends])), hidden


def guess(
    model: Transformer, hidden: Tensor, following: Tensor, cache: Cache | PagedCache, start: list[int], stop: list[int]
) -> Tensor:
    """Drafts (B,) from `hidden` (B, T, D) of positions `start` on and the tokens after them; it ends at `stop`."""
    cache.cut(start, keep=True)
    logits = model.draft(hidden, following, cache)  # (B, T, V)
    cache.cut(stop)
    ends = torch.tensor([max(b - a, 1) - 1 for a, b in zip(start, stop)]).to(logits.device)  # (B,)
    rows = torch.arange(len(stop), device=logits.device)  # (B,)
    return logits[rows, ends].argmax(-1)  # (B,)
