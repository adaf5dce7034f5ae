"""LoRA files: every loader applies the strength of the training, and files that do not match are refused."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests import comfyui_reader
from tests.conftest import LFS_POINTER, arguments
from utils.checkpoint.adapters import add_loras, start_from
from utils.checkpoint.finetuned import find_transformer, trained_positions
from utils.checkpoint.lora_files import lora_paths, save_lora
from utils.checkpoint.lora_reader import WEIGHTS_FILE, read_lora
from utils.commands import export
from utils.common.errors import CheckReport, UserError
from utils.config.args import parse_args
from utils.model import loading
from utils.model.conditioning import predict_velocity
from utils.model.spec import read_spec
from utils.run.checks import check_init_lora
from utils.run.preflight import BaseModel, check_initial_lora, fill_in_defaults
from utils.training.trainable import lora_config, make_trainable

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# With these, every linear layer has adapters: feed-forward, modulation, time and ofs embeddings, text, output.
ALL_LINEAR = [*ATTENTION, "net.0.proj", "net.2", "linear", "linear_1", "linear_2", "text_proj", "proj_out"]


@pytest.fixture
def trained(tiny, data, tmp_path):
    """Returns a function: (variant, alpha, options) -> base folder, spec, transformer with adapters, LoRA folder."""

    def train(variant: str, alpha: float, *options: object):
        model_dir = tiny(variant)
        spec = read_spec(model_dir)
        argv = arguments(model_dir, data, tmp_path, "--rank", 8, "--lora_alpha", alpha, *options, task=spec.task)
        args = fill_in_defaults(parse_args(argv), spec)
        transformer = loading.load_transformer(model_dir / "transformer", torch.float32)
        make_trainable(transformer, args)
        with torch.no_grad():
            for name, weight in transformer.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(std=0.5)
        folder = tmp_path / "lora"
        folder.mkdir()
        paths = lora_paths(folder, args.checkpoint.lora_format, "run-checkpoint-1")
        save_lora(get_peft_model_state_dict(transformer), lora_config(args), paths, {})
        return model_dir, spec, transformer.eval(), folder

    return train


def predict(transformer, spec) -> torch.Tensor:
    """Returns the prediction for a fixed latent, timestep and prompt."""
    generator = torch.Generator().manual_seed(0)
    frames = 3 + spec.frames_to_pad(3)
    noisy, image = torch.randn(2, 1, frames, 16, 8, 8, generator=generator)
    prompt = torch.randn(1, spec.max_text_seq_length, 32, generator=generator)
    with torch.no_grad():
        image = image if spec.task == "i2v" else None
        return predict_velocity(transformer, spec, noisy, torch.tensor([500]), prompt, image, torch.float32)


def load_lora(transformer, path, *scales: float) -> list[str]:
    """Adds one LoRA, or the same several times; returns the notes."""
    scales = scales or (1.0,)
    loras = [read_lora(path, "--lora_path", dict(transformer.config)) for _ in scales]
    add_loras(transformer, loras, scales)
    return loras[0].notes


def load_base(model_dir):
    return loading.load_transformer(model_dir / "transformer", torch.float32)


@pytest.mark.parametrize(("variant", "alpha"), [("2b", 3), ("5b", 24), ("1.5-i2v", 4)])
@pytest.mark.parametrize("metadata", [True, False])
def test_pipeline_applies_the_trained_strength(trained, variant, alpha, metadata):
    """Without metadata, a loader assumes alpha = rank, as older diffusers versions and ComfyUI do."""
    model_dir, spec, transformer, folder = trained(variant, alpha)
    if not metadata:
        save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    pipeline = loading.PIPELINES[spec.task].from_pretrained(model_dir)
    base = predict(pipeline.transformer, spec)
    pipeline.load_lora_weights(folder)
    in_training, loaded = predict(transformer, spec), predict(pipeline.transformer, spec)
    assert (in_training - base).abs().max() > 0.1
    torch.testing.assert_close(loaded, in_training, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [("2b", ATTENTION), ("5b-i2v", ALL_LINEAR), ("1.5-i2v", [*ALL_LINEAR, "proj"])],
)
def test_comfyui_file_gives_the_trained_output(trained, variant, targets):
    options = ["--target_modules", *targets, "--lora_format", "both"]
    model_dir, spec, transformer, folder = trained(variant, 4, *options)
    expected = predict(transformer, spec)
    comfyui = folder / "run-checkpoint-1-comfyui.safetensors"
    base = load_base(model_dir)
    num_linear = sum(isinstance(module, torch.nn.Linear) for module in base.modules())
    assert comfyui_reader.apply_lora(base, comfyui) == (num_linear if targets != ATTENTION else 8)
    torch.testing.assert_close(predict(base, spec), expected, rtol=1e-4, atol=1e-4)
    for path in (folder, comfyui):  # our demo reads both, without a note on the strength
        base = load_base(model_dir)
        assert not load_lora(base, path)
        torch.testing.assert_close(predict(base, spec), expected, rtol=1e-4, atol=1e-4)


def in_format(state: dict, layer: str, suffixes: tuple[str, str], alpha: float | None) -> dict:
    """Renames adapters.

    Args:
        layer: a name with {} for the layer; {_} for the layer with underscores, {old} for old diffusers' name.
        suffixes: of A and B.
        alpha: value of the alpha tensor of each layer; None for no such tensors.
    """
    renamed = {}
    for name, weight in state.items():
        module, _, matrix = name.partition(".lora_")
        old = module.replace("attn1.", "attn1.processor.").replace("to_out.0", "to_out")
        prefix = layer.replace("{_}", module.replace(".", "_")).replace("{old}", old).replace("{}", module)
        renamed[prefix + suffixes["AB".index(matrix[0])]] = weight.contiguous()
        if alpha is not None:
            renamed[f"{prefix}.alpha"] = torch.tensor(alpha)
    return renamed


# suffixes of A and B
KOHYA = (".lora_down.weight", ".lora_up.weight")
OLD = (".lora.down.weight", ".lora.up.weight")
OLDER = ("_lora.down.weight", "_lora.up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
PEFT_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")


@pytest.mark.parametrize(
    ("layer", "suffixes", "alpha"),
    [
        ("transformer.{}", PEFT, None),
        ("transformer.{}", PEFT, 4.0),
        ("transformer.{}", OLD, 4.0),
        ("{old}", OLDER, None),
        ("transformer.{old}", OLDER, None),
        ("lora_unet_{_}", KOHYA, 4.0),
        ("lora_unet__{_}", KOHYA, 16.0),
        ("lora_transformer_{_}", KOHYA, 4.0),
        ("transformer.{}", KOHYA, None),
        ("base_model.model.{}", PEFT, None),
        ("base_model.model.{}", PEFT_DEFAULT, None),
        ("{}", PEFT, None),
        ("diffusion_model.{}", PEFT, None),
    ],
)
def test_files_of_other_tools_have_their_strength(trained, tmp_path, layer, suffixes, alpha):
    """The expected output is that of W + alpha / rank B A, computed here; without alpha, of W + B A."""
    model_dir, spec, transformer, _ = trained("5b", 8)
    state = get_peft_model_state_dict(transformer)
    save_file(in_format(state, layer, suffixes, alpha), tmp_path / "x.safetensors")
    expected, actual = load_base(model_dir), load_base(model_dir)
    for name in {name.partition(".lora_")[0] for name in state}:
        change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        expected.get_submodule(name).weight.data.add_(change * (1 if alpha is None else alpha / 8))
    notes = load_lora(actual, tmp_path / "x.safetensors")
    torch.testing.assert_close(predict(actual, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)
    assert ["scale 1, as if alpha were the rank, 8" in note for note in notes] == [True] * (alpha is None)


def test_files_of_sat_have_their_strength(trained, tmp_path):
    """SAT fuses q, k and v, and scales by alpha / rank with alpha = 1. Its checkpoints hold the frozen base too."""
    model_dir, spec, transformer, _ = trained("5b", 8)
    state, module = get_peft_model_state_dict(transformer), {}
    parts = {"to_q": ("query_key_value", 0), "to_k": ("query_key_value", 1), "to_v": ("query_key_value", 2)}
    parts["to_out.0"] = ("dense", 0)
    expected, actual = load_base(model_dir), load_base(model_dir)
    for block in range(2):
        prefix = f"model.diffusion_model.transformer.layers.{block}.attention."
        module[f"{prefix}query_key_value.original.weight"] = torch.ones(192, 64)
        for target, (fused, part) in parts.items():
            name = f"transformer_blocks.{block}.attn1.{target}"
            a, b = (state[f"{name}.lora_{matrix}.weight"] for matrix in "AB")
            module |= {f"{prefix}{fused}.matrix_A.{part}": a, f"{prefix}{fused}.matrix_B.{part}": b}
            expected.get_submodule(name).weight.data.add_(b @ a / 8)
    random_state = ("MT19937", torch.zeros(2).numpy().astype("uint32"), 1)
    torch.save(
        {"module": module, "np_rng_state": random_state, "iteration": 1}, tmp_path / "mp_rank_00_model_states.pt"
    )
    rename_in_zip(tmp_path / "mp_rank_00_model_states.pt", b"numpy._core.multiarray", b"numpy.core.multiarray")
    notes = load_lora(actual, tmp_path / "mp_rank_00_model_states.pt")
    torch.testing.assert_close(predict(actual, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)
    assert "alpha = 1, is used: scale 1/8" in notes[0]


def rename_in_zip(path: Path, old: bytes, new: bytes) -> None:
    """Replaces text in the files of a zip archive, as if an old version had written it."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in content for content in contents.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content.replace(old, new))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_peft_may_differ_by_layer(tiny, tmp_path, rslora):
    spec = read_spec(tiny("5b"))
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "ff.net.2", "proj_out"],
        rank_pattern={"to_k": 2, "ff.net.2": 8},
        alpha_pattern={"to_k": 16, "0.attn1.to_q": 1},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(load_base(tiny("5b")), config)
    model.save_pretrained(tmp_path)
    actual = load_base(tiny("5b"))
    assert not load_lora(actual, tmp_path)  # the folder of peft
    torch.testing.assert_close(predict(actual, spec), predict(model, spec), rtol=1e-4, atol=1e-4)

    convert(tmp_path / "adapter_model.safetensors", "--output_path", tmp_path / "d.safetensors")
    pipeline = loading.PIPELINES["t2v"].from_pretrained(tiny("5b"))
    pipeline.load_lora_weights(tmp_path, weight_name="d.safetensors")
    torch.testing.assert_close(predict(pipeline.transformer, spec), predict(model, spec), rtol=1e-4, atol=1e-4)


def convert(checkpoint: Path | None, *options: object) -> None:
    """Runs the export command in this process."""
    flags = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["export", *flags, *map(str, options)])
        export.main()


def test_scales_of_several_loras_add_up(trained):
    model_dir, spec, transformer, folder = trained("5b", 4)

    def at_scales(*scales):
        base = load_base(model_dir)
        load_lora(base, folder, *scales)
        return predict(base, spec)

    torch.testing.assert_close(at_scales(1.0), predict(transformer, spec), rtol=0, atol=1e-5)
    torch.testing.assert_close(at_scales(0.0), predict(load_base(model_dir), spec), rtol=0, atol=1e-6)
    torch.testing.assert_close(at_scales(0.75, -0.25), at_scales(0.5), rtol=0, atol=1e-5)
    assert (at_scales(0.5) - at_scales(1.0)).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-i2v"])
def test_merged_transformer_gives_the_output_of_the_adapters(trained, tmp_path, variant):
    """In both formats. ComfyUI needs the position table of 2b and must not see that of 5b-I2V."""
    model_dir, spec, _, folder = trained(variant, 4)
    expected = load_base(model_dir)
    load_lora(expected, folder, 0.5, 0.25)
    merge = ["--merge_lora", folder, folder, "--lora_scale", 0.5, 0.25, "--model_path", model_dir, "--dtype", "fp32"]
    convert(None, *merge, "--output_path", tmp_path / "merged" / "transformer")
    merged = loading.load_transformer(find_transformer(tmp_path / "merged"))
    torch.testing.assert_close(predict(merged, spec), predict(expected, spec), rtol=1e-4, atol=1e-4)

    convert(None, *merge, "--format", "comfyui", "--output_path", tmp_path / "x.safetensors")
    convert(tmp_path / "merged", "--format", "comfyui", "--dtype", "fp32")
    with pytest.raises(UserError, match="already exists"):
        convert(tmp_path / "merged", "--format", "comfyui", "--dtype", "fp32")
    [file] = (tmp_path / "merged").glob("*-merged-comfyui.safetensors")
    assert file.read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    assert ("patch_embed.pos_embedding" in load_file(file)) == (variant == "2b")
    in_comfyui = comfyui_reader.load_transformer(file, dict(merged.config))
    if variant == "5b-i2v":
        in_comfyui.patch_embed.pos_embedding.copy_(merged.patch_embed.pos_embedding)
    assert torch.equal(predict(in_comfyui, spec), predict(merged, spec))


@pytest.mark.parametrize("choice", ["drop", "interpolate"])
def test_merged_transformer_keeps_the_positions_of_the_lora(trained, tmp_path, choice):
    model_dir, spec, _, folder = trained("5b-i2v", 4)
    shutil.copytree(folder, tmp_path / "other")
    for path in (folder / WEIGHTS_FILE, tmp_path / "other" / WEIGHTS_FILE):
        stated = choice if path.parent == folder else "keep"
        save_file(load_file(path), path, metadata={"learned_positions": stated})
    merge = ["--merge_lora", folder, "--model_path", model_dir, "--dtype", "fp32"]
    convert(None, *merge, "--output_path", tmp_path / "merged" / "transformer")
    stated, _ = trained_positions(tmp_path / "merged", [], spec)
    assert stated == choice and trained_positions(None, [folder], spec)[0] == choice
    merged = loading.load_transformer(tmp_path / "merged" / "transformer")
    assert ("patch_embed.pos_embedding" in merged.state_dict()) == (choice == "interpolate")
    merge.insert(2, tmp_path / "other")
    with pytest.raises(UserError, match="treat learned positions differently"):
        convert(None, *merge, "--output_path", tmp_path / "new")

    argv = arguments(model_dir, tmp_path, tmp_path, "--init_lora", folder, task="i2v")
    args = fill_in_defaults(parse_args(argv), spec)
    with pytest.raises(UserError, match=f"--learned_positions is keep, but .* was trained with {choice}; give"):
        check_init_lora(args, spec)


@pytest.mark.parametrize("alpha", [8, 2])
def test_run_starts_from_a_lora_at_its_stored_strength(trained, data, tmp_path, alpha):
    model_dir, spec, transformer, folder = trained("5b", 4)
    argv = arguments(model_dir, data, tmp_path, "--rank", 8, "--lora_alpha", alpha, "--init_lora", folder)
    args = fill_in_defaults(parse_args(argv), spec)
    assert "start from" in check_init_lora(args, spec)[-1]
    new = load_base(model_dir)
    make_trainable(new, args)
    start_from(new, read_lora(folder, "--init_lora"), args)
    torch.testing.assert_close(predict(new.eval(), spec), predict(transformer, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 4], r"--rank is 4, but --init_lora \S+ has rank 8; give --rank 8"),
        (
            ["--target_modules", "to_q", "to_k"],
            r"selects 4 layers, and --init_lora \S+ has adapters of 8; transformer_",
        ),
        (["--init_lora", "/nowhere"], "--init_lora /nowhere: there is no such file or folder"),
        (["--model_path", "{other}"], "--init_lora .*: 8 of 8 adapters do not fit this transformer"),
    ],
)
def test_lora_that_does_not_fit_the_run_is_refused(trained, tiny, data, tmp_path, monkeypatch, options, message):
    model_dir, spec, _, folder = trained("5b", 4)
    if "--model_path" in options:
        spec.transformer["num_attention_heads"] = 2
        options = []
    args = parse_args(arguments(model_dir, data, tmp_path, "--init_lora", folder, *options))
    with pytest.raises(UserError, match=message):
        check_init_lora(args, spec)


def test_resumed_run_needs_no_lora(tiny, data, tmp_path):
    args = parse_args(arguments(tiny("5b"), data, tmp_path, "--init_lora", "/nowhere"))
    model, report = BaseModel(tiny("5b"), read_spec(tiny("5b")), {}), CheckReport()
    check_initial_lora(report, args, model, tmp_path / "checkpoint-1")
    assert not report.errors and report.notes[0].startswith("--init_lora /nowhere is not read; the run resumes from")
    check_initial_lora(report, args, model, None)
    assert report.errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "Give either --checkpoint"),
        ("--checkpoint {lora} --merge_lora {lora}", "Give either --checkpoint"),
        ("{merge}", "--merge_lora needs --model_path, the base, and --output_path"),
        ("--checkpoint {lora} --lora_scale 2", "--lora_scale is for --merge_lora"),
        ("--checkpoint {lora} --dtype bf16", "--dtype is for transformers"),
        ("--checkpoint {lora}", "pytorch_lora_weights.safetensors already exists"),
        ("--checkpoint {lora} --output_path {lora}/new", "new: the name of a .safetensors file is expected"),
        ("--checkpoint /nowhere", "is not the folder checkpoint-N of a training run"),
        ("{merge} --output_path {lora}/x.safetensors", "x.safetensors: a folder is expected"),
        ("{merge} --output_path {lora}/x --format comfyui", "x: the name of a .safetensors file is expected"),
        ("{merge} --output_path {lora}/x --lora_scale 1 2", "2 values for 1 files of --merge_lora"),
        ("{merge} --output_path /proc/x/y", "--output_path /proc/x cannot be written to"),
    ],
)
def test_wrong_exports_are_refused(trained, options, message):
    model_dir, _, _, folder = trained("5b", 4)
    options = options.format(lora=folder, merge=f"--merge_lora {folder} --model_path {model_dir}")
    with pytest.raises(UserError, match=message):
        convert(None, *options.split())


def renamed(state: dict, count: int) -> dict:
    return {name.replace("attn1", "attention") if n < count else name: w for n, (name, w) in enumerate(state.items())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: renamed(state, 99), "16 of 16 tensors fit no layer of CogVideoX: .* and others"),
        (
            lambda state: renamed(state, 1),
            r"1 of 16 tensors fit no layer of CogVideoX: \S+attention.to_k.lora_A.weight",
        ),
        (lambda state: {name: weight[:, :3] for name, weight in state.items()}, "have no common rank"),
        (
            lambda state: {name: w[:, :9] if "A." in name else w for name, w in state.items()},
            "8 of 8 adapters do not fit",
        ),
        (lambda state: {"unknown.x.lora_A.weight": torch.ones(2, 2)}, "fit no layer of CogVideoX: unknown.x"),
        (lambda state: {}, "holds no tensors"),
        (
            lambda state: state | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
            "adapters of a text encoder .text_encoder.x",
        ),
        (lambda state: {name: weight for name, weight in state.items() if "lora_A" in name}, "lacks the B of"),
        (lambda state: {name: weight * torch.nan for name, weight in state.items()}, "not finite"),
        (lambda state: state | {"diffusion_model.blocks.0.q.lora_A.weight": torch.ones(2, 2)}, "fit no layer"),
        (lambda state: state | {f"{next(iter(state))[:-14]}.alpha": torch.tensor(torch.nan)}, "not a finite number"),
    ],
)
def test_mismatched_files_are_refused(trained, change, message):
    model_dir, _, _, folder = trained("5b", 4)
    changed = change(load_file(folder / WEIGHTS_FILE))
    save_file({name: weight.contiguous() for name, weight in changed.items()}, folder / WEIGHTS_FILE)
    base = load_base(model_dir)
    with pytest.raises(UserError, match=message):
        load_lora(base, folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "a whole transformer"),
        ("blocks.0.q.weight", "a whole transformer"),
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value.weight", "a whole transformer"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "Flux or HunyuanVideo"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux or HunyuanVideo"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", "Wan"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "Wan"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight", "Stable Diffusion"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", "Stable Diffusion"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "SD3"),
        ("transformer.transformer_blocks.0.attn2.to_q.lora_A.weight", "LTX-Video"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a text encoder"),
        ("lycoris_transformer_blocks_0_attn1_to_q.lokr_w1", "LyCORIS"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.hada_w1_a", "LyCORIS"),
        ("lycoris_transformer_blocks_0_attn1_to_q.oft_blocks", "LyCORIS"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.diff", "LyCORIS"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.dora_scale", "DoRA"),
    ],
)
def test_files_of_other_models_are_named(tiny, tmp_path, name, content):
    """Given with a tensor that fits, so that the name alone decides. In a file of torch.save, it is named too."""
    base = load_base(tiny("5b"))
    state = {"transformer.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(4, 64), name: torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"module": state, "epoch": 1}, tmp_path / "x.pt")
    for file in ("x.safetensors", "x.pt"):
        with pytest.raises(UserError, match=rf"--lora_path \S+/{file} holds .*{content}.* \({name}\)"):
            load_lora(base, tmp_path / file)


@pytest.mark.parametrize(
    ("config", "content"),
    [
        (LoraConfig(target_modules=["to_q"], use_dora=True), "DoRA"),
        (LoHaConfig(target_modules=["to_q"]), "LoHa"),
        (LoKrConfig(target_modules=["to_q"]), "LoKr"),
        (OFTConfig(target_modules=["to_q"], oft_block_size=4), "OFT"),
    ],
)
def test_other_adapters_of_peft_are_named(tiny, tmp_path, config, content):
    base = load_base(tiny("5b"))
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"{content}.* \(base_model.model.transformer_blocks.0"):
        load_lora(loading.load_transformer(tiny("5b") / "transformer"), tmp_path)


def test_files_that_are_no_safetensors_are_named(tiny, tmp_path):
    base = load_base(tiny("5b"))
    (tmp_path / "old.bin").write_bytes(b"\x80\x02")
    (tmp_path / "pytorch_lora_weights.safetensors").write_text(LFS_POINTER)
    (tmp_path / "x.safetensors").write_text("<html>")
    for file, message in (
        ("old.bin", "cannot be read as safetensors"),
        ("", "is a Git LFS pointer, not the file; run `git lfs pull`"),
        ("x.safetensors", "cannot be read as safetensors"),
        ("none", "there is no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_lora(base, tmp_path / file)


def test_error_for_a_missing_file_lists_the_checkpoints(trained, tmp_path: Path):
    model_dir, _, _, folder = trained("5b", 4)
    folder.rename(tmp_path / "checkpoint-40")
    base = load_base(model_dir)
    with pytest.raises(UserError, match="it has checkpoint-40"):
        load_lora(base, tmp_path)
    (tmp_path / "step").mkdir()
    (tmp_path / "checkpoint-40").rename(tmp_path / "step" / "40")
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UserError, match=r"it has step/40, other.safetensors. Give one of these"):
        load_lora(base, tmp_path)


def test_adapters_are_float32_on_a_half_precision_base(tiny, data, tmp_path):
    args = arguments(tiny("5b"), data, tmp_path, "--mixed_precision", "bf16")
    transformer = loading.load_transformer(tiny("5b") / "transformer", torch.bfloat16)
    make_trainable(transformer, parse_args(args))
    kinds = {(".lora_" in name, p.requires_grad, p.dtype) for name, p in transformer.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}
