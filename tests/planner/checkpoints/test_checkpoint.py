"""Oracles: folders that transformers saves, safetensors' own writer, huggingface_hub's reader."""

from __future__ import annotations

import json
import re
import struct
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import planner
from planner import ConfigError
from planner.checkpoints.comparison import UNMATCHED, expected_tensors
from planner.cli.commands import main
from planner.headers.safetensors_files import DTYPE_BITS
from tests.planner.configs import TINY, build
from tests.planner.every_type import CASES
from tests.planner.huggingface import test_readers_gpt_like as gpt_like
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.huggingface import test_readers_norms_and_mixtures as norms
from tests.planner.oracle import live_model
from tests.properties import examples

FAMILIES: dict[str, dict[str, Any]] = {
    **TINY,
    **{name: {**fields, "model_type": kind} for name, (kind, fields) in gpt_like.CASES.items()},
    **{name: norms.config_of(name) for name in norms.CONFIGS},
    **{kind: later.tiny(kind) for kind in later.TYPES},
}
assert set(FAMILIES[name]["model_type"] for name in FAMILIES) >= {"mixtral", "deepseek_v3", "opt"}
MIB = 2**20


def save(config: dict[str, Any], folder: Path, **options: Any) -> Any:
    live = build(config, device="cpu")
    live.save_pretrained(folder, **options)
    return live


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the dict of tensors of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def found(folder: Path, **change: Any) -> dict[str, planner.Finding]:
    """The findings by id, against the folder's config with `change`."""
    config = {**json.loads((folder / "config.json").read_text()), **change}
    findings = planner.read_checkpoint(folder).compare(planner.read_config(config))
    assert len({f.id for f in findings}) == len(findings)
    return {f.id: f for f in findings}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save(TINY["llama"], tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_of_any_family_is_what_its_config_says(name, tmp_path):
    live = save(FAMILIES[name], tmp_path, max_shard_size="90KB")
    model, checkpoint = planner.load_model(tmp_path), planner.read_checkpoint(tmp_path)
    assert len(expected_tensors(model)) == sum(1 for _ in model.checkpoint_parameters())
    findings = {f.id for f in checkpoint.compare(model)}
    # some routers are kept in float32 whatever the config says
    mixed = any(p.dtype != torch.bfloat16 for p in live.parameters())
    assert findings == ({"other-dtype"} if mixed else set())
    kept = {id(t): t for t in live.state_dict(keep_vars=True).values()}
    assert checkpoint.weights_bytes == sum(t.numel() * t.element_size() for t in kept.values())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "deepseek_v3"])
def test_tensors_are_those_that_huggingface_hub_reads(name, tmp_path):
    save(TINY[name], tmp_path, max_shard_size="90KB")
    theirs = huggingface_hub.get_local_safetensors_metadata(tmp_path)
    checkpoint = planner.read_checkpoint(tmp_path)
    assert {t.name: (t.dtype, list(t.shape), t.file) for t in checkpoint.tensors} == {
        name: (info.dtype, info.shape, file)
        for file, header in theirs.files_metadata.items()
        for name, info in header.tensors.items()
    }
    assert {s.dtype: s.elements for s in checkpoint.dtype_mix()} == theirs.parameter_count
    assert checkpoint.table()["bytes"].sum() == checkpoint.weights_bytes
    assert checkpoint.files == tuple(sorted(theirs.files_metadata))
    assert len(checkpoint.files) > 1


def test_dtypes_and_their_sizes_are_those_of_safetensors():
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(header(a=entry(dtype="F99")) + bytes(8))
    assert set(DTYPE_BITS) == set(re.findall(r"`([A-Z]\w+)`", str(caught.value))) - {"F99"}
    for dtype, bits in DTYPE_BITS.items():
        content = header(a=entry(dtype=dtype, shape=[8], offsets=[0, bits])) + bytes(bits)
        assert safetensors.deserialize(content)


def test_old_prefixes_and_a_missing_base_name_are_no_findings(llama, tmp_path):
    def old(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    rewrite(llama, old)
    assert not found(llama)
    gpt2 = tmp_path / "gpt2"
    save(TINY["gpt2"], gpt2)

    def hub(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(3):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8)

    rewrite(gpt2, hub)
    buffers = found(gpt2)
    assert set(buffers) == {"buffers"}
    assert buffers["buffers"].severity == "note"
    assert "3 tensors" in buffers["buffers"].title


def test_fused_experts_of_transformers_5_fit_as_well_as_single_ones(tmp_path):
    for name in ("mixtral", "deepseek_v3"):
        live = save(TINY[name], tmp_path / name, save_original_format=False)
        names = {t.name for t in planner.read_checkpoint(tmp_path / name).tensors}
        assert names >= {n for n, _ in live.named_parameters()}
        assert not found(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"num_hidden_layers": 4}, "missing-tensors", "model.layers.3."),
        ({"num_hidden_layers": 2}, "extra-layers", "model.layers.2."),
        ({"intermediate_size": 161}, "other-shapes", "not [161, 64]"),
        ({"vocab_size": 101}, "other-shapes", "model.embed_tokens.weight is [100, 64]"),
        ({"attention_bias": True}, "missing-tensors", "self_attn.q_proj.bias"),
    ],
)
def test_a_config_of_another_model_is_an_error(llama, change, error, said):
    finding = found(llama, **change)[error]
    assert finding.severity == "error"
    assert said in finding.seen


def test_more_and_narrower_experts_are_another_shape_though_the_count_is_the_same(tmp_path):
    save(TINY["mixtral"], tmp_path)
    assert found(tmp_path, num_local_experts=8, intermediate_size=80)["other-shapes"]
    assert found(tmp_path, num_local_experts=2, intermediate_size=320)["other-shapes"]

    def lose(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]

    rewrite(tmp_path, lose)
    assert "gate_up_proj is 7 × [160, 64]" in found(tmp_path)["other-shapes"].seen


def test_mtp_layers_heads_and_unknown_tensors_are_told_apart(tmp_path):
    save(TINY["deepseek_v3"], tmp_path)

    def add(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2", "layers.3")] = tensors[name].clone()
        for part in ("eh_proj", "enorm", "shared_head.norm"):
            tensors[f"model.layers.3.{part}.weight"] = torch.zeros(64)
        tensors["score.weight"] = torch.zeros(2, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["memory"] = torch.zeros(8)

    rewrite(tmp_path, add)
    for change in ({}, {"num_nextn_predict_layers": 1}):
        assert {n: f.severity for n, f in found(tmp_path, **change).items()} == {
            "mtp-layers": "note",
            "extra-head": "warning",
            "buffers": "note",
            "extra-tensors": "warning",
        }


def test_a_head_beside_a_tied_embedding_is_said(tmp_path):
    save(TINY["llama with biases, tied"], tmp_path)

    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert not found(tmp_path)
    rewrite(tmp_path, add)
    assert set(found(tmp_path)) == {"tied-head"}
    assert set(found(tmp_path, architectures=["LlamaModel"])) == {"extra-head"}


def test_another_dtype_than_the_configs_is_said_with_both_sizes(llama):
    assert not found(llama)
    finding = found(llama, dtype="float32")["other-dtype"]
    assert finding.title == "30 tensors are BF16, fp32 is the config's dtype"

    def widen(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    rewrite(llama, widen)
    finding = found(llama)["other-dtype"]
    assert finding.severity == "warning"
    assert "256 B in the files, 128 B" in finding.why
    assert [s.dtype for s in planner.read_checkpoint(llama).dtype_mix()] == ["BF16", "F32"]


def test_bytes_of_a_quantised_layout_are_exact(llama):
    def quantise(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    rewrite(llama, quantise)
    assert set(found(llama)) == {"quantised"}
    assert planner.read_checkpoint(llama).weights_bytes == sum(
        t.numel() * t.element_size() for t in load_file(llama / "model.safetensors").values()
    )


def test_missing_and_contradicting_shards_are_errors_and_others_are_named(tmp_path):
    save(TINY["llama"], tmp_path, max_shard_size="90KB")
    (tmp_path / "consolidated.safetensors").write_bytes(b"never read")
    assert set(found(tmp_path)) == {"other-files"}
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = next(n for n, file in index["weight_map"].items() if file == shards[0].name)
    shards[-1].unlink()
    findings = found(tmp_path)
    assert findings["missing-shard"].severity == findings["missing-tensors"].severity == "error"
    assert shards[-1].name in findings["missing-shard"].seen

    index["weight_map"] |= {name: shards[1].name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name in found(tmp_path)["index-mismatch"].seen
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    assert {"no-index", "missing-tensors"} == set(found(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", "", "a\n"],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, name):
    save_file({"t": torch.zeros(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"metadata": {"total_size": 8}, "weight_map": {"t": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="beside the index is allowed") as caught:
        planner.read_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}', '{"weight_map": {"a": {}}}'],
)
def test_a_broken_index_is_one_line(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index\.json"):
        planner.read_checkpoint(tmp_path)


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_named_and_never_opened(tmp_path, name):
    trap = tmp_path / "sprung"
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"t": Trap(trap)}, folder / name)
    for source in (folder, folder / name):
        with pytest.raises(ConfigError, match=r"pickled weights.*never opened") as caught:
            planner.read_checkpoint(source)
        assert name in str(caught.value)
    assert not trap.exists()


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header of 0 bytes"),
    "seven bytes": (b"1234567", "no safetensors file"),
    "zeros": (bytes(4096), "header of 0 bytes"),
    "another format": (b"GGUF" + bytes(4096), "no safetensors file"),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(4096), "no safetensors file"),
    "header of 2^64 - 1": (b"\xff" * 4096, "18,446,744,073,709,551,615 bytes"),
    "header beyond the file": (struct.pack("<Q", 5000) + b"{" * 4000, "a header of 5,000 bytes"),
    "no object": (struct.pack("<Q", 4) + b"[12]", "no JSON object"),
    "nested": (struct.pack("<Q", 9000) + b'{"a":' + b"[" * 8995, "broken header"),
    "nested objects": (struct.pack("<Q", 9000) + b'{"a":' * 1800, "broken header"),
    "cut off": (struct.pack("<Q", 20) + header(a=entry())[8:28], "broken header"),
    "twice": (struct.pack("<Q", len(TWICE)) + TWICE + bytes(8), "'a' twice"),
    "dtype": (header(a=entry(dtype="F99")) + bytes(8), "dtype='F99'"),
    "dtype list": (header(a=entry(dtype=["F32"])) + bytes(8), "dtype="),
    "negative": (header(a=entry(shape=[-2])) + bytes(8), r"shape=\[-2\]"),
    "float": (header(a=entry(shape=[2.0])) + bytes(8), r"shape=\[2.0\]"),
    "true": (header(a=entry(shape=[True, 2])) + bytes(8), "shape="),
    "2^70": (header(a=entry(shape=[2**70])) + bytes(8), "shape="),
    "wraps to 8 in 64 bits": (header(a=entry(shape=[2**62 + 2])) + bytes(8), "needs"),
    "dimensions": (header(a=entry(shape=[1] * 99)) + bytes(8), "up to 16"),
    "size": (header(a=entry(shape=[3])) + bytes(8), "has 8 bytes, F32 of shape .* needs 12"),
    "backwards": (header(a=entry(offsets=[8, 0])) + bytes(8), "has -8 bytes"),
    "one offset": (header(a=entry(offsets=[8])) + bytes(8), "bytes, F32"),
    "hole": (header(a=entry(offsets=[8, 16])) + bytes(16), "begins at byte 8"),
    "overlap": (header(a=entry(), b=entry(offsets=[4, 12])) + bytes(12), "begins at byte 4"),
    "truncated": (header(a=entry()) + bytes(7), "8 bytes of data, 7 are there"),
    "padded": (header(a=entry()) + bytes(9), "8 bytes of data, 9 are there"),
    "not three fields": (header(a={"dtype": "F32"}) + bytes(8), "needs dtype, shape"),
    "control characters": (header(**{"a\x1b[2J": entry()}) + bytes(8), "printable"),
    "lone surrogate": (header(**{"a\ud800": entry()}) + bytes(8), "printable"),
    "long name": (header(**{"a" * 5000: entry()}) + bytes(8), "1 to 1024"),
    "long entry": (header(a={**entry(), "x": "y" * 10**5}) + bytes(8), "needs dtype"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line_and_costs_no_memory(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=message) as caught:
            planner.read_checkpoint(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak < 4 * MIB


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length in (99_000_000, 10**12, 2**63):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(4 * 2**30)
        tracemalloc.start()
        with pytest.raises(ConfigError):
            planner.read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < MIB
        tracemalloc.stop()


def test_a_header_made_to_explode_in_a_json_parser_does_not(tmp_path):
    path = tmp_path / "model.safetensors"
    text = b'{"a":{"shape":[' + b"0," * 4_000_000 + b'0],"dtype":"F32","data_offsets":[0,0]}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="needs dtype"):
        planner.read_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * len(text)
    tracemalloc.stop()


def test_metadata_may_hold_braces_quotes_and_commas(tmp_path):
    metadata = {"format": "pt", "spec": '{"a": {"b": [1, "}"]}}', "q": 'say "x", \\ {'}
    save_file({"t": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=metadata)
    assert [t.name for t in planner.read_checkpoint(tmp_path).tensors] == ["t"]
    save_file({}, tmp_path / "model.safetensors")
    assert planner.read_checkpoint(tmp_path).weights_bytes == 0


def refusal(source: Path) -> str:
    """What reading says, "" where it succeeds, within 4 MiB; any other error is raised."""
    tracemalloc.start()
    try:
        planner.read_checkpoint(source)
    except ConfigError as error:
        return str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MIB
    return ""


@given(data=st.data())
@examples(300)
def test_flipped_and_cut_files_raise_nothing_but_config_errors(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped")
    path = folder / "model.safetensors"
    save_file({"a.weight": torch.zeros(4, 3), "b": torch.zeros(2, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    said = refusal(folder)
    assert "\n" not in said


@given(content=st.binary(max_size=300), name=st.sampled_from(["x.safetensors", "x.gguf"]))
@examples(200)
def test_random_bytes_raise_nothing_but_config_errors(content, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / name
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        planner.read_checkpoint(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/absent", "neither a folder nor a file"),
        ("a\0b", "neither a folder nor a file"),
        ("x" * 5000, "neither a folder nor a file"),
        (5, "files=5 is not allowed"),
        (__file__, "is not a .safetensors or .gguf file"),
        ("/dev/null", "neither a folder nor a file"),
    ],
)
def test_what_holds_no_weights_is_one_line(source, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_checkpoint(source)


def test_an_empty_folder_says_what_is_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no weights: model\.safetensors"):
        planner.read_checkpoint(tmp_path)


@pytest.fixture
def hub(monkeypatch, llama):
    """huggingface_hub's two functions, answered from a local folder; what they were asked."""
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, file: str, *, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(llama / file)

    def headers(repo: str, *, revision: str | None) -> Any:
        asked.append((repo, "headers", revision))
        return huggingface_hub.get_local_safetensors_metadata(llama)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    return SimpleNamespace(asked=asked, folder=llama)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_hub_is_asked_for_config_and_headers_and_nothing_else(hub, sharded):
    if sharded:
        (hub.folder / "model.safetensors").unlink()
        save(TINY["llama"], hub.folder, max_shard_size="90KB")
    model = planner.load_model("hf:org/tiny@v1.0")
    checkpoint = planner.read_checkpoint("hf:org/tiny@v1.0")
    assert hub.asked == [("org/tiny", "config.json", "v1.0"), ("org/tiny", "headers", "v1.0")]
    assert model.name == "org/tiny"
    assert checkpoint.tensors == planner.read_checkpoint(hub.folder).tensors
    assert checkpoint.compare(model) == ()


def test_headers_from_the_hub_are_checked_as_those_of_files(hub, monkeypatch):
    def hostile(**change: Any) -> None:
        metadata = huggingface_hub.get_local_safetensors_metadata(hub.folder)
        files = metadata.files_metadata
        tensor = files["model.safetensors"].tensors["lm_head.weight"]
        for field, value in change.items():
            setattr(tensor, field, value)
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda *_, **__: metadata)

    hostile(shape=[2**40])
    with pytest.raises(ConfigError, match=r"'lm_head.weight' has .* bytes, BF16"):
        planner.read_checkpoint("hf:org/tiny")
    hostile(dtype="PICKLE")
    with pytest.raises(ConfigError, match="dtype='PICKLE'"):
        planner.read_checkpoint("hf:org/tiny")


class GatedRepoError(OSError):
    pass


class LocalEntryNotFoundError(OSError):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("401\nyou are restricted"), "the repository is gated"),
        (LocalEntryNotFoundError("a long story"), "cannot be reached, and nothing of it is in"),
        (huggingface_hub.errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (huggingface_hub.errors.NotASafetensorsRepoError("x"), "has no model.safetensors"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    for ask in (planner.load_model, planner.read_checkpoint):
        with pytest.raises(ConfigError, match=message) as caught:
            ask("hf:org/name")
        assert "\n" not in str(caught.value)


def test_offline_the_hub_ends_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for ask in (planner.load_model, planner.read_checkpoint):
        with pytest.raises(ConfigError, match=r"^hf:org/absent cannot be read: "):
            ask("hf:org/absent")


@pytest.mark.parametrize("name", ["hf:", "hf:gpt2", "hf:a/b/c", "hf:a/../b", "hf:a/b@", "hf:-/-"])
def test_other_hub_names_are_refused_before_anything_is_asked(name, hub):
    for ask in (planner.load_model, planner.read_checkpoint):
        with pytest.raises(ConfigError, match="hf:org/name or hf:org/name@rev"):
            ask(name)
    assert hub.asked == []


@pytest.mark.parametrize("package", ["huggingface_hub", "gguf"])
def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, package, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    source = "hf:org/name" if package == "huggingface_hub" else tmp_path / "x.gguf"
    with pytest.raises(ConfigError, match=rf"{package}: pip install .*\[files\]"):
        planner.read_checkpoint(source)


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_shell_prints_bytes_dtypes_and_findings(capsys, llama, tmp_path):
    csv = tmp_path / "t.csv"
    code, out, _ = run(capsys, "params", str(llama), "--files", "--csv", str(csv))
    assert code == 0
    assert "BF16" in out
    assert "The files hold what the config says." in out
    checkpoint = planner.read_checkpoint(llama)
    assert pd.read_csv(csv)["bytes"].sum() == checkpoint.weights_bytes

    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    code, out, _ = run(capsys, "params", str(llama / "config.json"), "--files", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["weights_bytes"] == checkpoint.weights_bytes
    assert answer["dtypes"][0]["size_bytes"] == checkpoint.weights_bytes
    assert [f["id"] for f in answer["findings"]] == ["missing-tensors"]
    assert len(answer["tensors"]) == len(checkpoint.tensors)
    assert "error: " in run(capsys, "params", str(llama), "--files")[1]


def test_files_without_a_config_that_is_read_are_counted_all_the_same(capsys, llama):
    file = llama / "model.safetensors"
    assert run(capsys, "params", str(file), "--files")[0] == 0
    (llama / "config.json").write_text('{"model_type": "mystery"}')
    code, out, _ = run(capsys, "params", str(llama), "--files")
    assert code == 0
    assert "warning: The files are compared with no config" in out
    assert "model_type='mystery' has no reader" in out
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = run(capsys, "params", str(llama), "--files")
    assert (code, out) == (2, "")
    assert "truncated" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", sorted(UNMATCHED))
def test_types_whose_files_are_not_matched_say_so_and_count_their_bytes(name, tmp_path):
    live = live_model(CASES[name].config, auto=CASES[name].auto, device="cpu")
    live.save_pretrained(tmp_path)
    checkpoint = planner.read_checkpoint(tmp_path)
    assert [f.id for f in checkpoint.compare(planner.load_model(tmp_path))] == ["not-compared"]
    kept = {id(t): t for t in live.state_dict(keep_vars=True).values()}
    assert checkpoint.weights_bytes == sum(t.numel() * t.element_size() for t in kept.values())


LATER = sorted(set(CASES) - UNMATCHED - {config["model_type"] for config in FAMILIES.values()})


@pytest.mark.parametrize("name", LATER)
def test_what_transformers_saves_of_later_types_is_what_their_config_says(name, tmp_path):
    live = live_model(CASES[name].config, auto=CASES[name].auto, device="cpu")
    live.save_pretrained(tmp_path)
    checkpoint = planner.read_checkpoint(tmp_path)
    assert checkpoint.compare(planner.load_model(tmp_path)) == ()
