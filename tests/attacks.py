"""Inputs that lie, kind by kind: what is tried, and how it must end.

Each try is a command line and its exit code, with a word that the error must have; 0 means that the command is right in
spite of what lies there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

QUICK = ["--pattern", "8:16", "--criterion", "magnitude", "--mitigation", "none"]
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Try:
    """A command that must end with `code` and say `says`."""

    name: str
    command: list[Any]
    code: int
    says: str = ""


@dataclass(frozen=True)
class Place:
    """Where a try is made: an empty folder, a good checkpoint and a good OUT, both to be copied."""

    here: Path
    checkpoint: Path
    out: Path

    def model(self, name: str) -> Path:
        """Return a copy of the checkpoint."""
        return Path(shutil.copytree(self.checkpoint, self.here / name))

    def bundle(self, name: str) -> Path:
        """Return a copy of OUT."""
        return Path(shutil.copytree(self.out, self.here / name))

    def dry(self, model: Path) -> list[Any]:
        """Return the command that plans a conversion and does nothing."""
        return ["convert", model, self.here / "never", *QUICK, "--dry-run"]


@dataclass(frozen=True)
class Attack:
    """A kind of input that lies, what becomes of it, and the tries."""

    kind: str
    outcome: str
    tries: Callable[[Place], list[Try]]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def renamed(model: Path, name: Callable[[str], str]) -> Path:
    """Give every weight another name."""
    file = model / "model.safetensors"
    save_file({name(key): value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    return model


def saved(place: Place, name: str, model: Any) -> Path:
    """Save another model with the tokenizer of the checkpoint."""
    folder = place.model(name)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def family(name: str, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """Return a random model of a family."""
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(name, **(SIZES | changes)))


def heads(p: Place) -> list[Try]:
    """A decoder that was trained for something else."""
    found = []
    for name in ("qwen2", "llama", "gemma"):
        head = family(name, AutoModelForSequenceClassification, tie_word_embeddings=True, num_labels=3)
        folder = saved(p, f"{name}-head", head)
        found.append(Try(f"{name}, classification", p.dry(folder), 11, "a head for another task"))
        silent = Path(shutil.copytree(folder, p.here / f"{name}-silent"))
        edit(silent / "config.json", architectures=None)
        found.append(Try(f"{name}, its config silent", p.dry(silent), 11, "a head for another task"))
        lying = Path(shutil.copytree(folder, p.here / f"{name}-lying"))
        edit(lying / "config.json", architectures=[f"{name.capitalize()}ForCausalLM"])
        found.append(Try(f"{name}, its config lying", p.dry(lying), 11, "score.weight"))
    bare = renamed(p.model("bare"), lambda key: key.removeprefix("model."))
    edit(bare / "config.json", tie_word_embeddings=True)
    weights = load_file(bare / "model.safetensors")
    weights["score.weight"] = torch.ones(3, 64)
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    found.append(Try("a bare model's names", p.dry(bare), 11, "score.weight"))
    for name, odd in (
        ("a number", [3]),
        ("a table", {"a": 1}),
        ("a word", "LlamaForCausalLM"),
        ("long", ["X" * 99999]),
    ):
        folder = p.model(f"architectures {name}")
        edit(folder / "config.json", architectures=odd)
        found.append(Try(f"architectures of {name}", p.dry(folder), 11))
    for saved_as in ("LlamaForTokenClassification", "LlamaForQuestionAnswering", "LlamaRewardModel"):
        folder = p.model(saved_as)
        edit(folder / "config.json", architectures=[saved_as])
        found.append(Try(saved_as, p.dry(folder), 11, "a head for another task"))
    return found


def encoder_decoders(p: Place) -> list[Try]:
    """Models of two halves."""
    small = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    small |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2}
    found = []
    for name, more in (
        ("bart", small),
        ("marian", small),
        ("whisper", small | {"num_mel_bins": 8}),
        ("t5", {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}),
    ):
        model = AutoModel.from_config(AutoConfig.for_model(name, vocab_size=256, pad_token_id=0, **more))
        found.append(Try(name, p.dry(saved(p, name, model)), 11, "an encoder-decoder"))
    return found


def shapes(p: Place) -> list[Try]:
    """A config.json of other sizes than the weights."""
    found = []
    for key, value in (
        ("vocab_size", 300),
        ("hidden_size", 32),
        ("intermediate_size", 128),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 9),
        ("num_hidden_layers", 20000),
        ("head_dim", 32),
        ("hidden_size", 0),
        ("hidden_size", "many"),
        ("num_attention_heads", 7),
        ("hidden_act", "none"),
    ):
        folder = p.model(f"{key}-{value}")
        edit(folder / "config.json", **{key: value})
        found.append(Try(f"{key} {value}", p.dry(folder), 11))
    return found


def meaningless(p: Place) -> list[Try]:
    """Settings that no weight's shape depends on."""
    found = []
    for key, value in (
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 12.5),
        ("sliding_window", -4),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -math.inf}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
    ):
        folder = p.model(f"setting {len(found)}")
        edit(folder / "config.json", **{key: value})
        found.append(Try(f"{key} {value}", p.dry(folder), 11))
    tied = p.model("tied")
    edit(tied / "config.json", tie_word_embeddings=True)
    found.append(Try("tied weights that differ", p.dry(tied), 11, "ties"))
    return found


def damaged(p: Place) -> list[Try]:
    """Files of a checkpoint that are cut off, or hold something else."""
    found = []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for how, data in (
            ("empty", b""),
            ("cut", None),
            ("a list", b"[1, 2]"),
            ("deep", b"[" * 100_000),
            ("no text", b"\xff\xfe"),
            ("gone", b"gone"),
        ):
            folder = p.model(f"{name}-{how}")
            file = folder / name
            whole = file.read_bytes()
            if how == "gone":
                file.unlink()
                if name == "tokenizer_config.json":
                    continue  # a tokenizer needs none
            else:
                file.write_bytes(whole[: len(whole) // 2] if data is None else data)
            found.append(Try(f"{name} {how}", p.dry(folder), 11))
    folder = p.model("generation")
    (folder / "generation_config.json").write_text("{")
    found.append(Try("generation_config.json cut", p.dry(folder), 11, "generation_config.json"))
    for how, text in {
        "cut": "{% for",
        "asks for more": "{{ messages[9].x.y }}",
        "raises": "{{ raise_exception('no') }}",
        "leaves its box": "{{ messages.__class__.__mro__ }}",
    }.items():
        folder = p.model(f"template {how}")
        (folder / "chat_template.jinja").write_text(text)
        found.append(Try(f"chat template {how}", ["generate", folder, "a", "--max-new-tokens", 1], 11, "--no-chat"))
    for key, value in (("temperature", "x"), ("top_k", -1), ("eos_token_id", "x"), ("constraints", 3)):
        folder = p.model(f"generation {key}")
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        found.append(Try(f"generation_config {key}", ["generate", folder, "a", "--sample", "--max-new-tokens", 1], 11))
    folder = p.model("pipe")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    found.append(Try("a pipe", p.dry(folder), 11, "config.json must be a file"))
    folder = p.model("words")
    (folder / "nmsparse.json").write_text('{"left_out": ["' + "x" * 99999 + '"]}')
    found.append(Try("words put into our mouth", p.dry(folder), 0))
    folder = p.model("nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found.append(Try("a NaN", ["convert", folder, p.here / "never", *QUICK], 11, "must be finite"))
    return found


def indices(p: Place) -> list[Try]:
    """A list of shards that names what is not there."""
    found = []
    for how, names in (
        ("outside", "../other.safetensors"),
        ("absolute", "/etc/passwd"),
        ("missing", "model-00002.safetensors"),
        ("no file", 7),
    ):
        folder = p.model(f"index-{how}")
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        table = dict.fromkeys(load_file(folder / "model-00001.safetensors"), "model-00001.safetensors")
        table["model.norm.weight"] = names  # type: ignore[assignment]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        found.append(Try(how, p.dry(folder), 11, "model.safetensors.index.json"))
    for how, text in (("no table", '{"weight_map": 3}'), ("cut", '{"weight'), ("deep", "[" * 100_000)):
        folder = p.model(f"index-{how}")
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)
        found.append(Try(how, p.dry(folder), 11, "must say which file holds each tensor"))
    folder = p.model("index-not-in-shard")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    table = dict.fromkeys([*load_file(folder / "a.safetensors"), "lm_head.bias"], "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    found.append(Try("not in its shard", p.dry(folder), 11, "must hold lm_head.bias"))
    folder = p.model("other-name")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    found.append(Try("another name", p.dry(folder), 11, "Give the file of the weights that name"))
    return found


def quantised(p: Place) -> list[Try]:
    """Weights that mean nothing without their scales."""
    found = []
    for method in ("fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "unknown"):
        folder = p.model(method)
        edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_8bit": True})
        found.append(Try(method, p.dry(folder), 11, f"quantised checkpoint ({method})"))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32):
        folder = p.model(str(dtype))
        weights = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = weights[name].to(dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found.append(Try(f"{dtype}, its config silent", p.dry(folder), 11, f"{name} must be of"))
        bare = renamed(Path(shutil.copytree(folder, p.here / f"bare-{dtype}")), lambda key: key.removeprefix("model."))
        found.append(Try(f"{dtype}, under a bare model's names", p.dry(bare), 11, "must be of"))
    for part in ("weight_scale_inv", "qweight", "lora_A.weight"):
        folder = p.model(f"part-{part}")
        weights = load_file(folder / "model.safetensors")
        weights[f"model.layers.0.mlp.up_proj.{part}"] = torch.ones(2, 2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found.append(Try(f"{part} left over", p.dry(folder), 11, "part of an adapter or of a quantised weight"))
    return found


def wrapped(p: Place) -> list[Try]:
    """Names that a wrapper has left in the weights."""
    found = []
    for wrapper, name in (
        ("_orig_mod", lambda key: f"_orig_mod.{key}"),
        ("module", lambda key: f"module.{key}"),
        ("_orig_mod", lambda key: key.replace("model.", "model._orig_mod.")),
        ("_fsdp_wrapped_module", lambda key: f"_fsdp_wrapped_module.{key}"),
        ("student.", lambda key: f"student.{key}"),
    ):
        found.append(
            Try(wrapper, p.dry(renamed(p.model(f"{wrapper}-{len(found)}"), name)), 11, f"{wrapper!r}")  # type: ignore[no-untyped-call]
        )
    return found


def adapters(p: Place) -> list[Try]:
    """A LoRA, alone, beside its model, or under its model's file name."""
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    alone, beside = p.here / "alone", p.model("beside")
    alone.mkdir()
    for folder in (alone, beside):
        save_file({name: torch.ones(4, 64)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(about))
    disguised = p.model("disguised")
    save_file({name: torch.ones(4, 64)}, disguised / "model.safetensors", metadata={"format": "pt"})
    return [Try(folder.name, p.dry(folder), 11, "dapter") for folder in (alone, beside, disguised)]


def structures(p: Place) -> list[Try]:
    """Blocks that cannot be converted yet."""
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    mla = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
    mla |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    made = {
        "mixture of experts": family("mixtral", num_local_experts=4, num_experts_per_tok=2),
        "mixture of experts, too": family("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "MLA": family("deepseek_v3", **(mla | {"num_key_value_heads": 4, "moe_intermediate_size": 32})),
        "dynamic": family("llama", **dynamic),
        "state": family("mamba", state_size=8),
        "conv": family("lfm2", layer_types=["conv", "full_attention"]),
    }
    return [Try(name, p.dry(saved(p, name, model)), 13, name.split(",")[0]) for name, model in made.items()]


def code(p: Place) -> list[Try]:
    """Folders that bring Python along."""
    ran = p.here / "RAN"
    python = (
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w')\nclass X(LlamaConfig):\n  model_type = 'x'\n"
    )
    found = []
    for where in ("config", "tokenizer_config"):
        folder = p.model(f"code-{where}")
        (folder / "x.py").write_text(python)
        map_ = {"auto_map": {"AutoConfig": "x.X", "AutoTokenizer": ["x.X", None], "AutoModelForCausalLM": "x.X"}}
        changes = {"model_type": "x"} if where == "config" else {"tokenizer_class": "X"}
        edit(folder / f"{where}.json", **(changes | map_))
        found.append(Try(where, p.dry(folder), 11, "nmsparse never runs code from a checkpoint"))
    folder = p.model("code-known")  # transformers has the class itself, and the map is not looked at
    (folder / "x.py").write_text(python)
    edit(folder / "config.json", auto_map={"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X"})
    found.append(Try("of a kind that transformers has", p.dry(folder), 0))
    return found


def pickles(p: Place) -> list[Try]:
    """Weights that run code when they are read."""
    folder = p.model("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return [Try("pickle", p.dry(folder), 11, "must be safetensors, got pytorch_model.bin")]


def recipes(p: Place) -> list[Try]:
    """Recipes that blow up, or say what cannot be."""
    nines, xs = "9" * 9000, "x" * 90_000
    texts = {
        "aliases": "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nignore: *b\n",
        "deep": "[" * 5000,
        "levels": "{a: " * 20 + "1" + "}" * 20,
        "long": "# " + xs * 3,
        "a number without end": f"seed: {nines}",
        "a pattern without end": f"pattern: {nines}:{nines}",
        "a word without end": f"criterion: {xs}",
        "a key without end": f"{xs}: 1",
        "an object": "seed: !!python/object/apply:os.system [true]",
        "no table": "- 1",
        "no text": "seed: \x00",
        "twice": "seed: 1\nseed: 2",
        "a date that is none": "seed: 2026-13-45",
        "keys that are no words": "{1: 2, ~: 3}",
        "infinity": "training: {learning_rate: .inf}",
        "not a number": "training: {learning_rate: .nan}",
        "minus": "seed: -1",
        "a list in a list": "mitigation: [[var]]",
        "nothing to keep": "pattern: 0:4",
        "more tokens than there are": "calibration: {tokens: 999999999999999999999}",
    }
    found = []
    for name, text in texts.items():
        file = p.here / f"{name}.yaml"
        file.write_text(text)
        command = ["convert", p.checkpoint, p.here / "never", "--dry-run", "--recipe", file]
        found.append(Try(name, command, 10))
    (p.here / "bytes.yaml").write_bytes(b"\xff\xfe")
    found.append(Try("bytes", ["convert", p.checkpoint, p.here / "never", "--recipe", p.here / "bytes.yaml"], 10))
    for value in ("pattern=" + xs, "[" * 9000 + "=1", "a=" + "[" * 9000, "seed=*a", "pattern", "=1", "a.b.c=1"):
        command = ["convert", p.checkpoint, p.here / "never", "--dry-run", "--set", value]
        found.append(Try(f"--set {value[:12]}", command, 10))
    return found


def manifests(p: Place) -> list[Try]:
    """A manifest.json that names other files than those of OUT, or none."""
    found = []
    victim = p.here / "victim.txt"
    victim.write_text("secret")
    good = json.loads((p.out / "manifest.json").read_text())
    entry = {"bytes": 6, "sha256": "0" * 64}
    for name, files in (
        ("no files", None),
        ("an empty list", {}),
        ("a list", [1]),
        ("outside", good["files"] | {"../victim.txt": entry}),
        ("absolute", good["files"] | {str(victim): entry}),
        ("itself", good["files"] | {"manifest.json": entry}),
        ("a dot", good["files"] | {"./config.json": entry}),
        ("a NUL", good["files"] | {"a\0b": entry}),
        ("no hash", good["files"] | {"config.json": {"bytes": 1}}),
        ("no size", good["files"] | {"config.json": {"sha256": "0" * 64}}),
        ("a file that is not there", good["files"] | {"other.json": entry}),
    ):
        out = p.bundle(f"manifest {name}")
        edit(out / "manifest.json", files=files)
        found += [
            Try(f"{name}, {use[0]}", use, 15)
            for use in (["generate", out, "a"], ["inspect", out], ["report", out], ["export", out, p.here / "never"])
        ]
    for name in ("config.json", "model.onnx.data"):
        out = p.bundle(f"link {name}")
        shutil.copy(out / name, p.here / f"other {name}")
        (out / name).unlink()
        (out / name).symlink_to(p.here / f"other {name}")
        found.append(Try(f"a link, {name}", ["generate", out, "a"], 15, "got a link"))
    out = p.here / "folder link"
    shutil.copytree(p.out, p.here / "real")
    out.symlink_to(p.here / "real")
    found.append(Try("the folder itself a link", ["inspect", out], 0))
    for name in ("chat_template.jinja", "modeling.py", "adapter_config.json", "libx.so", "templates/a.jinja", "x.bin"):
        out = p.bundle(f"added {name.replace('/', ' ')}")
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        found.append(Try(f"added, {name}", ["generate", out, "a"], 15, "a file that it does not name"))
    for name, data in {
        "model.onnx": b"\xff" * 100,
        "report.json": b"[]",
        "genai_config.json": b"3",
        "tokenizer.json": b"{}",
        "config.json": b"[]",
        "generation_config.json": b"3",
    }.items():
        out = p.bundle(f"lies {name}")
        (out / name).write_bytes(data)
        about = json.loads((out / "manifest.json").read_text())
        about["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (out / "manifest.json").write_text(json.dumps(about))
        use = {"model.onnx": "inspect", "report.json": "report", "genai_config.json": "bench"}.get(name, "validate")
        code = {"tokenizer.json": 11, "config.json": 11, "generation_config.json": 11}.get(name, 15)
        found.append(Try(f"{name} of other contents", [use, out], code))
    for name, source in (("no source", None), ("a source of numbers", {"name": 1})):
        out = p.bundle(name)
        edit(out / "manifest.json", source=source)
        found.append(Try(name, ["validate", out], 15, "what it was made from"))
    out = p.bundle("pipe")
    (out / "manifest.json").unlink()
    os.mkfifo(out / "manifest.json")
    found.append(Try("a pipe", ["inspect", out], 15))
    for name, text in (("deep", "[" * 100_000), ("a list", "[]"), ("another format", '{"format": "other"}')):
        out = p.bundle(f"text {name}")
        (out / "manifest.json").write_text(text)
        found.append(Try(name, ["inspect", out], 15))
    return found


def arguments(p: Place) -> list[Try]:
    """Numbers and texts that mean nothing."""
    text = p.here / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    found = []
    for model in (p.checkpoint, p.out):
        for name, command in {
            "an empty prompt": ["generate", model, ""],
            "no new tokens": ["generate", model, "a", "--max-new-tokens", 0],
            "fewer than none": ["generate", model, "a", "--max-new-tokens", -1],
            "more tokens than positions": ["generate", model, "a", "--max-new-tokens", 4000],
            "a prompt beyond the positions": ["generate", model, "the fox " * 300],
            "a seed below 0": ["generate", model, "a", "--seed", -1],
            "context 0": ["perplexity", model, "--text", text, "--context", 0],
            "context 1": ["perplexity", model, "--text", text, "--context", 1],
            "context beyond the positions": ["perplexity", model, "--text", text, "--context", 4096],
            "tokens below the context": ["perplexity", model, "--text", text, "--context", 64, "--tokens", 60],
            "tokens below 0": ["perplexity", model, "--text", text, "--tokens", -1],
            "no number": ["perplexity", model, "--context", "many"],
        }.items():
            found.append(Try(f"{name}, {model.name}", command, 2))
    found.append(Try("an option of another runtime", ["validate", p.out, "--plugin", text], 2))
    found.append(Try("an option of another use", ["bench", p.out, "--plugin", text], 2))
    for odd in ("inf", "nan", "-1", "0"):
        found.append(Try(f"{odd} seconds", ["bench", p.out, f"--seconds={odd}"], 2))
        found.append(Try(f"a recovery of {odd}", ["evaluate", p.out, f"--min-recovery={odd}"], 2))
    found.append(Try("an unknown command", ["compile", p.out], 2))
    found.append(Try("no argument", ["generate"], 2))
    found.append(Try("an unknown option", ["generate", p.out, "a", "--colour", "red"], 2))
    foreign = p.model("foreign")
    edit(foreign / "config.json", vocab_size=8)
    weights = load_file(foreign / "model.safetensors")
    weights = {key: value[:8] if value.shape[0] == 256 else value for key, value in weights.items()}
    save_file(weights, foreign / "model.safetensors", metadata={"format": "pt"})
    found.append(Try("ids beyond the embedding", ["generate", foreign, "the quick"], 11, "ids must be below 8"))
    found.append(
        Try(
            "ids beyond the embedding, too", ["perplexity", foreign, "--text", text, "--context", 32], 11, "ids must be"
        )
    )
    return found


def overflows(p: Place) -> list[Try]:
    """Models whose numbers end in infinity."""
    found = []
    text = p.here / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    for name, size in (("model.norm.weight", 1e38), ("lm_head.weight", 1e38), ("model.norm.weight", 1e30)):
        folder = p.model(f"{name} {size}")
        weights = load_file(folder / "model.safetensors")
        weights[name] = torch.full_like(weights[name], size)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        command = ["perplexity", folder, "--text", text, "--context", 32, "--tokens", 64]
        found.append(Try(f"perplexity, {name} {size}", command, 18, "perplexity: must be finite"))
    return found


def texts(p: Place) -> list[Try]:
    """Texts that are none."""
    found = []
    for name, data, command in (
        ("absent.txt", None, "calibrate"),
        ("binary.txt", b"\xff\xfe\x00", "perplexity"),
        ("short.txt", b"a", "perplexity"),
        ("cut.jsonl", b'{"text": "a', "perplexity"),
        ("deep.jsonl", b"[" * 100_000, "perplexity"),
        ("rows.jsonl", b"[1]\n", "perplexity"),
        ("surrogate.jsonl", b'{"text": "\\ud800 abc"}\n', "perplexity"),
        ("keys.jsonl", b'{"' + b"x" * 99999 + b'": "a"}\n', "perplexity"),
        ("cut.parquet", b"PAR1", "perplexity"),
        ("folder", b"folder", "perplexity"),
    ):
        file = p.here / name
        if data == b"folder":
            file.mkdir()
        elif data is not None:
            file.write_bytes(data)
        options = {
            "calibrate": [p.here / "never", "--calibration", file],
            "perplexity": ["--text", file, "--context", 64],
        }
        found.append(Try(name, [command, p.checkpoint, *options[command]], 12))
    return found


def places(p: Place) -> list[Try]:
    """An OUT that is somebody else's."""
    taken, file = p.here / "taken", p.here / "file"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    file.write_text("mine")
    (p.here / "loop").symlink_to(p.here / "loop")
    found = []
    for out in (taken, file, file / "inside", p.here / "loop", Path("/proc/nothing")):
        found.append(Try(str(out.name), ["calibrate", p.checkpoint, out, *QUICK], 15))
    return found


ATTACKS = (
    Attack("decoder with a head for another task", "refused, 11", heads),
    Attack("encoder-decoder", "refused by its name, 11", encoder_decoders),
    Attack("config.json of other sizes than the weights, or none", "refused, 11", shapes),
    Attack("config.json whose settings mean nothing, or are not the weights'", "refused, 11", meaningless),
    Attack("damaged file of a checkpoint", "refused, 11", damaged),
    Attack("index of shards that lies", "refused, 11", indices),
    Attack("quantised weights", "refused, 11", quantised),
    Attack("names of a wrapper in the weights", "refused by its name, 11", wrapped),
    Attack("adapter alone, beside its model, or in its place", "refused, 11", adapters),
    Attack("blocks that cannot be converted yet", "refused before calibration, 13", structures),
    Attack("Python in a checkpoint", "never run; refused where it would be needed, 11", code),
    Attack("pickle", "refused, 11", pickles),
    Attack("recipe that blows up", "refused in a line, 10", recipes),
    Attack("manifest, links and files that were added to OUT", "refused by every command, 15", manifests),
    Attack("arguments that mean nothing", "refused, 2; ids of another tokenizer, 11", arguments),
    Attack("model whose numbers end in infinity", "its perplexity is no number, 18", overflows),
    Attack("text that is none", "refused, 12", texts),
    Attack("OUT that is somebody else's", "refused, left as it was, 15", places),
)
