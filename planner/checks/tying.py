"""Whether the head is the embedding: the config against itself and against the weight files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from planner.checks.edges import found
from planner.checks.subject import Subject
from planner.errors import ConfigError
from planner.findings import Finding

FIELD = "tie_word_embeddings"


def check_tying(subject: Subject) -> Iterator[Finding]:
    """Findings on tied embeddings."""
    outer = subject.config.get(FIELD)
    for name in ("text_config", "decoder"):
        inner = subject.config.get(name)
        stated = inner.get(FIELD) if isinstance(inner, Mapping) else None
        if isinstance(outer, bool) and isinstance(stated, bool) and outer != stated:
            yield found(
                "tied-mismatch",
                f"{FIELD}={outer}, {name}.{FIELD}={stated}",
                severity="medium",
                where=FIELD,
            )
    yield from files(subject)


def files(subject: Subject) -> Iterator[Finding]:
    """The head in the safetensors beside the config, where there are any."""
    model, folder = subject.model, subject.folder
    if model is None or folder is None or not model.lm_head or not model.vocab_size:
        return
    if not any(folder.glob("*.safetensors*")):
        return
    from planner.checkpoints.checkpoint import read_checkpoint

    try:
        names = {tensor.name for tensor in read_checkpoint(folder).tensors}
    except ConfigError as error:
        yield found("not-checked", f"the weight files: {error}", where=str(folder))
        return
    head, embedding = (model.checkpoint_name(f"{n}.weight") for n in ("lm_head", "embed_tokens"))
    if embedding not in names:
        return
    if not model.tie_word_embeddings and head not in names:
        yield found(
            "tied-mismatch",
            f"{FIELD}=False, and the files have no {head}: the head would be random",
            severity="critical",
            where=FIELD,
        )
    if model.tie_word_embeddings and head in names:
        yield found(
            "tied-mismatch",
            f"{FIELD}=True, and the files have a {head}: it is replaced by the embedding on "
            "loading, whatever it holds",
            severity="medium",
            where=FIELD,
        )
