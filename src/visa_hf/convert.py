"""Old names, in one place: published checkpoints of VISA, XMem and Llama tokenizers -> ours.

Each function takes what the original system saved and returns what this package loads; nothing is dropped or made up
in silence. The names are those of the released checkpoints (VISA, XMem f3b841d, segment-anything).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from .modeling.configuration_visa import XMemConfig
from .modeling.modeling_xmem import XMemModel

# What a converted tokenizer must cut exactly as SentencePiece does, or the conversion fails.
_TOKENIZER_PROBES = (
    "A chat between a curious human and an artificial intelligence assistant. USER: What is (0)? ASSISTANT:",
    " \nTarget Image: ",
    ", (1)",
    "It is",
    "  the  bird   that\twins\n\n 1234567890 3.14%",
    "the child's \"new\" toy; don't walk/run - it's <done> & [over] {now} #1 @home ~ a_b\\c",
    "Überraschung in São Paulo: été, naïve, ﬁn, ｆｕｌｌ, ½, x², 中文字幕, привет, שלום, 🦓🏃\u200d♀️",
    "aaaaaaaa abababab mmmmm lllll ttttt         eeeee",
)


def convert_tokenizer(tokenizer_model: str | Path) -> PreTrainedTokenizerFast:
    """Turn a Llama `tokenizer.model` into the tokenizer of VISA, with `[SEG]` and `<image>` added.

    It gives the ids that the published checkpoints were trained with: those of the slow Llama tokenizer in its
    "legacy" behaviour, where each stretch of text between two added tokens gets its own leading blank piece, and
    `[SEG]` swallows the blanks around it. It is saved as a plain fast tokenizer, so that loading it needs neither
    sentencepiece nor protobuf.

    Args:
        tokenizer_model (`str` or `Path`): a SentencePiece BPE model, or the folder that holds `tokenizer.model`.

    Returns:
        `PreTrainedTokenizerFast`: the pieces keep their ids; `[SEG]` is the next id and `<image>` the one after it
        (32000 and 32001 for Llama); the padding token is the unknown token, as published.

    Raises:
        ImportError: if sentencepiece is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a SentencePiece model, or one that cannot be converted exactly.
    """
    path = Path(tokenizer_model)
    path = path / "tokenizer.model" if path.is_dir() else path
    pieces = _load_sentencepiece(path)
    num_pieces = pieces.vocab_size()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece_to_fast(pieces),
        bos_token=pieces.id_to_piece(pieces.bos_id()),
        eos_token=pieces.id_to_piece(pieces.eos_id()),
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        pad_token=pieces.id_to_piece(pieces.unk_id()),
        clean_up_tokenization_spaces=False,
    )
    for probe in _TOKENIZER_PROBES:
        expected = pieces.encode(probe)
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if ids != expected:
            raise ValueError(
                f"`{path}` cannot be converted: for {probe!r} the fast tokenizer gives {ids} and SentencePiece "
                f"{expected}. A Llama-style model is needed: BPE, no text normalisation, a leading blank."
            )
    # [SEG] is not `special`: it stays visible in decoded answers.
    tokenizer.add_tokens([AddedToken("[SEG]", lstrip=True, rstrip=True, normalized=False, special=False)])
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    added = tokenizer.convert_tokens_to_ids(["[SEG]", "<image>"])
    if added != [num_pieces, num_pieces + 1]:
        raise ValueError(
            f"`[SEG]` and `<image>` have ids {added} in `{path}` but {[num_pieces, num_pieces + 1]}, those after its "
            f"{num_pieces} pieces, are needed. Give the language model's own tokenizer, before anything was added."
        )
    return tokenizer


def _load_sentencepiece(path: Path) -> Any:
    """Return the `SentencePieceProcessor` of the file `path`, after checking that it has the pieces of Llama."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "Reading a `tokenizer.model` needs sentencepiece, which is not installed: pip install visa-hf[convert]"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"`{path}` does not exist. Give the `tokenizer.model` of a Llama checkpoint.")
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.load(str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"`{path}` is not a SentencePiece model. Give a Llama `tokenizer.model`.") from error
    missing = [name for name in ("unk", "bos", "eos") if getattr(pieces, f"{name}_id")() < 0]
    if missing:
        raise ValueError(
            f"`{path}` has no {', '.join(missing)} piece. Give the `tokenizer.model` of a Llama checkpoint."
        )
    return pieces


def _sentencepiece_to_fast(pieces: Any) -> Tokenizer:
    """Return a `tokenizers` BPE model with the pieces, merges and white-space rules of a SentencePiece model."""
    ids = range(pieces.vocab_size())
    vocab = {pieces.id_to_piece(i): i for i in ids}
    is_plain = [not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i)) for i in ids]
    scored = {pieces.id_to_piece(i): pieces.get_score(i) for i in ids if is_plain[i]}
    # SentencePiece joins the two neighbours whose union has the best score: every way to cut a piece is a merge.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scored, key=lambda piece: -scored[piece])
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scored and piece[cut:] in scored
    ]
    unk = pieces.id_to_piece(pieces.unk_id())
    bos = pieces.id_to_piece(pieces.bos_id())
    has_bytes = any(pieces.is_byte(i) for i in ids)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=has_bytes))
    # Not a pre-tokenizer: the normalizer runs on each stretch between added tokens, as the slow tokenizer did.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos_id())]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return backend


def _same(*names: str) -> dict[str, str]:
    """Names that are the same in both."""
    return {name: name for name in names}


def _weights_and_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Tensor names of modules that have a weight and a bias each."""
    return {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in modules.items() for leaf in ("weight", "bias")}


# VISA, old prefix and ours of each part: Llama, CLIP in the names of transformers 4, SAM in those of segment-anything.
_LLAMA = ("model.", "model.language_model.")
_CLIP = ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.")
_SAM = ("model.visual_model.", "model.sam.")
# The tensors of one layer of each stack, old name -> ours.
_LLAMA_LAYER = _same(
    *(f"self_attn.{x}_proj.weight" for x in ("q", "k", "v", "o")),
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_CLIP_LAYER = _weights_and_biases(
    _same(*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
)
_SAM_ENCODER_LAYER = _same("attn.rel_pos_h", "attn.rel_pos_w") | _weights_and_biases(
    {"norm1": "layer_norm1", "norm2": "layer_norm2", **_same("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")}
)
_SAM_DECODER_LAYER = _weights_and_biases(
    {f"norm{i}": f"layer_norm{i}" for i in (1, 2, 3, 4)}
    | _same("mlp.lin1", "mlp.lin2")
    | _same(
        *(
            f"{attention}.{x}_proj"
            for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
            for x in ("q", "k", "v", "out")
        )
    )
)
# (part, old stack and ours, its layer)
_VISA_STACKS = (
    (_LLAMA, ("layers.", "layers."), _LLAMA_LAYER),
    (_CLIP, ("encoder.layers.", "encoder.layers."), _CLIP_LAYER),
    (_SAM, ("image_encoder.blocks.", "vision_encoder.layers."), _SAM_ENCODER_LAYER),
    (_SAM, ("mask_decoder.transformer.layers.", "mask_decoder.transformer.layers."), _SAM_DECODER_LAYER),
)
# The tensors outside of stacks, old name -> ours.
_VISA_HEADS = _same("lm_head.weight", "model.mm_projector.weight", "model.mm_projector.bias") | _weights_and_biases(
    {f"model.text_hidden_fcs.0.{i}": f"model.text_hidden_fcs.{i}" for i in (0, 2)}
)
_LLAMA_REST = _same("embed_tokens.weight", "norm.weight")
_CLIP_REST = _same(
    "embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
) | _weights_and_biases(_same("pre_layrnorm", "post_layernorm"))
_SAM_REST = {
    "image_encoder.pos_embed": "vision_encoder.pos_embed",
    "image_encoder.neck.0.weight": "vision_encoder.neck.conv1.weight",
    "image_encoder.neck.2.weight": "vision_encoder.neck.conv2.weight",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    **{f"prompt_encoder.point_embeddings.{i}.weight": f"prompt_encoder.point_embed.{i}.weight" for i in range(4)},
    **_same("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    **_same("mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"),
    **_weights_and_biases(
        {
            "image_encoder.patch_embed.proj": "vision_encoder.patch_embed.projection",
            "image_encoder.neck.1": "vision_encoder.neck.layer_norm1",
            "image_encoder.neck.3": "vision_encoder.neck.layer_norm2",
            "prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
            "prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
            "prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
            "prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
            "prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
            "mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
            "mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
            "mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
            "mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
            **_same(*(f"mask_decoder.transformer.final_attn_token_to_image.{x}_proj" for x in ("q", "k", "v", "out"))),
            **{
                f"mask_decoder.{head}.layers.{old}": f"mask_decoder.{head}.{new}"
                for head in (*(f"output_hypernetworks_mlps.{i}" for i in range(4)), "iou_prediction_head")
                for old, new in enumerate(("proj_in", "layers.0", "proj_out"))
            },
        }
    ),
}
# transformers' SAM holds its positional matrix in two places.
_SAM_POSITIONS = "model.sam.shared_image_embedding.positional_embedding"
_SAM_POSITIONS_AGAIN = "model.sam.prompt_encoder.shared_embedding.positional_embedding"
# Buffers that transformers 4 saved and that are computed today.
_VISA_BUFFER = re.compile(r"\.(self_attn\.rotary_emb\.inv_freq|embeddings\.position_ids)$")
_PEFT_NAME = re.compile(r"^base_model\.model\.|\.(lora_\w+|modules_to_save|original_module|base_layer)\.")


def convert_visa_state_dict(sd: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a published VISA checkpoint to those of [`VisaForVideoSegmentation`] without a tracker.

    How many layers each part has is read off the names. Whether shapes fit a configuration shows when the result is
    loaded.

    Args:
        sd (mapping of `str` to `torch.Tensor`): the state dict of all shards, LoRA weights merged, with the CLIP tower
            under `model.vision_tower.vision_tower.vision_model.`. The buffers `rotary_emb.inv_freq` and
            `embeddings.position_ids` may be there and are left out.

    Returns:
        `dict`: our names and the same tensors, not copied; SAM's positional matrix is there under both of its names.

    Raises:
        TypeError: if `sd` does not map names to tensors, as when it is a checkpoint that wraps the state dict.
        ValueError: if names are missing or unknown, the message lists them; if they are those of LoRA training.
    """
    _check_maps_names_to_tensors(sd)
    if peft_names := [name for name in sd if _PEFT_NAME.search(name)]:
        raise ValueError(
            f"{len(peft_names)} names are those of LoRA training: {_listed(peft_names)}. Merge the LoRA weights into "
            "the model first (`merge_and_unload()` of peft) and give the state dict of the merged model."
        )
    weights = {name: tensor for name, tensor in sd.items() if not _VISA_BUFFER.search(name)}
    names = _visa_names(weights)
    problems = []
    if missing := names.keys() - weights.keys():
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected := weights.keys() - names.keys():
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    if problems:
        advice = "Give the whole state dict, as released: all of its shards together."
        if not any(name.startswith(_CLIP[0]) for name in weights):
            advice += (
                f" The CLIP tower (`{_CLIP[0]}*`) is missing altogether, as in the released export: add the "
                "`vision_model.*` tensors of openai/clip-vit-large-patch14 under that prefix."
            )
        raise ValueError(f"This is not the state dict of a published VISA. Tensors {'; '.join(problems)}. {advice}")
    converted = {new: weights[old] for old, new in names.items()}
    converted[_SAM_POSITIONS_AGAIN] = converted[_SAM_POSITIONS]
    return converted


def assemble_visa_state_dict(
    language_model: Mapping[str, torch.Tensor],
    sam: Mapping[str, torch.Tensor],
    visual_tower: Mapping[str, torch.Tensor] | None = None,
    *,
    vocab_size: int = 32000,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Put together what VISA's training begins with: Chat-UniVi, SAM and CLIP, each under its own names.

    The result has the published names of VISA, for [`convert_visa_state_dict`]. `text_hidden_fcs` is new and drawn as
    PyTorch draws a Linear; the rows of `[SEG]` are the averages of all others.

    Args:
        language_model (mapping of `str` to `torch.Tensor`): a Chat-UniVi checkpoint (arXiv 2311.08046): Llama under
            `model.*`, `lm_head.weight`, `model.mm_projector.*`, perhaps with its CLIP tower.
        sam (mapping): a checkpoint of segment-anything.
        visual_tower (mapping, *optional*): CLIP with names `vision_model.*`, where the language model's checkpoint is
            without. The text tower of a whole CLIP is not needed, and left out.
        vocab_size (`int`, defaults to 32000): pieces of the tokenizer. Further rows of the embeddings are left out.
        seed (`int`): of the new weights.

    Returns:
        `dict` of `str` to `torch.Tensor`: the tensors given, not copied, and the new ones.

    Raises:
        ValueError: if a tensor that decides sizes is missing, the embeddings have too few rows, or CLIP is there
            twice.
    """
    for what, tensors, needed in (
        ("language_model", language_model, ("model.embed_tokens.weight", "lm_head.weight")),
        ("sam", sam, ("prompt_encoder.no_mask_embed.weight",)),
    ):
        _check_maps_names_to_tensors(tensors)
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise ValueError(f"`{what}` has no {_listed(missing)}. Give the checkpoint as its authors published it.")
    assembled = dict(language_model)
    assembled |= {_SAM[0] + name: tensor for name, tensor in sam.items()}
    if visual_tower is not None:
        parent = _CLIP[0].removesuffix("vision_model.")
        if any(name.startswith(parent) for name in language_model):
            raise ValueError("`language_model` holds a CLIP tower already. Leave `visual_tower` out.")
        tower = {parent + name: tensor for name, tensor in visual_tower.items() if name.startswith("vision_model.")}
        if not tower:
            raise ValueError(
                "`visual_tower` has no names `vision_model.*`. Give a checkpoint of CLIP in transformers."
            )
        assembled |= tower
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = assembled[name]
        if len(rows) < vocab_size:
            raise ValueError(
                f"`{name}` has {len(rows)} rows but the tokenizer {vocab_size} pieces. Correct `vocab_size`."
            )
        rows = rows[:vocab_size]
        assembled[name] = torch.cat([rows, rows.float().mean(dim=0, keepdim=True).to(rows.dtype)])
    width, dtype = assembled["lm_head.weight"].shape[1], assembled["lm_head.weight"].dtype
    prompt_width = sam["prompt_encoder.no_mask_embed.weight"].shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, outputs in ((0, width), (2, prompt_width)):
            linear = torch.nn.Linear(width, outputs)
            for name, parameter in linear.named_parameters():
                assembled[f"model.text_hidden_fcs.0.{place}.{name}"] = parameter.detach().to(dtype)
    return assembled


def _check_maps_names_to_tensors(sd: Mapping[str, torch.Tensor]) -> None:
    """Raise a `TypeError` unless `sd` is a mapping of strings to tensors."""
    if not isinstance(sd, Mapping):
        raise TypeError(f"`sd` is a {type(sd).__name__} but a mapping of names to tensors is needed.")
    for name, value in sd.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            continue
        advice = f"Give what it wraps: sd[{name!r}]." if isinstance(value, Mapping) else "Give the state dict alone."
        raise TypeError(f"sd[{name!r}] is a {type(value).__name__} but a state dict maps names to tensors. {advice}")


def _visa_names(old_names: Iterable[str]) -> dict[str, str]:
    """Old name -> ours, for every tensor of a VISA whose stacks are as high as in `old_names`."""
    names = dict(_VISA_HEADS)
    for (old_part, new_part), rest in ((_LLAMA, _LLAMA_REST), (_CLIP, _CLIP_REST), (_SAM, _SAM_REST)):
        names |= {old_part + old: new_part + new for old, new in rest.items()}
    for (old_part, new_part), (old_stack, new_stack), layer in _VISA_STACKS:
        # At most three digits: a strange name must not make up millions of layers.
        numbered = re.compile(re.escape(old_part + old_stack) + r"(\d{1,3})\.")
        found = [int(match[1]) for match in map(numbered.match, old_names) if match]
        for i in range(max(found, default=0) + 1):
            names |= {
                f"{old_part}{old_stack}{i}.{old}": f"{new_part}{new_stack}{i}.{new}" for old, new in layer.items()
            }
    return names


# XMem (f3b841d): modules outside the two ResNets, old name -> ours. Each has a weight and a bias.
_XMEM_MODULES = {
    "key_proj.key_proj": "key_encoder.key_proj",
    "key_proj.d_proj": "key_encoder.shrinkage_proj",
    "key_proj.e_proj": "key_encoder.selection_proj",
    "value_encoder.hidden_reinforce.transform": "value_encoder.sensory_update.transform",
    "decoder.hidden_update.g16_conv": "decoder.sensory_update.conv_16",
    "decoder.hidden_update.g8_conv": "decoder.sensory_update.conv_8",
    "decoder.hidden_update.g4_conv": "decoder.sensory_update.conv_4",
    "decoder.hidden_update.transform": "decoder.sensory_update.transform",
    "decoder.up_16_8.skip_conv": "decoder.upsample_8.skip_conv",
    "decoder.up_16_8.out_conv.downsample": "decoder.upsample_8.block.shortcut",
    "decoder.up_16_8.out_conv.conv1": "decoder.upsample_8.block.conv1",
    "decoder.up_16_8.out_conv.conv2": "decoder.upsample_8.block.conv2",
    "decoder.up_8_4.skip_conv": "decoder.upsample_4.skip_conv",
    "decoder.up_8_4.out_conv.conv1": "decoder.upsample_4.block.conv1",
    "decoder.up_8_4.out_conv.conv2": "decoder.upsample_4.block.conv2",
    "decoder.pred": "decoder.mask_head",
    **{
        f"{part}.fuser.{old}": f"{part}.fuser.{new}"
        for part in ("value_encoder", "decoder")
        for old, new in {
            "block1.downsample": "block1.shortcut",
            "block1.conv1": "block1.conv1",
            "block1.conv2": "block1.conv2",
            "attention.ChannelGate.mlp.1": "attention.channel_reduce",
            "attention.ChannelGate.mlp.3": "attention.channel_expand",
            "attention.SpatialGate.spatial.conv": "attention.spatial_conv",
            "block2.conv1": "block2.conv1",
            "block2.conv2": "block2.conv2",
        }.items()
    },
}
# Names that an error message lists of each kind, at most.
_MAX_NAMES_LISTED = 40


def convert_xmem_state_dict(sd: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a published XMem checkpoint to those of [`XMemModel`].

    Args:
        sd (mapping of `str` to `torch.Tensor`): the published state dict, complete; of the network for several objects
            (the value encoder sees 5 channels: `XMemConfig()`) or for one (4 channels:
            `XMemConfig(single_object=True)`). Dimensions of keys, values and sensory memory may differ from the
            published ones.

    Returns:
        `dict`: our names and the same tensors.

    Raises:
        ValueError: if a name is missing, a name is unknown or a tensor has another shape than the network needs; the
            message lists them.
    """
    names = _xmem_names()
    problems = []
    if missing := names.keys() - sd.keys():
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := sd.keys() - names.keys():
        problems.append(f"unexpected: {_listed(unexpected)}")
    if not problems:
        with torch.device("meta"):
            expected = XMemModel(_xmem_config(sd)).state_dict()
        wrong = {
            f"{old} {tuple(sd[old].shape)} instead of {tuple(expected[new].shape)}"
            for old, new in names.items()
            if sd[old].shape != expected[new].shape
        }
        if wrong:
            problems.append(f"of another shape: {_listed(wrong)}")
    if problems:
        raise ValueError(
            f"This is not the state dict of a published XMem network. Tensors {'; '.join(problems)}. "
            "Give the whole state dict, as released."
        )
    return {new: sd[old] for old, new in names.items()}


def _listed(names: Iterable[str]) -> str:
    """Names in order, the first of them if there are many."""
    ordered = sorted(names)
    rest = len(ordered) - _MAX_NAMES_LISTED
    return ", ".join(ordered[:_MAX_NAMES_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _xmem_config(sd: Mapping[str, torch.Tensor]) -> XMemConfig:
    """Configuration of the network that the tensors `sd` (old names) belong to, if they belong to any."""
    key, value = sd["key_proj.key_proj.weight"], sd["value_encoder.fuser.block2.conv2.weight"]
    gates, first_conv = sd["decoder.hidden_update.transform.weight"], sd["value_encoder.conv1.weight"]
    for tensor in (key, value, gates, first_conv):
        if tensor.ndim != 4:
            return XMemConfig()
    return XMemConfig(
        key_dim=max(key.shape[0], 1),
        value_dim=max(value.shape[0], 1),
        sensory_dim=max(gates.shape[0] // 3, 1),
        single_object=first_conv.shape[1] == 4,
    )


def _xmem_names() -> dict[str, str]:
    """Old name -> ours, for every tensor of a published XMem network."""
    names = {f"{old}.{leaf}": f"{new}.{leaf}" for old, new in _XMEM_MODULES.items() for leaf in ("weight", "bias")}
    names |= _xmem_resnet_names("key_encoder", ("res2", "layer2", "layer3"), depths=(3, 4, 6), num_convs=3)
    names |= _xmem_resnet_names("value_encoder", ("layer1", "layer2", "layer3"), depths=(2, 2, 2), num_convs=2)
    return names


def _xmem_resnet_names(part: str, stages: tuple[str, ...], depths: tuple[int, ...], num_convs: int) -> dict[str, str]:
    """Old name -> ours, for one of XMem's ResNets."""
    names = {}

    def add(old_conv: str, old_norm: str, new: str) -> None:
        names[f"{part}.{old_conv}.weight"] = f"{part}.backbone.{new}.conv.weight"
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{part}.{old_norm}.{leaf}"] = f"{part}.backbone.{new}.norm.{leaf}"

    add("conv1", "bn1", "stem")
    for stage_idx, (stage, depth) in enumerate(zip(stages, depths, strict=True)):
        for block_idx in range(depth):
            old, new = f"{stage}.{block_idx}", f"stages.{stage_idx}.{block_idx}"
            for conv_idx in range(num_convs):
                add(f"{old}.conv{conv_idx + 1}", f"{old}.bn{conv_idx + 1}", f"{new}.layers.{conv_idx}")
            # ResNet-18's first stage keeps stride and channels, so it has no projection; ResNet-50's widens.
            if block_idx == 0 and (stage_idx > 0 or num_convs == 3):
                add(f"{old}.downsample.0", f"{old}.downsample.1", f"{new}.shortcut")
    return names
