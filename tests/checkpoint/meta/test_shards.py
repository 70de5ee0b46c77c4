"""Meta's directories with several shards, split as in fairscale: joined, or rejected if broken.

Also the params.json of every dense text model that Meta published.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_scratch import Llama
from llama_scratch.checkpoint import open_checkpoint
from llama_scratch.checkpoint.meta.params import parse_params
from llama_scratch.checkpoint.meta.pickle_file import load_pth
from llama_scratch.checkpoint.verify import verify
from llama_scratch.config import ModelArgs, RopeScaling, is_tied
from llama_scratch.errors import CheckpointError, ModelNotFoundError
from llama_scratch.precision.lazy_weight import ShardedWeight, as_tensor
from llama_scratch.system.progress import silent
from tests.helpers.assertions import assert_rejected
from tests.helpers.checkpoints import tiny_args
from tests.helpers.command_line import Runner, one_sentence
from tests.helpers.meta_files import (
    ARGS,
    PARAMS,
    TIED,
    UNTIED,
    VOCABULARY,
    axis_of,
    shard,
    split,
    weights_of,
    write,
)
from tests.helpers.processes import mappings
from tests.helpers.weights import load, same


@pytest.fixture(scope="module")
def four_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in four shards. Read only."""
    return write(tmp_path_factory.mktemp("four") / "Four", split(weights_of(), 4))


@pytest.fixture
def four(four_dir: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(four_dir, tmp_path / "Four"))


def change(directory: Path, number: int, **changes: Tensor | None) -> None:
    """Replace tensors in one shard, dots in names as underscores; None removes one."""
    weights = torch.load(directory / shard(number))
    for name, tensor in changes.items():
        full = next(n for n in weights if n.replace(".", "_") == name)
        weights = {n: t for n, t in (weights | {full: tensor}).items() if t is not None}
    torch.save(weights, directory / shard(number))


# --- Good directories -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("embedding", [0, 1])
@pytest.mark.parametrize("tied", [TIED, UNTIED])
def test_the_joined_model_is_the_whole_one(tmp_path: Path, n: int, embedding: int, tied: bool) -> None:
    """Bitwise equal, whichever axis of the embedding was split; ties are kept."""
    whole = write(tmp_path / "whole", [weights_of(tied=tied)])
    parts = write(tmp_path / "parts", split(weights_of(tied=tied), n, embedding))
    assert same(load(parts), load(whole))
    checkpoint = open_checkpoint(parts)
    assert checkpoint.files == tuple(parts / shard(number) for number in range(n))
    assert checkpoint.path == parts / shard(0)
    assert checkpoint.storage(silent) == open_checkpoint(whole).storage(silent)
    assert checkpoint.storage(silent).tied is tied


def test_an_output_that_is_the_embedding_of_each_shard_is_tied(tmp_path: Path) -> None:
    """If they share one storage, as in Meta's single files. Equal values in separate storages stay untied."""
    shards = split(weights_of(), 2)
    parts = [{**part, "output.weight": part["tok_embeddings.weight"]} for part in shards]
    assert is_tied(open_checkpoint(write(tmp_path / "one", parts)).load(silent))
    parts = [{**part, "output.weight": part["tok_embeddings.weight"].clone()} for part in shards]
    assert not is_tied(open_checkpoint(write(tmp_path / "two", parts)).load(silent))


def test_an_output_in_the_embeddings_storage_but_of_another_shape_is_its_own(tmp_path: Path) -> None:
    """If the embedding is split by columns, it has as many values as the output, in another order."""
    shards = split(weights_of(), 2, embedding=1)
    parts = [{**part, "output.weight": part["tok_embeddings.weight"].view(-1, 128)} for part in shards]
    weights = open_checkpoint(write(tmp_path / "m", parts)).load(silent)
    assert not is_tied(weights)
    assert torch.equal(as_tensor(weights["output.weight"]), torch.cat([part["output.weight"] for part in parts]))


def test_the_rotation_table_of_older_shards_is_ignored(four: Path) -> None:
    """Only some shards may have it."""
    expected = load(four)
    weights = torch.load(four / shard(2))
    torch.save({**weights, "rope.freqs": torch.ones(4)}, four / shard(2))
    assert same(load(four), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_answers_are_those_of_the_whole_model(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """For every operation that multiplies rows from several files."""
    weights, ids = weights_of(dtype=dtype, tied=UNTIED), list(range(40, 80))
    whole = Llama.load(write(tmp_path / "whole", [weights]), precision=precision, device="cpu")
    parts = Llama.load(write(tmp_path / "parts", split(weights, 8)), precision=precision, device="cpu")
    assert parts.info.parameters == whole.info.parameters
    torch.testing.assert_close(parts.logits(ids), whole.logits(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux shows a process its mappings")
def test_shards_stay_mapped_until_they_are_used(four: Path) -> None:
    """Each piece is in the mapping of its own file, and rows of one shard are a view of it."""
    weights = open_checkpoint(four).load(silent)
    areas = [[area for area, _ in mappings(four / shard(number))] for number in range(4)]
    matrices = [weight for weight in weights.values() if len(weight.shape) == 2]
    assert len(matrices) == 2 * 7 + 2
    for weight in matrices:
        assert isinstance(weight, ShardedWeight)
        for piece, mapped in zip(weight.pieces, areas, strict=True):
            assert any(piece.data_ptr() in area for area in mapped)
    embedding = weights["tok_embeddings.weight"]
    assert isinstance(embedding, ShardedWeight)
    second = VOCABULARY // 4
    assert embedding.rows(second, second + 2).data_ptr() == embedding.pieces[1].data_ptr()


def test_progress_grows_over_all_shards(four: Path) -> None:
    """Progress does not restart with each shard, and ends at its total."""
    calls: list[tuple[int, int]] = []
    open_checkpoint(four).load(lambda _, done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1] > 4 * ARGS.n_parameters(tied=True) // 2


def test_key_value_heads_that_were_doubled(tmp_path: Path) -> None:
    """Llama 3.1 405B in 16 shards has each of its 8 KV heads twice, and states 16: the same answers."""
    weights = weights_of(dtype=torch.float32, tied=UNTIED)
    doubled = {
        name: w.view(8, 8, 128).repeat_interleave(2, dim=0).reshape(128, 128) if ".wk." in name or ".wv." in name else w
        for name, w in weights.items()
    }
    whole = write(tmp_path / "whole", [weights])
    parts = write(tmp_path / "parts", split(doubled, 16), {**PARAMS, "n_kv_heads": 16})
    ids = list(range(40, 60))
    expected, found = (Llama.load(d, precision="fp32", device="cpu").logits(ids) for d in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    write(parts, [], PARAMS)
    assert_rejected(
        lambda: load(parts),
        CheckpointError,
        "consolidated.00.pth to consolidated.15.pth",
        "wk.weight",
        "(128, 128)",
        "(64, 128)",
    )


@pytest.mark.parametrize("name", ["Llama3.1-70B:bf16-mp4", "Llama 3.1 70B", "[x]*", "ラマ"])
def test_any_name_of_a_directory(four: Path, name: str, llama_scratch: Runner) -> None:
    """Also for `original/` in Hugging Face's repositories."""
    for inner in ("", "original"):
        outer = four.parent / f"{inner}-" / name
        shutil.copytree(four, outer / inner)
        checkpoint = open_checkpoint(outer)
        assert (checkpoint.name, len(checkpoint.files)) == (name, 4)
    assert json.loads(llama_scratch("info", str(outer), "--json").out)["name"] == name


# --- Broken directories ------------------------------------------------------------------------


def test_no_shard_at_all(four: Path) -> None:
    for number in range(4):
        (four / shard(number)).unlink()
    assert_rejected(lambda: load(four), ModelNotFoundError, shard(0), four, "tokenizer.model")


@pytest.mark.parametrize("missing", [[0], [1], [2], [3], [0, 1], [1, 3], [2, 3], [0, 1, 2], [1, 2, 3]], ids=str)
def test_a_missing_shard(four: Path, missing: list[int], llama_scratch: Runner) -> None:
    """The error names the first missing shard; the shapes of the others reveal a missing last one."""
    for number in missing:
        (four / shard(number)).unlink()
    message = assert_rejected(
        lambda: load(four), ModelNotFoundError, f"{shard(missing[0])} not found", four, "Fetch the missing"
    )
    last = max(number for number in range(4) if number not in missing)
    assert last < missing[0] or f"holds {shard(last)}" in message
    result = llama_scratch("--model-dir", str(four), "--prompt", "x")
    assert result.code == 3
    assert message in one_sentence(result)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_file_is_a_missing_shard(four: Path, kind: str) -> None:
    (four / shard(1)).unlink()
    if kind == "folder":
        (four / shard(1)).mkdir()
    else:
        (four / shard(1)).symlink_to("gone")
    assert_rejected(lambda: load(four), ModelNotFoundError, shard(1))


def test_nothing_is_read_where_one_is_seen_to_be_missing(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of eight shards can have more than a hundred gigabytes."""
    (four / shard(3)).unlink()
    read: list[str] = []

    def loaded(path: Path, *rest: Any) -> dict[str, Tensor]:
        read.append(path.name)
        return load_pth(path, *rest)

    monkeypatch.setattr("llama_scratch.checkpoint.meta.reader.load_pth", loaded)
    assert_rejected(lambda: load(four), ModelNotFoundError, shard(3))
    assert read == [shard(0)]


@pytest.mark.parametrize("number", [1, 3])
def test_a_shard_that_is_there_twice(four: Path, number: int) -> None:
    """Its norms match, but its matrices are another shard's. Swapped shards cannot be detected."""
    shutil.copyfile(four / shard(0), four / shard(number))
    assert_rejected(lambda: load(four), CheckpointError, four / shard(number), shard(0), "same weights")


def test_a_shard_beyond_the_last(four: Path) -> None:
    """From another model, or a copy."""
    shutil.copyfile(four / shard(1), four / shard(4))
    assert_rejected(lambda: load(four), CheckpointError, four / shard(4), "32 of 128 rows")


def test_shards_of_less_than_a_head(tmp_path: Path) -> None:
    """More shards than key-value heads: rows are split all the same."""
    params = {**PARAMS, "n_heads": 4, "n_kv_heads": 2}
    weights = weights_of(tiny_args(**params))
    parts = write(tmp_path / "m", split(weights, 8), params)
    assert same(load(parts), load(write(tmp_path / "whole", [weights], params)))


@pytest.mark.parametrize("file", [0, 1, 3])
def test_a_shard_of_another_model(four: Path, file: int, tmp_path: Path) -> None:
    """The same shape, but other norms. The first shard is the reference for the others."""
    other = split({n: w.flip(0) for n, w in weights_of().items()}, 4)
    torch.save(other[file], four / shard(file))
    assert_rejected(
        lambda: load(four), CheckpointError, four / shard(max(file, 1)), "belongs to another model", shard(0)
    )


def test_one_norm_alone_tells(four: Path) -> None:
    """A single bit in one shard."""
    norm = torch.load(four / shard(2))["layers.1.ffn_norm.weight"]
    norm.view(torch.int16)[-1] ^= 1
    change(four, 2, layers_1_ffn_norm_weight=norm)
    assert_rejected(lambda: load(four), CheckpointError, four / shard(2), "belongs to another model")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_0_attention_wk_weight": torch.ones(8, 128, dtype=torch.bfloat16)},
        {"layers_0_attention_wk_weight": torch.ones(128, 16, dtype=torch.bfloat16)},
        {"layers_0_attention_wk_weight": torch.ones(16, 128)},
        {"norm_weight": torch.ones(128)},
        {"norm_weight": torch.ones(1, 128, dtype=torch.bfloat16)},
        {"norm_weight": torch.tensor(1.0, dtype=torch.bfloat16)},
        {"tok_embeddings_weight": None},
        {"layers_1_feed_forward_w2_weight": None},
        {"norm_weight": None},
    ],
    ids=lambda changes: "/".join(f"{n} {t if t is None else (tuple(t.shape), t.dtype)}" for n, t in changes.items()),
)
@pytest.mark.parametrize("number", [0, 3])
def test_a_shard_with_other_names_shapes_or_types(four: Path, number: int, changes: dict[str, Tensor | None]) -> None:
    change(four, number, **changes)
    assert_rejected(lambda: load(four), CheckpointError, four / shard(max(number, 1)), shard(0))


def test_a_shard_with_one_more_name(four: Path) -> None:
    """In one shard, and in all."""
    weights = torch.load(four / shard(1))
    torch.save({**weights, "x": torch.ones(2)}, four / shard(1))
    assert_rejected(lambda: load(four), CheckpointError, four / shard(1), "belongs to another model")
    for number in range(4):
        torch.save({**torch.load(four / shard(number)), "x": torch.ones(2)}, four / shard(number))
    assert_rejected(lambda: load(four), CheckpointError, f"{shard(0)} to {shard(3)} holds 'x'")


@pytest.mark.parametrize("name", [*ARGS.weight_shapes()][:10])
def test_a_weight_that_all_shards_lack(tmp_path: Path, name: str) -> None:
    weights = {n: w for n, w in weights_of(tied=UNTIED).items() if n != name}
    assert_rejected(
        lambda: load(write(tmp_path / "m", split(weights, 2))),
        CheckpointError,
        f"{shard(0)} to {shard(1)} lacks '{name}'",
    )


@pytest.mark.parametrize("name", [n for n in ARGS.weight_shapes() if "layers.1" not in n and "tok_emb" not in n])
@pytest.mark.parametrize("n", [2, 8])
def test_a_weight_that_was_cut_along_the_other_axis(tmp_path: Path, name: str, n: int) -> None:
    """Each shape is checked, and norms are not split. Also square matrices: their pieces are not square."""
    weights = weights_of(tied=UNTIED)
    shards = split(weights, n)
    axis = axis_of(name, 0)
    for part, piece in zip(shards, weights[name].chunk(n, 0 if axis is None else 1 - axis), strict=True):
        part[name] = piece.clone()
    assert_rejected(lambda: load(write(tmp_path / "m", shards)), CheckpointError, shard(0), f"{name} has the shape")


@pytest.mark.parametrize("shape", [(), (0,), (560,), (70, 128, 1), (0, 128)])
def test_an_embedding_of_another_shape_in_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Also an embedding without rows to count."""
    shards = split(weights_of(), 2)
    for part in shards:
        part["tok_embeddings.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    assert_rejected(lambda: load(write(tmp_path / "m", shards)), CheckpointError, "tok_embeddings.weight has the shape")


@pytest.mark.parametrize("shape", [(), (0,), (32,), (0, 0), (32, 128, 1), (3, 128)])
@pytest.mark.parametrize("part", ["attention.wq", "attention.wo", "feed_forward.w2"])
def test_a_matrix_of_another_shape_in_all(tmp_path: Path, part: str, shape: tuple[int, ...]) -> None:
    name, shards = f"layers.0.{part}.weight", split(weights_of(), 4)
    for weights in shards:
        weights[name] = torch.ones(shape, dtype=torch.bfloat16)
    assert_rejected(
        lambda: load(write(tmp_path / "m", shards)), CheckpointError, f"{name} has the shape", shard(0), shard(3)
    )


def test_a_wrong_shape_is_not_taken_for_missing_shards(tmp_path: Path) -> None:
    """Half of a shard's rows, but with another width."""
    shards = split(weights_of(), 4)
    for part in shards:
        part["layers.0.attention.wq.weight"] = torch.ones(16, 64, dtype=torch.bfloat16)
        part["layers.0.attention.wo.weight"] = torch.ones(128, 16, dtype=torch.bfloat16)
    assert_rejected(
        lambda: load(write(tmp_path / "m", shards)),
        CheckpointError,
        "layers.0.attention.wq.weight has the shape (64, 64)",
    )


@pytest.mark.parametrize("params", [{"dim": 256}, {"n_layers": 3}, {"n_layers": 1}, {"n_kv_heads": 16}, {"dim": 64}])
def test_params_of_another_model(four: Path, params: dict[str, int]) -> None:
    write(four, [], PARAMS | params)
    assert_rejected(lambda: load(four), CheckpointError, f"{shard(0)} to {shard(3)}", "params")


def test_a_file_that_is_one_of_several(four: Path) -> None:
    """A single shard under the name of a complete model."""
    for number in (1, 2, 3):
        (four / shard(number)).unlink()
    assert_rejected(lambda: load(four), ModelNotFoundError, shard(1), "32 of 128 rows of wq")


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: os.truncate(file, 100_000), "truncated"),
        (lambda file: file.write_bytes(b""), "starts with b''"),
        (lambda file: file.write_bytes(b"<html>expired</html>"), "web page"),
        (lambda file: torch.save([1], file), "list"),
    ],
)
def test_a_damaged_shard_is_named(four: Path, number: int, damage: Callable[[Path], None], said: str) -> None:
    damage(four / shard(number))
    assert_rejected(lambda: load(four), CheckpointError, four / shard(number), said)


def test_a_shard_that_vanishes(four: Path) -> None:
    checkpoint = open_checkpoint(four)
    (four / shard(3)).unlink()
    with pytest.raises(ModelNotFoundError, match=r"consolidated\.03\.pth cannot be read"):
        checkpoint.load(silent)


# --- verify -----------------------------------------------------------------------------------


def test_a_value_that_is_no_number_blames_its_shard(four: Path) -> None:
    """In rows, in columns, and in a norm, which is read from the first shard. Rows are counted in the whole weight."""
    assert verify(four).wrong == 0
    shards = [torch.load(four / shard(number)) for number in range(4)]
    shards[1]["layers.0.attention.wq.weight"][5, 7] = torch.nan
    shards[2]["layers.0.feed_forward.w2.weight"][9, 7] = torch.inf
    shards[3]["layers.0.feed_forward.w2.weight"][8, 7] = torch.nan
    found = verify(write(four, shards))
    said = {f.part: (f.sentence, f.fetch) for f in found.findings if f.result == "wrong"}
    assert said.keys() == {"layers.0.attention.wq.weight", "layers.0.feed_forward.w2.weight"}
    sentence, files = said["layers.0.attention.wq.weight"]
    assert "1 NaN among its 16,384 values, first in row 37" in sentence
    assert files == (shard(1),)
    sentence, files = said["layers.0.feed_forward.w2.weight"]
    assert "1 NaN and 1 infinite among its 65,536 values, first in row 8" in sentence
    assert files == (shard(2), shard(3))
    assert found.fetch_again == [shard(1), shard(2), shard(3)]


def test_a_norm_that_is_no_number_in_all_shards(tmp_path: Path) -> None:
    """NaN does not make a shard count as another model's."""
    weights = weights_of()
    weights["norm.weight"][3] = torch.nan
    found = verify(write(tmp_path / "m", split(weights, 2)))
    (finding,) = (f for f in found.findings if f.result == "wrong")
    assert (finding.part, finding.check) == ("norm.weight", "values")


@pytest.mark.parametrize("number", [0, 2, 3])
def test_which_shard_to_fetch_again(four: Path, number: int, llama_scratch: Runner) -> None:
    os.truncate(four / shard(number), 100_000)
    result = llama_scratch("verify", str(four))
    assert result.code == 4
    assert result.out.endswith(f"Fetch {shard(number)} again.\n")
    (four / shard(number)).unlink()
    result = llama_scratch("verify", str(four))
    assert result.code == 4
    assert result.out.endswith(f"Fetch {shard(number)} again.\n")


# --- Published models -------------------------------------------------------------------------

SCALED = {"rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256, "norm_eps": 1e-05, "n_kv_heads": 8}
OLDER = {name: value for name, value in SCALED.items() if name != "use_scaled_rope"}
B8 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}
B70 = {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}
B405 = {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096}
B1 = {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256}
B3 = {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256}
# name: (params.json, width of the feed-forward layer, RoPE factor, parameters)
PUBLISHED: dict[str, tuple[dict[str, Any], int, float | None, int]] = {
    "Llama3-8B": (B8 | OLDER, 14336, None, 8_030_261_248),
    "Llama3-70B": (B70 | OLDER, 28672, None, 70_553_706_496),
    "Llama3.1-8B": (B8 | SCALED, 14336, 8, 8_030_261_248),
    "Llama3.1-70B": (B70 | SCALED, 28672, 8, 70_553_706_496),
    "Llama3.1-405B": (B405 | SCALED, 53248, 8, 405_853_388_800),
    "Llama3.1-405B:bf16-mp16": (B405 | SCALED | {"n_kv_heads": 16}, 53248, 8, 410_081_247_232),
    "Llama3.2-1B": (B1 | SCALED, 8192, 32, 1_235_814_400),
    "Llama3.2-3B": (B3 | SCALED, 8192, 32, 3_212_749_824),
    "Llama3.3-70B-Instruct": (B70 | SCALED, 28672, 8, 70_553_706_496),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_of_every_published_model(name: str) -> None:
    """From params.json, and its defaults: the width, the RoPE factor and the context."""
    params, ffn_dim, factor, parameters = PUBLISHED[name]
    args = parse_params(json.dumps(params))
    assert args == ModelArgs(
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params["n_kv_heads"],
        vocab_size=128256,
        ffn_dim=ffn_dim,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192) if factor else None,
        max_seq_len=131_072 if factor else 8192,
    )
    assert args.head_dim == (64 if name == "Llama3.2-1B" else 128)
    assert args.n_parameters(tied="3.2" in name) == parameters


def test_the_shapes_are_those_of_metas_own_list() -> None:
    """Every dense text release of Llama 3 in llama-models, base and Instruct, is in the list above."""
    types = importlib.import_module("llama_models.sku_types")
    families = [types.ModelFamily[name] for name in ("llama3", "llama3_1", "llama3_2", "llama3_3")]
    models = importlib.import_module("llama_models.sku_list").all_registered_models()
    models = [model for model in models if model.model_family in families and "Vision" not in model.descriptor()]
    seen = set()
    for model in models:
        if "quantization_args" in model.arch_args:
            with pytest.raises(CheckpointError, match=r"quantized release .*Use the bf16 release"):
                parse_params(json.dumps(model.arch_args))
            continue
        plain = model.descriptor().replace("-Instruct", "").replace(":bf16-mp8", "").replace("Llama-3-", "Llama3-")
        plain = {"Llama3.3-70B": "Llama3.3-70B-Instruct"}.get(plain, plain)
        assert parse_params(json.dumps(model.arch_args)) == parse_params(json.dumps(PUBLISHED[plain][0]))
        seen.add(plain)
    assert seen == PUBLISHED.keys()


@pytest.mark.parametrize(("name", "talks"), [("Llama3.1-8B", False), ("Llama3.1-8B-Instruct", True)])
def test_instruct_models_talk(four: Path, name: str, talks: bool) -> None:
    """Their params.json equals the base model's; only the name differs."""
    directory = four.rename(four.parent / name)
    assert (open_checkpoint(directory).chat is not None) is talks


@pytest.mark.parametrize("name", ["Llama3.2-1B-Instruct:int4-qlora-eo8", "Llama3.2-3B-Instruct:int4-spinquant-eo8"])
def test_quantized_releases_are_refused_by_name(four: Path, name: str, llama_scratch: Runner) -> None:
    """In directories with the names from Meta's downloader, before the weights are read."""
    more: dict[str, Any] = {"quantization_args": {"group_size": 32, "spinquant": "spinquant" in name}}
    if "qlora" in name:
        more["lora_args"] = {"rank": 16, "scale": 2.0}
    directory = write(four.parent / name, [], {**PARAMS, **more})
    (directory / shard(0)).write_bytes(b"never read")
    result = llama_scratch("info", str(directory))
    assert result.code == 4
    assert f"quantized release {name.partition(':')[2]}" in one_sentence(result)


def test_the_release_in_fp8_is_refused(four: Path) -> None:
    """Its params.json equals that of the bf16 release, but there are scales beside the shards."""
    (four / "fp8_scales_0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"fp8_scales_0.pt.*release in fp8, which is not supported\. .*bf16"):
        open_checkpoint(four)


@pytest.mark.parametrize("size", ["7B", "70B-chat"])
def test_llama_2_is_refused_by_its_tokenizer(tmp_path: Path, size: str, llama_scratch: Runner) -> None:
    """Its params.json has no vocab_size."""
    params = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
    directory = write(tmp_path / f"Llama-2-{size}", [], params)
    (directory / shard(0)).write_bytes(b"never read")
    sentencepiece = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
    (directory / "tokenizer.model").write_bytes(sentencepiece * 20)
    result = llama_scratch("info", str(directory))
    assert result.code == 4
    assert "SentencePiece vocabulary" in one_sentence(result)
