"""Every setting of the system, on one page.

A run is described by one ``Config``: a dataclass a part, composed at the bottom. Values come from, in rising precedence,
the defaults here, a YAML file (differences only), and ``a.b=c`` words on the command line. Unknown names fail with the
nearest valid one; values are range-checked before anything starts; the resolved page is saved in the run folder.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from haste_dist import page
from haste_dist.errors import ConfigError
from haste_dist.setting import setting
from haste_dist.use_config import PredictConfig, ServeConfig

GROUP_SIZES = (1, 16, 32, 64, 128)
ENCODER_FOLDER = "encoder"  # of a run: its encoder's configuration and tokenizer
LOGGERS = ("tensorboard", "mlflow", "wandb")


@dataclass
class RunConfig:
    folder: str = setting("runs/default", "run folder: config, metrics, checkpoints (shared by all nodes)")
    seed: int = setting(0, "seed of data order, initial features, rewiring, rounding and dropout", low=0, high=2**31 - 1)
    resume: str = setting(
        "auto",
        "auto: go on from the newest complete checkpoint; never: refuse a used folder; must: fail without one",
        choices=("auto", "never", "must"),
    )
    loggers: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"doc": "where numbers are drawn too: tensorboard, mlflow, wandb (docs/launch.md)"},
    )
    deterministic: bool = setting(False, "same bits in each run on the same ranks and GPU: sums in fixed order, slower (sets output's too)")


@dataclass
class DataConfig:
    source: str = setting("", "folder with the raw texts and labels (read by prepare), here or in an object store (s3://...)")
    prepared: str = setting("", "folder with Arrow shards and manifest (written by prepare, read by all else), here or s3://...")
    format: str = setting(
        "auto", "layout of the source; auto looks at the file names", choices=("auto", "jsonl", "text", "parquet", "arrow")
    )
    max_length: int = setting(128, "tokens a text, special tokens included; longer texts are cut", low=4, high=8192)
    rows_per_shard: int = setting(16384, "lines of the source that make one Arrow shard, at most", low=1, high=2**24)
    limit: int = setting(0, "use only the first this many training texts (0: all)", low=0)
    on_error: str = setting("stop", "bad input: stop at the first, or quarantine it and go on", choices=("stop", "quarantine"))
    dev_fraction: float = setting(
        0.0,
        "part of the training texts, drawn by run.seed, held out for evaluation instead of the test split; prepare needs both as training"
        " does: label embeddings leave these texts out",
        low=0.0,
        high=0.5,
    )
    length_buckets: int = setting(32, "batches sorted by length together, to save padding (1: none)", low=1, high=4096)
    reader: str = setting(
        "mmap", "how training reads the shards: memory-mapped by each rank, or streamed through Ray Data", choices=("mmap", "ray")
    )
    label_texts: int = setting(
        0, "times an epoch that each label's own text is a training text, with that label (0: never)", low=0, high=100
    )
    workers: int = setting(0, "CPUs that prepare uses (0: all of the machine or cluster)", low=0)


@dataclass
class GroupsConfig:
    features: str = setting(
        "encoder", "label embedding: mean of the encoder's text embeddings, or of TF-IDF vectors", choices=("encoder", "tfidf")
    )
    method: str = setting(
        "semantic",
        "which labels share features: close ones, random ones, or neighbours in frequency",
        choices=("semantic", "random", "frequency"),
    )
    label_text: bool = setting(True, "join the embedding of the label's own text, where it has one")
    iterations: int = setting(8, "2-means iterations a level of the bisection", low=1, high=100)
    batch_size: int = setting(256, "texts embedded at once", low=1)
    encoder: str = setting("", "what embeds texts: a Hugging Face or sentence-transformers name or path, a run folder; empty: encoder.name")
    search: int = setting(2**20, "labels among which neighbours are searched; larger sets are first cut into halves", low=1024)
    start: str = setting("", "earlier prepared folder whose groups stay together as far as their labels are there (by uid); empty: none")


@dataclass
class EncoderConfig:
    name: str = setting("scratch", "Hugging Face name, local path, package:NAME/FOLDER (weights in a Python package), or scratch")
    tokenizer: str = setting("", "tokenizer name or path; empty: the encoder's own")
    layers: int = setting(0, "keep only the first this many layers (0: all); for scratch, how many to make", low=0, high=96)
    width: int = setting(256, "embedding width of a scratch encoder", low=16, high=8192)
    heads: int = setting(4, "attention heads of a scratch encoder", low=1, high=128)
    pooling: str = setting("mean", "how token vectors become one embedding", choices=("mean", "cls"))
    project: int = setting(
        0, "width of a trained linear layer behind pooling, which the output layer then reads (0: none)", low=0, high=8192
    )
    normalize: bool = setting(False, "scale embeddings to length 1")
    dropout: float = setting(-1.0, "dropout inside the encoder (-1: as its own config says)", low=-1.0, high=0.95)
    frozen: bool = setting(False, "train the output layer only")
    lr: float = setting(5e-5, "peak learning rate of AdamW", low=0.0, high=1.0)
    weight_decay: float = setting(0.01, "decoupled weight decay (biases and norms are exempt)", low=0.0, high=1.0)
    beta2: float = setting(0.999, "second-moment decay of AdamW", low=0.0, high=0.99999)
    clip: float = setting(1.0, "gradient norm is clipped to this (0: never)", low=0.0)
    precision: str = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bfloat16"))
    zero: int = setting(0, "DeepSpeed ZeRO stage", low=0, high=2)
    attention: str = setting(
        "sdpa",
        "attention kernels: torch's, torch's by way of cuDNN where it can (which plans for each shape), or those of the flash-attn package",
        choices=("sdpa", "cudnn", "flash"),
    )
    checkpointing: bool = setting(False, "make activations again in the backward pass: less memory, a third more work")
    graphs: bool = setting(
        True, "GPU: replay the passes of small batches as CUDA graphs (BERT-like models; not with checkpointing, nor compiled blocks)"
    )
    fused: bool = setting(
        True,
        "GPU, bfloat16: layers of BERT's kind by own kernels: attention of texts of up to 128 tokens (MPNet: 64), GELU, dropout and norms",
    )
    compile: bool = setting(False, "torch.compile of the encoder's blocks that are not fused: half a minute at the start")
    lora_rank: int = setting(
        0, "train adapters of this rank in all linear layers instead of the weights (0: no; needs peft)", low=0, high=1024
    )


@dataclass
class OutputConfig:
    head_fraction: float = setting(0.1, "most frequent labels that get a dense row (rounded up to whole groups)", low=0.0, high=1.0)
    group_size: int = setting(32, "labels that share one set of input features (1: per-label fixed fan-in)", choices=GROUP_SIZES)
    fan_in: int = setting(64, "input features of a tail label", low=1, high=1024)
    head_features: list[int] = field(
        default_factory=list, metadata={"doc": "slice [start, end) of the embedding that the head reads; empty: all of it"}
    )
    tail_features: list[int] = field(
        default_factory=list, metadata={"doc": "slice [start, end) of the embedding that the tail reads; empty: all of it"}
    )
    head_dropout: float = setting(0.0, "dropout on the head's input", low=0.0, high=0.95)
    tail_dropout: float = setting(0.0, "dropout on the tail's input", low=0.0, high=0.95)
    loss: str = setting("bce", "loss over all labels", choices=("bce", "squared_hinge"))
    reduction: str = setting(
        "sum",
        "of the loss over the rows of a batch; published learning rates are for sum (multiply by the batch size for mean)",
        choices=("sum", "mean"),
    )
    bias: bool = setting(True, "a bias a label, in float32")
    bias_init: float | None = setting(
        None, "initial bias of every label; null: the log odds of an average label (squared_hinge: -1)", low=-30.0, high=30.0
    )
    init_scale: float = setting(1.0, "initial weights are uniform within this / sqrt(inputs of the label)", low=0.0, high=10.0)
    start: str = setting(
        "random",
        "where the tail starts: random features and weights, or those of its labels' embeddings, which prepare then keeps",
        choices=("random", "centroids"),
    )
    basis: str = setting(
        "embedding",
        "what the tail reads features of: the embedding as it is, or turned to the principal directions of the label embeddings",
        choices=("embedding", "labels"),
    )
    lr: float = setting(0.05, "peak learning rate of SGD, for the chosen reduction", low=0.0)
    tail_lr: float | None = setting(None, "that of the tail, whose labels read fewer features; null: the same", low=0.0)
    momentum: float = setting(0.9, "SGD momentum (0: none is stored)", low=0.0, high=0.9999)
    weight_decay: float = setting(1e-4, "added to the gradient before momentum", low=0.0, high=1.0)
    weight_dtype: str = setting(
        "auto",
        "auto: bfloat16 with stochastic rounding on a GPU, float32 on a CPU; float8 (e4m3) halves bfloat16's memory",
        choices=("auto", "float32", "bfloat16", "float8"),
    )
    momentum_dtype: str = setting("auto", "auto: as the weights, bfloat16 beside float8", choices=("auto", "float32", "bfloat16", "float8"))
    rounding: str = setting(
        "stochastic", "of weights and momentum in bfloat16; nearest loses small updates, for comparison", choices=("stochastic", "nearest")
    )
    half_sums: bool = setting(
        True,
        "GPU kernels, bfloat16: the tail sums its gradient to the embedding in float16, about 128 terms, then in float32; off: float32",
    )
    deterministic: bool = setting(False, "GPU kernels: that gradient is summed in a fixed order: the same bits in each run, but slower")


@dataclass
class RewireConfig:
    interval: int = setting(1000, "steps between rewirings of the tail (0: static features)", low=0)
    until: float = setting(0.66, "part of training after which features stay", low=0.0, high=1.0)
    fraction: float = setting(
        0.25,
        "connections replaced at the first rewiring, decaying to none by a cosine; with grow=embeddings the part of each label's "
        "weights that starts anew, the same each time",
        low=0.0,
        high=1.0,
    )
    prune: str = setting(
        "group",
        "lowest mean |w| in each group, over all groups at once, or all under a threshold",
        choices=("group", "global", "threshold"),
    )
    threshold: float = setting(0.01, "mean |w| under which prune=threshold replaces a connection", low=0.0)
    grow: str = setting(
        "random",
        "new features of a group: random ones, those of the largest summed |gradient|, or those in which label embeddings of the encoder "
        "as it is by then are largest (prune does not count)",
        choices=("random", "gradient", "embeddings"),
    )
    head: bool = setting(True, "grow=embeddings: rows of the dense head start anew as well")
    batches: int = setting(4, "batches whose gradients choose the new features: the last ones before a rewiring", low=1)


@dataclass
class TrainConfig:
    batch_size: int = setting(256, "texts a step over all ranks together (a micro-batch where accumulation > 1)", low=1)
    accumulation: int = setting(1, "micro-batches an encoder update", low=1)
    classifier_step: str = setting(
        "micro",
        "where accumulation > 1: the output layer steps at each micro-batch, or once on all of them together (global: as without"
        " accumulation at that batch size, but in the memory of a micro-batch; all forward passes but one run twice; a step is an update)",
        choices=("micro", "global"),
    )
    epochs: float = setting(10.0, "passes over the training texts; a fraction is allowed", low=0.0)
    max_steps: int = setting(0, "stop after this many steps (0: by epochs); the schedules still span the epochs", low=0)
    warmup: float = setting(0.05, "part of training in which both learning rates rise from 0", low=0.0, high=1.0)
    lowest_lr: float = setting(
        0.0, "part of their peaks below which they do not fall again: above 0 for a run whose checkpoints are averaged", low=0.0, high=1.0
    )
    log_every: int = setting(20, "steps between metric lines (the loss value is computed only then)", low=1)
    evaluate_every: float = setting(1.0, "epochs between evaluations (0: only at the end)", low=0.0)
    evaluate_rows: int = setting(0, "texts an evaluation during training uses (0: all)", low=0)
    checkpoint_every: int = setting(0, "steps between checkpoints besides those after evaluations (0: none)", low=0)
    profile: int = setting(0, "steps that torch.profiler records after the first ten, into the run folder's profile/ (0: none)", low=0)
    skip_batches: int = setting(0, "batches with embeddings not finite to pass over before a run stops; above 0, steps wait", low=0)
    patience: int = setting(0, "evaluations without a better metric before training stops (0: never)", low=0)
    metric: str = setting(
        "P@1", "which metric picks the best checkpoint", choices=("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10")
    )


@dataclass
class CheckpointConfig:
    keep: int = setting(2, "newest checkpoints that stay; the best one always does", low=1)
    keep_every: int = setting(0, "checkpoints at multiples of this many steps stay as well (0: none)", low=0)
    store: str = setting("", "object store (s3://...) or folder to copy checkpoints to; a run folder without newer ones goes on from there")


@dataclass
class EvaluateConfig:
    split: str = setting("test", "texts that are scored", choices=("test", "dev", "train"))
    labels: str = setting(
        "all",
        "labels that count, as true ones and as answers: all, or those seen in training (texts left without a label are not scored), as in "
        "many test splits",
        choices=("all", "seen"),
    )
    batch_size: int = setting(256, "texts scored at once over all ranks", low=1)
    propensity_a: float = setting(0.55, "A of the propensity model (0.6 for Amazon, 0.5 for Wikipedia sets)", low=0.0)
    propensity_b: float = setting(1.5, "B of the propensity model (2.6 for Amazon, 0.4 for Wikipedia sets)", low=0.0)


@dataclass
class LaunchConfig:
    ranks: int = setting(0, "processes, one a GPU (0: all GPUs of the cluster, or 1 on CPU)", low=0)
    device: str = setting("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    address: str = setting("", "Ray cluster to join; empty: RAY_ADDRESS, else one on this machine")
    threads: int = setting(0, "CPU threads a rank (0: the machine's cores shared out)", low=0)
    retries: int = setting(3, "restarts in a row, from the newest checkpoint, after failures that left no new one between them", low=0)
    timeout: int = setting(600, "seconds after which a rank that does not answer counts as lost", low=1)
    elastic: bool = setting(False, "after a failure, go on with the GPUs (or CPUs) that are left")
    wait: float = setting(60.0, "seconds to wait after a failure for lost ranks to come back", low=0.0)
    label_parallel: int = setting(0, "ranks that share the labels; the rest are replicas, each with its part of the batch (0: all)", low=0)
    check_memory: bool = setting(True, "refuse a run whose planned memory is more than a GPU has (haste plan)")


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    groups: GroupsConfig = field(default_factory=GroupsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    rewire: RewireConfig = field(default_factory=RewireConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def load_config(file: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults < YAML ``file`` < ``a.b=c`` ``overrides``, checked.

    ``file`` is a path, or the name of a YAML shipped with the package (``demo``, ``wordnet``, ...).
    Raises ConfigError, with a message of one line, for a missing file, an unknown name or a bad value.
    """
    layers = [] if file is None else [page.file_layer(_find_yaml(str(file)), str(file))]
    config = page.merged(Config, [*layers, *page.word_layers(overrides or [])])
    check(config)
    return config


def check(config: Config) -> None:
    """Range checks of every field, then the few rules that join two of them. Raises ConfigError."""
    page.check_ranges(config)
    for logger in config.run.loggers:
        if logger not in LOGGERS or config.run.loggers.count(logger) > 1:
            raise ConfigError(f"run.loggers={config.run.loggers}: each once, of {', '.join(LOGGERS)}")
    for name in ("head_features", "tail_features"):
        span = getattr(config.output, name)
        if span and (len(span) != 2 or not 0 <= span[0] < span[1]):
            raise ConfigError(f"output.{name}={span}: a slice reads [start, end] with 0 <= start < end")
    if -1 < config.encoder.dropout < 0:
        raise ConfigError(f"encoder.dropout={config.encoder.dropout}: must be -1 (as the encoder's own config says) or in [0.0 .. 0.95]")
    if config.encoder.frozen and config.encoder.lora_rank:
        raise ConfigError(
            f"encoder.lora_rank={config.encoder.lora_rank}: encoder.frozen=true trains nothing of the encoder; set one of them"
        )
    if config.encoder.frozen and config.encoder.project:
        raise ConfigError(f"encoder.project={config.encoder.project}: encoder.frozen=true would leave it as it was drawn; set one of them")
    if config.encoder.name == "scratch" and config.encoder.width % config.encoder.heads:
        raise ConfigError(f"encoder.width={config.encoder.width} is not a multiple of encoder.heads={config.encoder.heads}")
    if config.output.rounding == "nearest" and "float8" in (config.output.weight_dtype, config.output.momentum_dtype):
        raise ConfigError("output.rounding=nearest: too coarse for float8; set output.rounding=stochastic")
    asks = "start=centroids" if config.output.start == "centroids" else "basis=labels" if config.output.basis == "labels" else ""
    if asks and (config.groups.features != "encoder" or config.groups.encoder):
        raise ConfigError(f"output.{asks}: label embeddings must be the encoder's; set groups.features=encoder, groups.encoder=")
    if asks and config.encoder.project:
        raise ConfigError(f"output.{asks}: label embeddings are not projected; set encoder.project=0, or that setting back")
    if config.output.tail_features:
        check_fan_in(config.output.fan_in, config.output.tail_features[1] - config.output.tail_features[0])


def check_fan_in(fan_in: int, width: int) -> None:
    """A label cannot read more distinct features than its slice of the embedding has. Raises ConfigError."""
    if fan_in > width:
        raise ConfigError(f"output.fan_in={fan_in} is larger than the {width} features that the tail reads; lower it to {width} or less")


def encoder_settings_of(config: Config, run: Path) -> EncoderConfig:
    """The settings that rebuild a run's encoder and tokenizer from its folder alone, weights aside."""
    return replace(config.encoder, name=str(run / ENCODER_FOLDER), tokenizer="", layers=0)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved page as YAML that ``load_config`` reads back."""
    path.write_text(page.as_yaml(config), encoding="utf-8")


def _find_yaml(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    import haste_conf

    shipped = Path(next(iter(haste_conf.__path__)))
    if (shipped / f"{name}.yaml").is_file():
        return shipped / f"{name}.yaml"
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ConfigError(f"{name}: no such config file; shipped ones: {names}")
