"""Generation: a prefill that yields the first token, then a decode step for each further one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from attnlab.cache import Cache
from attnlab.kv_cache import FixedShapeCache, KVCache
from attnlab.sampling import Sampling, choose_tokens
from attnlab.seq2seq import EncoderDecoder
from attnlab.transformer import Transformer, check_ids
from planner.errors import ConfigError, check_size, shown

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]
Choose = Callable[[Tensor], Tensor]
Decode = Callable[[Transformer, Tensor, Cache], Tensor]


def decode_logits(transformer: Transformer, ids_B1: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token of each sequence.

    Over a FixedShapeCache every call is the same: compile it or capture it as a CUDA graph.
    """
    return transformer(ids_B1, cache=cache, logits="last")[:, 0]


def prefill_logits(
    transformer: Transformer,
    ids_BT: Tensor,
    cache: Cache,
    *,
    tokens: Sequence[int] | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Logits [B, V] of each prompt's last token, fed in passes of at most `chunk_tokens` tokens."""
    T = check_ids(ids_BT)[1]
    step = T if chunk_tokens is None else check_size("prefill_chunk_tokens", chunk_tokens)
    last: Tensor | None = None
    for start in range(0, T, step):
        chunk = ids_BT[:, start : start + step]
        real = None if tokens is None else [min(max(n - start, 0), chunk.shape[1]) for n in tokens]
        out = transformer(chunk, cache=cache, logits="last", tokens=real)[:, 0]
        if last is None or real is None:
            last = out
        else:  # a prompt that ended in an earlier chunk keeps its logits
            fed = torch.tensor(real, device=out.device)[:, None] > 0
            last = torch.where(fed, out, last)
    assert last is not None
    return last


@torch.no_grad()
def steps(
    transformer: Transformer,
    prompt_ids: Tensor,
    output_tokens: int,
    cache: Cache,
    *,
    tokens: Sequence[int] | None = None,
    prefill_chunk_tokens: int | None = None,
    choose: Choose | None = None,
    decode: Decode = decode_logits,
) -> Iterator[Tensor]:
    """Each new token [B, 1] as its pass ends: the prefill's, then output_tokens − 1 decode steps'.

    The prompt [B, T] follows what the cache holds; `tokens`: the real ones of each, from the left.
    `choose` takes logits [B, V] to tokens [B, 1], None: the likeliest.
    """
    choose = choose or (lambda logits: choose_tokens(logits, None))
    check_size("output_tokens", output_tokens)
    logits = prefill_logits(
        transformer, prompt_ids, cache, tokens=tokens, chunk_tokens=prefill_chunk_tokens
    )
    ids = choose(logits)
    yield ids
    for _ in range(output_tokens - 1):
        ids = choose(decode(transformer, ids, cache))
        yield ids


def generate(
    transformer: Transformer,
    prompts: Prompts,
    *,
    output_tokens: int,
    cache: Cache | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Iterable[int] = (),
    prefill_chunk_tokens: int | None = None,
    decode: Decode = decode_logits,
    encoder_inputs: Tensor | None = None,
    encoder_tokens: Sequence[int] | None = None,
) -> Tensor:
    """Continuations [B, n ≤ output_tokens] of prompts, [B, T] or a list of unequal ones.

    The likeliest tokens, or drawn by `sampling`. A sequence that produced a stop token repeats it
    until all have; then it ends early. Without a cache a static one of exactly the longest prompt
    + output_tokens − 1 tokens is made, in the transformer's dtype. An encoder–decoder first reads
    `encoder_inputs`, of which `encoder_tokens` are real; its prompts are the decoder's. Raises
    ConfigError for prompts and stop tokens that are none of the vocabulary, and for what does not
    fit the cache.
    """
    check_size("output_tokens", output_tokens)
    ids, tokens = pad_prompts(prompts, transformer)
    B, longest = ids.shape
    needed = longest + output_tokens - 1
    if cache is None:
        cache = KVCache(
            transformer.model,
            batch=B,
            capacity_tokens=needed,
            dtype=transformer.dtype,
            device=transformer.device,
        )
    _check_room(cache, needed)
    stops = torch.tensor(_check_stops(stop_tokens, transformer), device=ids.device)
    if encoder_inputs is not None:
        if not isinstance(transformer, EncoderDecoder):
            raise ConfigError("encoder_inputs are not allowed: None without an encoder")
        with torch.no_grad():
            transformer.read(encoder_inputs, cache, tokens=encoder_tokens)
    done = torch.zeros(B, 1, dtype=torch.bool, device=ids.device)
    produced: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        nonlocal done
        ids = choose_tokens(logits, sampling, generator)
        if produced:
            ids = torch.where(done, produced[-1], ids)
        done = done | torch.isin(ids, stops)
        produced.append(ids)
        return ids

    for _ in steps(
        transformer,
        ids,
        output_tokens,
        cache,
        tokens=tokens,
        prefill_chunk_tokens=prefill_chunk_tokens,
        choose=choose,
        decode=decode,
    ):
        if len(stops) and bool(done.all()):
            break
    return torch.cat(produced, dim=1)


def pad_prompts(prompts: Prompts, transformer: Transformer) -> tuple[Tensor, list[int] | None]:
    """(ids [B, T] filled up on the right, real tokens of each; None where all are equally long)."""
    if isinstance(prompts, Tensor):
        check_ids(prompts)
        ids, tokens = prompts, None
    else:
        rows = [_row(prompt) for prompt in prompts]
        if not rows:
            raise ConfigError("prompts=[] are not allowed: a list of lists of token ids")
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(transformer.device)
        lengths = [len(row) for row in rows]
        tokens = None if len(set(lengths)) == 1 else lengths
    V = transformer.model.vocab_size
    if ids.device.type != "meta" and (int(ids.min()) < 0 or int(ids.max()) >= V):
        raise ConfigError(f"prompts have ids outside the vocabulary: 0 to {V - 1}")
    return ids, tokens


def _row(prompt: Tensor | Sequence[int]) -> Tensor:
    """One prompt's ids [T]."""
    try:
        row = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.dim() != 1 or not len(row) or row.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"prompts have {shown(prompt)}: a list of at least one token id each")
    return row.long()


def _check_stops(stop_tokens: Iterable[int], transformer: Transformer) -> list[int]:
    stops, V = list(stop_tokens), transformer.model.vocab_size
    for token in stops:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < V:
            raise ConfigError(f"stop_tokens has {token!r}: an id from 0 to {V - 1}")
    return stops


def _check_room(cache: Cache, needed_tokens: int) -> None:
    """What a fixed-shape cache cannot check itself; the others refuse in the pass that is too much.

    Only an empty one can be judged from here.
    """
    if isinstance(cache, FixedShapeCache) and needed_tokens > cache.capacity:
        raise ConfigError(
            f"{needed_tokens} tokens do not fit capacity_tokens={cache.capacity_tokens}"
        )
