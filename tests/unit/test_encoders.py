"""Encoders: torchvision's own features, whatever the family; stages that freeze; weights by name and from files."""

import fnmatch
import sys
import types

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from captioning.config import ENCODERS, Config, DecoderConfig, EncoderConfig, OptimConfig, from_dict
from captioning.config.sections import _encoders
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END
from captioning.model.captioner import Captioner
from captioning.model.encoders import build_encoder
from captioning.training.optim import build_optimizer, set_lrs
from shards.errors import InputError
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

PATTERNS = ["resnet*", "resnext*", "wide_resnet*", "mobilenet_v[23]*", "convnext_*", "swin_*", "vit_*"]
OF_TORCHVISION = [name for name in ENCODERS if name != "features"]
# One of each kind of block.
NAMES = ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v2", "mobilenet_v3_small"]
WITHOUT_BATCH_NORM = ["convnext_tiny", "swin_t", "swin_v2_t", "vit_b_32"]
SIZE = 64


def images(count: int = 2, size: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def random_model(name: str, **options) -> nn.Module:
    """torchvision's, with no parameter and no statistic left at the 0, 1 or 1e-6 that would hide it."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor_name.endswith("layer_scale"):
                tensor.fill_(0.5)
            elif tensor.is_floating_point() and "relative_coords" not in tensor_name:
                tensor.add_(torch.randn_like(tensor), alpha=0.02)
    return model


def head_of(model: nn.Module, name: str) -> nn.Module:
    """What torchvision applies to the pooled feature."""
    head = {"r": "fc", "w": "fc", "m": "classifier", "c": "classifier", "s": "head", "v": "heads"}[name[0]]
    return model.classifier[1:] if name.startswith("convnext") else getattr(model, head)


@pytest.mark.parametrize("name", [*NAMES, *WITHOUT_BATCH_NORM])
def test_pooled_features_under_torchvisions_head_are_torchvisions_logits(name, tmp_path):
    """Weights saved from torchvision's own model give its own features, so pretrained files mean what they say."""
    theirs = random_model(name, **({"image_size": SIZE} if name.startswith("vit") else {}))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = build_encoder(EncoderConfig(name), SIZE).eval()
    ours.load_pretrained(str(tmp_path / "weights.pth"))
    normalised = torchvision.transforms.functional.normalize(
        images() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    with torch.no_grad():
        expected, pooled, features = theirs(normalised), ours.pooled(images()), ours(images())
        got = head_of(theirs, name)(pooled)
    assert pooled.shape == (2, ours.feature_size) and features.shape == (2, ours.feature_size, 2, 2)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_readmes_new_encoder_is_one_file_and_one_line(tmp_path, monkeypatch):
    """The file of captioning/model/README.md, run as it stands there, against torchvision's own forward."""
    text = (ROOT / "captioning" / "model" / "README.md").read_text()
    file, line = (block.split("```")[0] for block in text.split("```python\n")[1:3])
    module = types.ModuleType("captioning.model.encoders.regnet")
    exec(file, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, entry in eval(f"dict({line.strip()})", {"_encoders": _encoders}).items():
        monkeypatch.setitem(ENCODERS, name, entry)
    theirs = random_model("regnet_y_400mf")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    config = from_sections(EncoderConfig("regnet_y_400mf", trainable="layer3"), DecoderConfig("lstm", 8, 8, 1))
    ours = build_encoder(config.encoder).eval()
    ours.load_pretrained(str(tmp_path / "weights.pth"))
    with torch.no_grad():
        expected, got = theirs((images() - ours.mean) / ours.std), theirs.fc(ours.pooled(images()))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_map_is_what_torchvision_pools():
    x = images()
    for name in ("swin_t", "vit_b_32", "convnext_tiny"):
        torch.manual_seed(0)
        encoder = build_encoder(EncoderConfig(name), SIZE).eval()
        with torch.no_grad():
            last, features, pooled = encoder._last_stage(x), encoder(x), encoder.pooled(x)
        if name == "swin_t":
            torch.testing.assert_close(features.mean(dim=(2, 3)), pooled)
        elif name == "vit_b_32":  # the patch tokens, row by row; the class token is the pooled feature
            assert torch.equal(torch.cat([pooled[:, None], features.flatten(2).transpose(1, 2)], dim=1), last)
        else:  # each place normalised by itself
            torch.testing.assert_close(features.mean(dim=1), torch.zeros(2, 2, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_every_name_of_the_table_builds(name):
    """On the meta device, where nothing is computed: stages as the table says, at strides of 4, 8, 16 and 32."""
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name)).eval()
        shapes = []
        for stage in encoder.stages.values():
            stage.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
        features = encoder(torch.empty(1, 3, 224, 224, dtype=torch.uint8))
    assert tuple(encoder.stages) == ENCODERS[name].stages
    side = {"16": 14, "32": 7, "14": 16}[name[-2:]] if name.startswith("vit") else 7
    assert features.shape == (1, encoder.feature_size, side, side)
    if not name.startswith("vit"):
        at = 1 if name.startswith("swin") else 2  # rows, in Swin's [B, h, w, D]
        assert [shape[at] for shape in shapes] == [56, 28, 14, 7]


def test_the_table_has_every_model_of_torchvisions_families():
    known = torchvision.models.list_models(module=torchvision.models)
    assert sorted(OF_TORCHVISION) == [name for name in known if any(fnmatch.fnmatch(name, p) for p in PATTERNS)]


def test_every_named_weights_was_trained_with_the_mean_and_deviation_images_are_normalised_by():
    encoder = build_encoder(EncoderConfig("resnet18"))
    for name in OF_TORCHVISION:
        for weights in torchvision.models.get_model_weights(name):
            preset = weights.transforms()
            for ours, theirs in ((encoder.mean, preset.mean), (encoder.std, preset.std)):
                assert (ours.flatten() / 255).tolist() == pytest.approx(theirs), weights


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_families_without_batch_norm_train(name, decoder):
    """Frozen below the named stage, a gradient for all above it; checkpointed or not, it is the same."""
    named = ENCODERS[name].stages[-2]
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = EncoderConfig(
            name, trainable=named, gradient_checkpointing=checkpointing, freeze_batch_norm=True, fold_batch_norm=True
        )
        sizes = DecoderConfig(decoder, embedding_size=12, hidden_size=12)
        model = Captioner(from_sections(encoder, sizes), 9).train()
        assert model.encoder._folded == {} and model.encoder.frozen == ENCODERS[name].stages[:-2]
        captions = PaddedCaptions.of(torch.tensor([[4, 5, END]] * 2), torch.tensor([3, 3]), torch.arange(2))
        torch.manual_seed(1)  # of stochastic depth
        logits, penalty = model(images(), captions)
        (logits.square().sum() + penalty).backward()
        gradients.append({n: p.grad for n, p in model.encoder.stages.named_parameters() if p.grad is not None})
    trained = {
        n
        for n, p in model.encoder.stages.named_parameters()
        if n.split(".")[0] in (named, list(ENCODERS[name].stages)[-1])
    }
    assert gradients[0].keys() == gradients[1].keys() == trained
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=parameter)


def from_sections(encoder: EncoderConfig, decoder: DecoderConfig) -> Config:
    values = {"run": "r", "data": {"train": "t", "image_size": SIZE}, "train": {"epochs": 1}}
    sections = {"encoder": vars(encoder), "decoder": vars(decoder)}
    return from_dict({**values, **sections}, "test")


def test_a_vit_has_a_rate_for_each_block_and_its_positions_do_not_decay():
    config = from_sections(EncoderConfig("vit_b_32", trainable="all"), DecoderConfig("lstm", 8, 8, 1))
    with torch.device("meta"):
        model = Captioner(config, 9)
    optimizer = build_optimizer(model, OptimConfig(encoder_lr=1e-4, layerwise_lr_decay=0.5, weight_decay=0.1))
    rates = set_lrs(optimizer, 1.0)
    assert [rates[f"encoder-block{n}"] for n in (12, 11, 1)] == pytest.approx([1e-4, 5e-5, 1e-4 * 0.5**11])
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {name for name, p in model.encoder.named_parameters() if p.dim() > 1 and id(p) not in decayed}
    assert spared == {"stages.block1.0.class_token", "stages.block1.0.pos_embedding"}


def test_swin_and_convnext_spare_what_is_no_matrix_of_weights():
    for name, ending in (
        ("swin_t", "relative_position_bias_table"),
        ("swin_v2_t", "logit_scale"),
        ("convnext_tiny", "layer_scale"),
    ):
        with torch.device("meta"):
            model = Captioner(from_sections(EncoderConfig(name, trainable="all"), DecoderConfig("lstm", 8, 8, 1)), 9)
        groups = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        spared = {
            n.rsplit(".", 1)[-1] for n, p in model.encoder.named_parameters() if p.dim() > 1 and id(p) not in decayed
        }
        assert spared == {ending}


def vit_state() -> dict[str, torch.Tensor]:
    """ViT-B/32's for images of 64 pixels: zeros, but for the positions."""
    with torch.device("meta"):
        model = torchvision.models.vit_b_32(image_size=64)
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    return {**state, "encoder.pos_embedding": torch.randn(1, 5, 768)}


def test_positions_of_another_image_size_are_interpolated(tmp_path):
    """Weights of 64 pixels (a grid of 2 x 2) at 96 (3 x 3): corners keep their positions, the middle is their mean."""
    state = vit_state()
    torch.save(state, tmp_path / "64.pth")
    encoder = build_encoder(EncoderConfig("vit_b_32"), 96).eval()
    encoder.load_pretrained(str(tmp_path / "64.pth"))
    assert encoder(images(size=96)).shape == (2, 768, 3, 3)
    stored, ours = state["encoder.pos_embedding"][0], encoder.stages["block1"][0].pos_embedding[0]
    torch.testing.assert_close(ours[[0, 1, 3, 7, 9]], stored, msg="class token and corners")
    torch.testing.assert_close(ours[5], stored[1:].mean(dim=0))


def test_an_image_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(InputError, match=r"(?s)data\.image_size=100 .*vit_b_32.* 96 or 128"):
        build_encoder(EncoderConfig("vit_b_32"), 100)
    with pytest.raises(InputError, match=r"a multiple: 32\."):
        build_encoder(EncoderConfig("vit_b_32"), 8)


def test_published_vit_files_name_the_mlp_in_the_old_way(tmp_path):
    state = {**vit_state(), "encoder.layers.encoder_layer_1.mlp.3.bias": torch.randn(768)}
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    safetensors.torch.save_file(old, tmp_path / "old.safetensors")
    encoder = build_encoder(EncoderConfig("vit_b_32"), 64)
    encoder.load_pretrained(str(tmp_path / "old.safetensors"))
    assert torch.equal(encoder.stages["block2"].mlp[3].bias, state["encoder.layers.encoder_layer_1.mlp.3.bias"])


def test_resnet_sees_a_grid_of_14_at_448_pixels():
    config = from_dict(
        {
            "run": "r",
            "data": {"train": "t", "image_size": 448, "resize_size": 448},
            "train": {"epochs": 1},
            "encoder": {"name": "resnet18"},
            "decoder": {"name": "attention"},
        },
        "test",
    )
    with torch.no_grad():
        assert Captioner(config, 9).eval().encode(images(1, 448)).grid.shape == (1, 14 * 14, 512)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "swin_t", "trainable": "layer4"}, "not one of swin_t's: none, all, stage1, stage2, stage3, stage4"),
        (
            {"name": "resnet18", "trainable": "block3"},
            "not one of resnet18's: none, all, layer1, layer2, layer3, layer4",
        ),
        ({"name": "vit_b_16", "trainable": "block13"}, "vit_b_16's: none, all, block1, "),
    ],
)
def test_a_stage_that_the_encoder_has_not_is_an_error_that_lists_its_stages(section, message):
    with pytest.raises(InputError, match=f"encoder.trainable: .*{message}"):
        from_dict({"run": "r", "data": {"train": "t"}, "train": {"epochs": 1}, "encoder": section}, "test")
    with pytest.raises(InputError, match=r"encoder\.trainable="), torch.device("meta"):
        build_encoder(EncoderConfig(**section))


def test_safetensors_weights_and_files_that_do_not_fit(tmp_path):
    state = torchvision.models.resnet18(weights=None, num_classes=7).state_dict()  # of whatever classes
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for name, saved in (("resnet18", state), ("2017", old), ("short", dict(list(state.items())[5:]))):
        safetensors.torch.save_file(saved, tmp_path / f"{name}.safetensors")
    safetensors.torch.save_file({**state, "neck.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    for name in ("resnet18", "2017"):
        encoder = build_encoder(EncoderConfig("resnet18"))
        encoder.load_pretrained(str(tmp_path / f"{name}.safetensors"))
        assert torch.equal(encoder.stages["layer4"][1].conv2.weight, state["layer4.1.conv2.weight"])
    cases = (
        ("resnet50", "resnet18", "size mismatch"),
        ("resnet18", "short", "is missing"),
        ("resnet18", "more", "neck"),
    )
    for name, file, message in cases:
        with pytest.raises(InputError, match=rf"(?s)does not fit encoder\.name={name}.*{message}"):
            build_encoder(EncoderConfig(name)).load_pretrained(str(tmp_path / f"{file}.safetensors"))


def test_bad_weights_are_refused_and_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "whole.pth")
    cases = (("evil.pth", "cannot be read"), ("whole.pth", "it holds model, epoch"))
    for weights, message in (*cases, ("nowhere.pth", "neither a file nor weights of resnet18")):
        with pytest.raises(InputError, match=message):
            build_encoder(EncoderConfig("resnet18")).load_pretrained(str(tmp_path / weights))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "IMAGENET1K_V1"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")])
def test_weights_without_a_network_say_what_to_fetch_and_where_to_put_it(name, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name))
    with pytest.raises(InputError) as error:
        encoder.load_pretrained(weights)
    message = str(error.value)
    assert f"https://download.pytorch.org/models/{name}" in message
    assert str(tmp_path / "hub" / "checkpoints") in message and "encoder.weights=FILE" in message


@pytest.mark.parametrize(("name", "trainable"), [("vit_b_32", "block11"), ("resnet18", "layer4"), ("resnet18", "none")])
def test_compiled_stages_compute_the_same_and_stay_compiled(name, trainable):
    """Training, validation and training again, in batches of several sizes: each stage has a graph for training and one
    for validation, and none falls back to eager. Where BatchNorm is trained an epoch's short batch has its own."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name, trainable=trainable, freeze_batch_norm=False), SIZE).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append([x.shape[0] for x in inputs if x.dim() == 4 and x.shape[0] in (3, 4, 5)])
        return graph.forward

    with torch.no_grad():
        expected = encoder(images())
    encoder.compile_stages(4, 5, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-3, atol=1e-4)
    trained = 0 if trainable == "none" else 1
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for again in range(3):
            for count in (4, 4, 3):
                features = encoder.train()(images(count))
                assert len(features) == count
                if trained:
                    features.sum().backward()
            if not again:
                encoder.load_state_dict(encoder.state_dict())
            with torch.no_grad():
                for count in (5, 2):
                    assert len(encoder.eval()(images(count))) == count
            if not again:
                first_round = len(graphs)
    live = name == "resnet18" and trained
    assert len(graphs) == first_round, "nothing is compiled twice"
    blocks_alike = len(encoder.stages) if name == "resnet18" else 3  # a ViT's middle blocks share a graph
    assert first_round <= 2 * blocks_alike + 2 * trained + live, graphs


def test_filling_up_a_batch_changes_no_feature():
    torch._dynamo.reset()
    made = build_encoder(EncoderConfig("resnet18"), SIZE).eval()
    with torch.no_grad():
        expected, vectors = made(images(3)), made.pooled(images(3))
        made.compile_stages(4, 8, backend="eager")
        torch.testing.assert_close(made(images(3)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.pooled(images(3)), vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "last_stage"),
    [(name, ENCODERS[name].stages[-2]) for name in (*NAMES, *WITHOUT_BATCH_NORM)] + [("resnet18", "layer2")],
)
def test_a_lower_last_stage_gives_its_own_finer_grid(name, last_stage, tmp_path):
    """The same as the whole encoder's stages up to there, from the same pretrained file; nothing above is kept."""
    torch.save(
        random_model(name, **({"image_size": SIZE} if name.startswith("vit") else {})).state_dict(), tmp_path / "w"
    )
    whole, cut = (build_encoder(EncoderConfig(name, last_stage=last), SIZE).eval() for last in (None, last_stage))
    for encoder in (whole, cut):
        encoder.load_pretrained(str(tmp_path / "w"))
    seen = []
    whole.stages[last_stage].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        whole(images())
        expected, grid, pooled = cut.feature_map(seen[0]), cut(images()), cut.pooled(images())
    assert tuple(cut.stages) == ENCODERS[name].stages[: ENCODERS[name].stages.index(last_stage) + 1]
    assert len(list(cut.parameters())) < len(list(whole.parameters()))
    assert grid.shape[:2] == (2, cut.feature_size) and pooled.shape == (2, cut.feature_size)
    assert grid.shape[2] > 2 or name.startswith("vit")
    torch.testing.assert_close(grid, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(InputError, match=r"encoder\.trainable"):
        cut.train_from(ENCODERS[name].stages[-1])


def test_a_last_stage_that_cannot_be_is_refused():
    for section, message in (
        ({"name": "resnet18", "last_stage": "stage2"}, "encoder.last_stage: 'stage2' is not one of resnet18's"),
        ({"name": "resnet18", "last_stage": "layer2", "trainable": "layer3"}, "up to encoder.last_stage=layer2: none"),
    ):
        with pytest.raises(InputError, match=message):
            from_dict({"run": "r", "data": {"train": "t"}, "train": {"epochs": 1}, "encoder": section}, "test")
