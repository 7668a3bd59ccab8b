"""Text from the model, one token at a time: greedy, by temperature, among the k likeliest; with and without a KV cache.

Without a cache each step runs the whole text again: T steps cost about T²/2 tokens of arithmetic. With one, a prefill
reads the prompt, and each decode step then runs a single token, but moves all weights and all cached keys and values.

    python -m course_lib.llm.generate runs/tiny-stories --prompt "Once upon a time"
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from course_lib.llm import checkpoint, int8, lora, tokenizer
from course_lib.llm.config import Config
from course_lib.llm.model import Cache, Transformer
from course_lib.llm.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Tensor,
    new: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    cached: bool = True,
) -> Tensor:
    """`prompt` (B, P), int64 on the model's device, with `new` tokens after it: (B, P + new).

    Temperature 0 is greedy and stays on the device. Otherwise a seeded generator on the CPU draws, so that the same
    logits give the same tokens on every device, and each token waits for the device. ValueError where the prompt is
    empty, or P + new exceeds the context: nothing is dropped from the text in silence.
    """
    check(model, prompt, new, temperature, top_k)
    generator = torch.Generator("cpu").manual_seed(seed)
    weight = model.embedding.weight
    cache = Cache(model.config, len(prompt), weight.device, weight.dtype) if cached else None
    tokens, fresh = prompt, prompt  # (B, T) so far, and those of them that the model has to read
    for _ in range(new):
        logits = model(fresh, cache=cache)[:, -1]  # (B, V)
        chosen = choose(logits, temperature, top_k, generator)  # (B, 1)
        tokens = torch.cat((tokens, chosen), dim=1)  # (B, T+1)
        fresh = chosen if cached else tokens
    return tokens


def check(model: Transformer, prompt: Tensor, new: int, temperature: float, top_k: int | None) -> None:
    """ValueError for what cannot be generated."""
    context = model.config.context
    if prompt.shape[1] < 1:
        raise ValueError("the prompt is empty; expected at least one token")
    if prompt.shape[1] + new > context:
        raise ValueError(
            f"prompt of {prompt.shape[1]} and {new} new tokens exceed the context of {context} tokens; ask for fewer"
        )
    if temperature < 0:
        raise ValueError(f"expected a temperature of 0 (greedy) or above, found {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"expected top_k of at least 1, found {top_k}")


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token for each row of `logits` (B, V), as (B, 1) on the same device."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)  # (B, 1)
    scaled = logits.float().cpu() / temperature  # (B, V)
    if top_k is not None and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k).values[:, -1:]  # (B, 1)
        scaled = scaled.masked_fill(scaled < least, float("-inf"))  # (B, V)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).to(logits.device)  # (B, 1)


def write(model: Transformer, words: Tokenizer, prompt: str, new: int, temperature: float = 0.0, seed: int = 0) -> str:
    """`prompt` continued by `new` tokens, as text."""
    device = model.embedding.weight.device
    tokens = torch.tensor([words.encode(prompt)], dtype=torch.int64).to(device)  # (1, P)
    return words.decode(generate(model, tokens, new, temperature, seed=seed)[0].tolist())


def restore(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Model, on the CPU, and tokenizer of the training run in `folder`; ValueError if there is none."""
    record, tensors = checkpoint.load(folder)
    model, rank = Transformer(Config(**record["config"])), record["settings"].get("lora", 0)
    if rank:
        lora.adapt(model, rank)
    checkpoint.unpack(tensors, model)
    lora.merge(model)
    return model, tokenizer.load(Path(folder) / "tokenizer.json")


def main(arguments: list[str] | None = None) -> int:
    """Print text by a trained model; 2 and one line where an argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m course_lib.llm.generate", description="Continue a text.")
    parser.add_argument("folder", type=Path, help="where training wrote its checkpoint")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: the beginning of a story)")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8", action="store_true", help="weights in eight bits")
    args = parser.parse_args(arguments)
    try:
        model, words = restore(args.folder)
        if args.int8:
            int8.quantise_weights(model)
        print(write(model, words, args.prompt, args.tokens, args.temperature, args.seed).strip())
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
