"""Both published layouts of Mimi: a real model of Kyutai's package, and one into the other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dia2_jax.config import MimiConfig, load_mimi_config
from dia2_jax.convert import load, mimi_hf, mimi_kyutai, mimi_layout, models
from dia2_jax.errors import CheckpointError, ConfigError
from dia2_jax.hub import MimiFiles
from dia2_jax.nn.conv import from_published_transpose, to_published_transpose

GOLDEN = Path(__file__).parent.parent / "golden" / "kyutai"
FILES = MimiFiles(GOLDEN / "model.safetensors", GOLDEN / "mimi_config.json")


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def mimi():
    return models.load_mimi(FILES)[0]


def test_codec_from_kyutais_layout_computes_what_moshi_does(mimi, expected):
    audio = jnp.asarray(expected["audio"])[None]
    latents, codes = jax.jit(lambda wave: (mimi.encode_latents(wave), mimi.encode(wave)))(audio)
    np.testing.assert_allclose(latents[0].T, expected["latents"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(codes[0], expected["codes"])
    both = jnp.stack([expected["codes"], expected["random_codes"]]).astype(jnp.int32)
    decoded = jax.jit(mimi.decode)(both)
    np.testing.assert_allclose(decoded[0], expected["decoded"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded[1], expected["random_decoded"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [-1, 1])
def test_context_is_the_sliding_window_to_the_step(expected, change):
    """The take is four windows long; one step more or less is seen at once."""
    config = models.read_mimi_config(FILES.config)
    assert config.sliding_window == 9
    graphdef, abstract = models.abstract_mimi(
        dataclasses.replace(config, sliding_window=config.sliding_window + change)
    )
    params, _ = load.load_params(FILES.weights, mimi_kyutai.make_table(config), abstract)
    mimi = nnx.merge(graphdef, params)
    latents = jax.jit(mimi.encode_latents)(jnp.asarray(expected["audio"])[None])
    apart = np.abs(latents[0].T - expected["latents"]).max(axis=0)
    # Two steps make a frame: up to the window both are the same, and then they are not.
    assert apart[:4].max() < 1e-4 < 1e-2 < apart[4:].max()


NEW_SPELLINGS = {
    "self_attn.in_proj_weight": "self_attn.in_projs.0.weight",
    "self_attn.out_proj.weight": "self_attn.out_projs.0.weight",
}
OLD_SPELLINGS = {
    "self_attn.in_proj_weight": "self_attn.in_proj.weight",
    "_codebook.embedding_sum": "_codebook.embed_sum",
    "_codebook.cluster_usage": "_codebook.cluster_size",
    "_codebook._initialized": "_codebook.inited",
}


@pytest.mark.parametrize("spellings", [{}, NEW_SPELLINGS, OLD_SPELLINGS])
def test_every_spelling_comes_back_as_it_was(tmp_path, mimi, spellings):
    """Whole files, of state dicts of newer and names of older releases too."""
    tensors = {}
    for name, array in safetensors.numpy.load_file(FILES.weights).items():
        for published, other in spellings.items():
            name = name.replace(published, other)
        tensors[name] = array
    path = tmp_path / "in.safetensors"
    safetensors.numpy.save_file(tensors, path)
    loaded, config, source = models.load_mimi(MimiFiles(path, FILES.config))
    params = nnx.split(loaded)[1]
    load.export_params(params, mimi_kyutai.make_table(config), tmp_path / "out.safetensors", source)
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()
    np.testing.assert_array_equal(
        loaded.encoder_transformer.layers[1].attention.k_proj.weight[...],
        mimi.encoder_transformer.layers[1].attention.k_proj.weight[...],
    )


def test_hugging_face_to_kyutai_and_back_is_the_same_file(tmp_path, checkpoint_folder):
    folder = checkpoint_folder("mimi-b")
    config = load_mimi_config(folder)
    tables = {"hf": mimi_hf.make_table(config), "kyutai": mimi_kyutai.make_table(config)}
    _, abstract = models.abstract_mimi(config)
    params, source = load.load_params(folder, tables["hf"], abstract)
    load.export_params(params, tables["kyutai"], tmp_path / "k.safetensors", source)
    names = safetensors.numpy.load_file(tmp_path / "k.safetensors").keys()
    assert "encoder_transformer.transformer.layers.0.self_attn.in_proj_weight" in names
    assert models.mimi_layout(tmp_path / "k.safetensors") == mimi_kyutai.LAYOUT
    back, _ = load.load_params(tmp_path / "k.safetensors", tables["kyutai"], abstract)
    load.export_params(back, tables["hf"], tmp_path / "h.safetensors", source)
    assert (tmp_path / "h.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.data())
def test_fused_attention_inverts(groups, kv_heads, half, width, data):
    transform = mimi_kyutai.FusedAttention(groups * kv_heads, kv_heads, 2 * half)
    rows = (groups + 2) * kv_heads * 2 * half
    fused = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    parts = transform.to_ours([fused])
    assert [part.shape for part in parts] == transform.shapes_to_ours([fused.shape])
    assert transform.shapes_to_published([part.shape for part in parts]) == [fused.shape]
    np.testing.assert_array_equal(transform.to_published(parts)[0], fused)
    # Row 2j of a head is the real part of pair j, row 2j + 1 the imaginary one.
    head, pair = data.draw(st.integers(0, kv_heads - 1)), data.draw(st.integers(0, half - 1))
    key = fused[groups * kv_heads * 2 * half :][head * 2 * half :]
    np.testing.assert_array_equal(parts[1][head * 2 * half + pair], key[2 * pair])
    np.testing.assert_array_equal(parts[1][head * 2 * half + half + pair], key[2 * pair + 1])


def test_fused_attention_refuses_rows_of_other_heads():
    transform = mimi_kyutai.FusedAttention(4, 2, 8)
    with pytest.raises(ValueError, match="4 query and 2 key-value heads of width 8 take 64 rows"):
        transform.shapes_to_ours([(96, 32)])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_transposed_kernels_are_in_the_order_of_their_module(stride, taps, inputs, outputs):
    transform = mimi_layout.TransposedKernel(stride)
    kernel = np.arange(inputs * outputs * taps * stride, dtype=np.float32)
    kernel = kernel.reshape(inputs, outputs, taps * stride)
    (ours,) = transform.to_ours([kernel])
    np.testing.assert_array_equal(ours, from_published_transpose(kernel, stride))
    np.testing.assert_array_equal(to_published_transpose(ours), kernel)
    np.testing.assert_array_equal(transform.to_published([ours])[0], kernel)
    assert transform.shapes_to_ours([kernel.shape]) == [ours.shape]
    assert transform.shapes_to_published([ours.shape]) == [kernel.shape]


def test_transposed_kernels_of_another_stride_are_refused():
    with pytest.raises(ValueError, match=r"is \[3, 2, 7\], no kernel of stride 4"):
        mimi_layout.TransposedKernel(4).shapes_to_ours([(3, 2, 7)])
    with pytest.raises(ValueError, match="no transposed kernel of four axes"):
        mimi_layout.TransposedKernel(4).shapes_to_published([(3, 2, 7)])


def test_kyutai_config_is_read_and_written():
    raw = json.loads((GOLDEN / "mimi_config.json").read_text())
    config = mimi_kyutai.config_from_kyutai(raw)
    assert (config.hidden_size, config.upsampling_ratios) == (16, (4, 3, 2, 2))
    assert (config.num_quantizers, config.codebook_size) == (5, 16)
    assert config.samples_per_frame == 96 and config.frames_per_second == 250
    written = mimi_kyutai.config_to_kyutai(config)
    assert mimi_kyutai.config_from_kyutai(json.loads(json.dumps(written))) == config
    # Nothing the original says is lost or changed.
    for section, values in raw.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            got = written[section][key] if key else written[section]
            assert got == value, (section, key)


def test_published_config_is_the_default():
    """Kyutai publishes the codec without a config; its loader has these values built in."""
    config = models.read_mimi_config(None)
    written = mimi_kyutai.config_to_kyutai(config)
    assert written["seanet"]["n_filters"] == 64 and written["transformer"]["context"] == 250
    assert written["quantizer"]["bins"] == 2048 and written["frame_rate"] == 12.5
    again = mimi_kyutai.config_from_kyutai(written)
    fields = ("hidden_size", "num_quantizers", "sliding_window")
    assert [getattr(again, name) for name in fields] == [512, 32, 250]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("seanet", "activation", "GELU", "seanet.activation: only 'ELU' is supported, got 'GELU'"),
        ("transformer", "causal", False, "transformer.causal: only True"),
        ("transformer", "bananas", 1, "unknown key 'transformer.bananas'"),
        ("transformer", "context", None, "missing field 'transformer.context'"),
        ("transformer", "d_model", 32, "transformer.d_model: must equal seanet.dimension 16"),
        ("transformer", "num_heads", 3, "hidden_size: 16 is not divisible"),
        ("quantizer", "n_q", None, "missing field 'quantizer.n_q'"),
        ("", "seanet", None, "missing section 'seanet'"),
        ("", "sample_rate", None, "missing field 'sample_rate'"),
    ],
)
def test_kyutai_config_mistakes_are_named(section, key, value, message):
    raw = json.loads((GOLDEN / "mimi_config.json").read_text())
    part = raw[section] if section else raw
    if value is None:
        del part[key]
    else:
        part[key] = value
    with pytest.raises(ConfigError, match=message):
        mimi_kyutai.config_from_kyutai(raw)


@pytest.mark.parametrize("change", [{"norm_eps": 1e-6}, {"upsample_groups": 16}, {"head_dim": 32}])
def test_what_kyutais_layout_cannot_say_is_refused(change):
    (field,) = change
    with pytest.raises(ConfigError, match=f"{field}: Kyutai's layout knows only"):
        mimi_kyutai.config_to_kyutai(dataclasses.replace(MimiConfig(), **change))


def test_layout_is_told_from_the_names(tmp_path, checkpoint_folder):
    assert models.mimi_layout(GOLDEN) == mimi_kyutai.LAYOUT
    assert models.mimi_layout(checkpoint_folder("mimi-b")) == mimi_hf.LAYOUT
    with pytest.raises(CheckpointError, match="holds a Dia2 model; name the weights of kyutai"):
        models.mimi_layout(checkpoint_folder("dia2-b", name="other"))
    safetensors.numpy.save_file({"x": np.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds neither layout of Mimi"):
        models.mimi_layout(tmp_path / "x.safetensors")
