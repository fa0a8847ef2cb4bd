"""Which model a checkpoint belongs to, and building it: configuration, activation and the list of what is supported."""

from __future__ import annotations

import copy
import difflib
import re
from typing import Any

import torch
from torch import Tensor, nn

from clipseed.clip.checkpoint import Activation, Checkpoint
from clipseed.errors import UsageError, WeightsError
from clipseed.weights import check_fit, count_blocks, take_over

Config = dict[str, Any]
_QUICK = "-quickgelu"
_UNSUPPORTED_KEYS = ("attentional_pool", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads",
                     "scale_attn_inner", "scale_attn", "scale_fc")  # fmt: skip


def named_config(model: str) -> Config:
    """open_clip's configuration of a model name.

    Raises:
        UsageError: unknown name.
        WeightsError: a vision tower that is not a plain ViT.
    """
    import open_clip

    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        near = difflib.get_close_matches(model, supported_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"supported are {', '.join(supported_models())}"
        raise UsageError(f"--model {model}: unknown to open_clip; {hint}")
    refuse_unsupported(config, f"--model {model}")
    return copy.deepcopy(config)


def supported_models() -> list[str]:
    """open_clip model names whose vision tower is a plain ViT."""
    import open_clip

    names = []
    for name in open_clip.list_models():
        try:
            refuse_unsupported(open_clip.get_model_config(name), name)
        except WeightsError:
            continue
        names.append(name)
    return names


def refuse_unsupported(config: Config, where: str) -> None:
    """Raise :class:`WeightsError` unless the vision tower is open_clip's plain ``VisionTransformer``."""
    vision = config.get("vision_cfg", {})
    problem = None
    if vision.get("timm_model_name"):
        problem = f"its vision tower is timm's {vision['timm_model_name']}"
    elif isinstance(vision.get("layers"), list | tuple):
        problem = "its vision tower is a ResNet"
    elif "multimodal_cfg" in config:
        problem = "it is a CoCa model"
    elif any(vision.get(key) for key in _UNSUPPORTED_KEYS):
        problem = f"its blocks use {next(key for key in _UNSUPPORTED_KEYS if vision.get(key))}"
    if problem:
        raise WeightsError(
            f"{where}: not supported, {problem}; class activation maps need a plain ViT such as ViT-B-32, ViT-B-16, "
            "ViT-L-14, ViT-L-14-336, ViT-H-14 or ViT-g-14"
        )


def inferred_config(state: dict[str, Tensor], where: str) -> Config:
    """Configuration of a checkpoint in OpenAI's layout, read off the shapes of its tensors (heads are 64 wide).

    Raises:
        WeightsError: not a CLIP with a ViT, or tensors are missing.
    """
    if "visual.layer1.0.conv1.weight" in state:
        raise WeightsError(f"{where}: a CLIP ResNet; class activation maps need a ViT such as ViT-B-16")
    if any(key.startswith("visual.trunk.") for key in state):
        raise WeightsError(f"{where}: its vision tower is a timm model; give open_clip ViT weights such as ViT-B-16")
    try:
        patch = state["visual.conv1.weight"].shape[-1]
        vision_width = state["visual.conv1.weight"].shape[0]
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        text_width = state["ln_final.weight"].shape[0]
        mlp = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        config: Config = {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "image_size": patch * grid,
                "layers": count_blocks(state, "visual.transformer.resblocks."),
                "width": vision_width,
                "patch_size": patch,
                "mlp_ratio": mlp / vision_width,
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": count_blocks(state, "transformer.resblocks."),
            },
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(
            f"{where}: not a CLIP checkpoint in OpenAI's layout (missing {error}); "
            "for another layout name the architecture with --model"
        ) from error
    if vision_width % 64 or text_width % 64:
        raise WeightsError(f"{where}: widths {vision_width} and {text_width} do not divide into heads of 64; "
                           "name the architecture with --model")  # fmt: skip
    return config


def decide_activation(model: str | None, config: Config, checkpoint: Checkpoint, tagged: Activation | None) -> Config:
    """Settle QuickGELU or GELU, refusing contradictions: the wrong one computes plausible nonsense.

    A plain model name takes the activation its weights were trained with; a name ending in ``-quickgelu`` insists.
    ``tagged`` is what open_clip says of a pretrained tag.

    Raises:
        WeightsError: name and weights contradict each other, or nothing tells the activation.
    """
    named: Activation | None = None
    if model is not None:
        named = "quickgelu" if config.get("quick_gelu") else "gelu"
    elif checkpoint.config is not None:
        named = "quickgelu" if checkpoint.config["model_cfg"].get("quick_gelu") else "gelu"
    trained = tagged or checkpoint.activation
    if model is not None and model.endswith(_QUICK) and trained == "gelu":
        raise WeightsError(f"--model {model}: these weights were trained with GELU; use {model.removesuffix(_QUICK)}")
    if model is None and checkpoint.config is not None and trained and named != trained:
        raise WeightsError(f"{checkpoint.path}: open_clip_config.json says {named}, the weights are {trained}")
    decided = trained or named
    if decided is None:
        raise WeightsError(
            f"{checkpoint.path}: nothing in the file tells whether it was trained with GELU or QuickGELU, and the "
            "wrong one gives wrong maps; name the model, e.g. --model ViT-B-16 (GELU) or --model ViT-B-16-quickgelu"
        )
    return {**config, "quick_gelu": decided == "quickgelu"}


def build_model(config: Config, checkpoint: Checkpoint) -> nn.Module:
    """Build an open_clip model around a checkpoint's tensors, in float32 on the CPU.

    Raises:
        WeightsError: tensors are missing, left over, of another shape, or not finite.
    """
    from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict

    arguments = copy.deepcopy(config)
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments.get("text_cfg", {})
    with torch.device("meta"):
        model: nn.Module = (CustomTextCLIP if custom else CLIP)(**arguments)
    state = convert_to_custom_text_state_dict(checkpoint.state) if custom else dict(checkpoint.state)
    expected = model.state_dict()
    if "logit_scale" in state and "logit_scale" in expected:
        state["logit_scale"] = state["logit_scale"].reshape(expected["logit_scale"].shape)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    check_fit(state, expected, checkpoint.path, "name the right one with --model")
    take_over(model, state)
    for owner in model.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:  # the causal mask, which checkpoints do not hold
                size = buffer.shape[-1]
                owner.register_buffer(name, torch.full((size, size), float("-inf")).triu_(1), persistent=False)
    return model


_STAY = re.compile(
    r"(ln_\w+|\w*norm\w*|ls_\d+|\w*embed\w*|shared|relative_attention_bias|logit_scale|logit_bias)", re.I
)
"""Parts of the names of parameters that CLIP's loader leaves in single precision: norms, embeddings, scales."""
_BLOCK = re.compile(r"((?:.*\.)?resblocks\.\d+)\.")
_IN_BLOCK = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
             "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")  # fmt: skip


def round_linear_weights(model: nn.Module) -> None:
    """Round convolution, linear, attention and projection weights to half precision in place, as CLIP's loader does.

    Nothing changes for OpenAI's checkpoints, which are half precision there already; norms and embeddings stay. The
    loader goes by the classes of modules. Names are those of the checkpoints, so they do not change with open_clip.

    Raises:
        WeightsError: a weight of this kind is not where checkpoints have it.
    """
    parameters = dict(model.named_parameters())
    blocks = {found[1] for found in map(_BLOCK.match, parameters) if found}
    expected = {"visual.conv1.weight", "visual.proj", "visual.transformer.resblocks.0.attn.in_proj_weight"}
    expected |= {f"{block}.{name}" for block in blocks for name in _IN_BLOCK}
    missing = sorted(expected - parameters.keys())
    if missing:
        raise WeightsError(
            f"--paper rounds weights by name, and this model has no {missing[0]!r}; is its open_clip too new for "
            "clipseed? (see clipseed doctor)"
        )
    for name, value in parameters.items():
        if not any(map(_STAY.fullmatch, name.split("."))):
            value.data = value.data.half().float()
