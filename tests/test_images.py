"""Models of images: a classifier trained here to a real accuracy, families, a real DINOv2, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
from conftest import PLAIN, from_make
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits, load_sample_images
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTImageProcessorPil

from converter import convert, load
from converter.checkpoint import open_checkpoint
from converter.delivery import report as pages
from converter.errors import CalibrationError, CheckpointError, EvaluationError
from converter.evaluation.classify import labelled
from converter.pipeline import load_with_processor
from converter.sources.images import drawn, images

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 10,
}
TRAIN = 1400  # of the 1797 digits; the others are for the test


def save_images(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    for number, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((16, 16), Image.Resampling.NEAREST).save(folder / str(label) / f"{number}.png")


def save_processor(folder: Path) -> None:
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that people wrote, as images in a folder for each, and a ViT that was trained to tell them."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))  # the last ones were written by other people
    pixels, labels = (found.images[order] * 255 / 16).astype(np.uint8), found.target[order]
    save_images(folder / "train", pixels[:TRAIN], labels[:TRAIN])
    save_images(folder / "test", pixels[TRAIN:], labels[TRAIN:])
    torch.manual_seed(0)
    config = AutoConfig.for_model("vit", hidden_dropout_prob=0.1, **TINY)
    model = AutoModelForImageClassification.from_config(config).train()
    x = torch.tensor(pixels[:TRAIN] / 127.5 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    x = torch.nn.functional.interpolate(x, (16, 16))
    y = torch.tensor(labels[:TRAIN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=40 * TRAIN // 50)
    for _ in range(40):
        for batch in torch.randperm(TRAIN).split(50):
            loss = model(pixel_values=x[batch], labels=y[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.save_pretrained(folder / "model")
    save_processor(folder / "model")
    return folder


def test_a_classifier_is_fitted_and_keeps_its_accuracy(
    nmsparse: Command, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    options = ["--calibration", digits / "train", "--calibration-tokens", "16384", "--pattern", "4:16"]
    for setting in (
        "training.tokens=81920",
        "training.steps=160",
        "training.held_out=32",
        "training.batch=8",
        "training.learning_rate=5e-4",
    ):
        options += ["--set", setting]
    found = nmsparse("convert", digits / "model", tmp_path / "out", *options)
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["parity"]["passed"]
    assert report["parity"]["tokens"] == 2 * 17  # of two images, the sixteen patches and the one for all
    assert min(loss for _, loss in report["training"][1:]) < report["training"][0][1]
    assert nmsparse("validate", tmp_path / "out").returncode == 0
    plain = convert(
        str(digits / "model"),
        tmp_path / "plain",
        PLAIN.replace({"pattern": "4:16", "calibration.source": str(digits / "train")}),
    )
    accuracies = {}
    for out in (tmp_path / "out", plain):
        found = nmsparse("evaluate", out, "--images", digits / "test", "--json")
        assert found.returncode == 0, found.stderr
        accuracies[out.name] = {one["metric"]: one for one in json.loads(found.stdout)["compared"]}
    fitted, least = accuracies["out"]["acc"], accuracies["plain"]["acc"]
    assert fitted["examples"] == 1797 - TRAIN
    assert fitted["dense"] == least["dense"] > 0.95
    assert fitted["sparse"] > 0.93
    assert least["sparse"] < fitted["sparse"] - 0.02
    assert accuracies["out"]["top5"]["sparse"] >= fitted["sparse"]
    page = pages.report(pages.read(tmp_path / "out"), [])
    assert f"{fitted['sparse'] / fitted['dense']:.0%} of the dense model&#39;s accuracy is left (images)" in page
    assert "<td>images</td><td>top5</td>" in page
    # The figures are those of the model and its processor, asked directly.
    model, processor = load_with_processor(tmp_path / "out")
    paths = sorted((digits / "test").glob("*/*.png"))
    given = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")["pixel_values"]
    right = model(pixel_values=given).logits.argmax(-1) == torch.tensor([int(path.parent.name) for path in paths])
    assert fitted["sparse"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize(
    ("family", "bare", "changes"),
    [
        ("vit", True, {"pattern": "2:4", "criterion": "magnitude", "mitigation": "d_pts+var"}),
        ("deit", False, {"pattern": "8:16", "criterion": "wina", "mitigation": "permute+var", "permute": "folded"}),
        ("dinov2", False, {"pattern": "8:16", "criterion": "wina", "mitigation": "permute+var", "permute": "layer"}),
        ("dinov2", True, {"mitigation": "permute+var+distill", "dtype": "float16"}),
    ],
)
def test_families(digits: Path, tmp_path: Path, family: str, bare: bool, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY)
    config.architectures = ["DeiTForImageClassification"] if family == "deit" else None  # of two heads, which
    model = (AutoModel if bare else AutoModelForImageClassification).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    save_processor(tmp_path / "model")
    small = {"calibration.tokens": 1024, "calibration.window": 64, "training.tokens": 2048, "training.steps": 16}
    recipe = PLAIN.replace({"pattern": "8:16", "calibration.source": str(digits / "train"), **small, **changes})
    out = convert(str(tmp_path / "model"), tmp_path / "out", recipe)
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    (pixels,), (given,) = graph.graph.input, graph.graph.output
    assert (pixels.name, given.name) == ("pixel_values", "last_hidden_state" if bare else "logits")
    assert [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim] == ["batch_size", 3, 16, 16]
    assert sum(node.op_type == "SparseLinear" for node in graph.graph.node) >= 3 * 6
    sparse, batch = load(out), torch.randn(5, 3, 16, 16)
    found = sparse(pixel_values=batch)[0]
    for row, image in zip(found, batch, strict=True):
        torch.testing.assert_close(sparse(pixel_values=image[None])[0][0], row, rtol=1e-2, atol=1e-2)
    if changes.get("permute") == "folded":
        assert json.loads((out / "report.json").read_text())["permutations"] == {"folded": 18, "inputs": 0}


@pytest.fixture(scope="module")
def backbone() -> Path:
    """DINOv2-small, in an ONNX file that finds what is salient on a photograph."""
    return from_make("NMSPARSE_TEST_BACKBONE", "the real DINOv2 is")


def as_checkpoint(graph: onnx.GraphProto, folder: Path) -> None:
    """Write the backbone as the Hub has it: a bias has its name here, and its weight makes what it is added to."""
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    weights = {
        name.removeprefix("backbone."): tensor for name, tensor in stored.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((made_by[name] for name in node.input if name in made_by), None)
        if node.op_type == "Add" and bias and product is not None and product.op_type == "MatMul":
            weights[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = stored[product.input[1]].t()
    layers = max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")) + 1
    config = AutoConfig.for_model(
        "dinov2", hidden_size=384, num_attention_heads=6, num_hidden_layers=layers, patch_size=14, image_size=518
    )
    config.architectures = ["Dinov2Model"]
    positions = [tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat(positions, 1)  # of the whole, then of the patches
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessorPil(size={"height": 224, "width": 224}, image_mean=mean, image_std=deviation).save_pretrained(
        folder
    )


def crops(folder: Path, photograph: np.ndarray, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        size = int(rng.integers(160, 400))
        top, left = (int(rng.integers(0, most - size + 1)) for most in photograph.shape[:2])
        cut = Image.fromarray(photograph[top : top + size, left : left + size])
        cut.resize((224, 224)).save(folder / f"{number}.png")


@pytest.mark.slow
def test_the_features_of_a_real_backbone(backbone: Path, tmp_path: Path) -> None:
    graph = onnx.load(backbone)
    as_checkpoint(graph.graph, tmp_path / "model")
    china, flower = load_sample_images().images
    crops(tmp_path / "calibration", china, 12, 0)
    crops(tmp_path / "test", flower, 8, 1)
    model, processor = load_with_processor(tmp_path / "model")
    given = processor([Image.open(path) for path in sorted((tmp_path / "test").iterdir())], return_tensors="pt")
    with torch.no_grad():
        dense = model(**given).last_hidden_state
    # It is the backbone of that file: its states are those that the file's head is given.
    last = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last.output[0]))
    theirs = onnxruntime.InferenceSession(graph.SerializeToString()).run(
        [last.output[0]], {"input_image": given["pixel_values"].numpy()}
    )
    torch.testing.assert_close(dense, torch.tensor(theirs[0]), rtol=1e-3, atol=1e-2)
    cosines = {}
    for name, changes in {
        "magnitude": {"criterion": "magnitude", "mitigation": "none"},
        "ours": {"criterion": "wina", "mitigation": "permute+var"},
    }.items():
        source = {"calibration.source": str(tmp_path / "calibration"), "calibration.tokens": 12 * 256}
        out = convert(str(tmp_path / "model"), tmp_path / name, PLAIN.replace({"pattern": "8:16", **source, **changes}))
        found = load(out)(**given).last_hidden_state
        cosines[name] = torch.cosine_similarity(found, dense, dim=-1).mean().item()
    assert cosines["ours"] > cosines["magnitude"] + 0.02
    assert cosines["magnitude"] > 0.5
    # Its weights are kept under the names of today, and with them the processor; not for another processor's.
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0, 0, 0]}))
    assert list(open_checkpoint(str(tmp_path / "model")).processor().image_mean) == [0, 0, 0]


def test_what_an_image_model_cannot_do_is_said(digits: Path, tmp_path: Path) -> None:
    model = str(digits / "model")
    with pytest.raises(CalibrationError, match="must be images for an image classifier, got None"):
        convert(model, tmp_path / "out", PLAIN)
    given = PLAIN.replace({"calibration.source": str(digits / "absent")})
    with pytest.raises(CalibrationError, match="there is no folder"):
        convert(model, tmp_path / "out", given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="must be a folder of images"):
        convert(model, tmp_path / "out", PLAIN.replace({"calibration.source": str(tmp_path / "empty")}))
    assert not (tmp_path / "out").exists()
    checkpoint = open_checkpoint(model)
    settings = json.loads((digits / "model" / "preprocessor_config.json").read_text())
    blind = Path(shutil.copytree(digits / "model", tmp_path / "blind"))
    (blind / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0, 1, 1]}))
    with pytest.raises(CheckpointError, match="pixels must be finite"):
        open_checkpoint(str(blind)).blank()
    with pytest.raises(CalibrationError, match="must have at least 2000 images, got 1400"):
        images(str(digits / "train"), checkpoint.processor(), 2000, 0)
    with pytest.raises(CalibrationError, match=r"must be made \[3, 480, 640\] by .* got \[3, 16, 16\]"):
        images(str(digits / "train"), ViTImageProcessorPil(do_resize=False), 1, 0)


def test_data_set_of_the_hub_format(digits: Path, tmp_path: Path) -> None:
    """A data set folder, read by the library that reads the Hub: no network in the tests."""
    folder, checkpoint = tmp_path / "set", open_checkpoint(str(digits / "model"))
    folder.mkdir()
    drawn(str(digits / "test"), 12, 0).rename_column("image", "picture").to_parquet(folder / "validation.parquet")
    (_, rows, classes), (_, theirs, wanted) = (
        labelled(source, checkpoint.config, 12, 0) for source in (f"hub:{folder}::validation", str(digits / "test"))
    )
    assert sorted(classes) == sorted(wanted)
    assert len(set(classes)) > 3
    told = {row["image"].tobytes(): label for row, label in zip(theirs, wanted, strict=True)}
    assert [told[row["image"].tobytes()] for row in rows] == classes
    found = images(f"hub:{folder}::validation", checkpoint.processor(), 12, 0)
    assert found.shape == (12, 3, 16, 16)
    with pytest.raises(CalibrationError, match=r'must be a folder of images.* got ValueError: Unknown split "train"'):
        images(f"hub:{folder}", checkpoint.processor(), 1, 0)


def test_what_cannot_be_evaluated_is_said(digits: Path, tmp_path: Path) -> None:
    config = open_checkpoint(str(digits / "model")).config
    save_images(tmp_path / "two", np.zeros((2, 8, 8), np.uint8), np.array([0, 1]))
    with pytest.raises(EvaluationError, match="must have the 10 classes of the model, got 2"):
        labelled(str(tmp_path / "two"), config, 0, 0)
    config.label2id = {"1": 7, "0": 3}
    assert labelled(str(tmp_path / "two"), config, 0, 0)[2] == [3, 7]
