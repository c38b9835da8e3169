"""How a model is spread over processes: plans by the names that Transformers' `DistributedConfig` reads them under.

Tensor parallelism gives each process some heads of every mixer and some channels of every feed-forward. Weights that
stand in one matrix, such as rows [q | k | v | o], are then several, so that each is split by heads. The styles of the
plan are in `tensor_parallel`.
"""

from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from .configuration_xlstm import XLSTMConfig

FSDP_PLAN = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", "norm": "keep_full_weight"}
# what each part takes, and what it gives
PP_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


class Parts(NamedTuple):
    """What stands in one matrix: names, how large they are to each other, and along which axis they follow."""

    names: tuple[str, ...]
    shares: tuple[int, ...]
    dim: int = 0

    def sizes(self, size: int) -> list[int]:
        """Of an axis of so many numbers, those of each part."""
        return [size * share // sum(self.shares) for share in self.shares]


def parts_of(config: "XLSTMConfig") -> dict[str, Parts]:
    """By the name of a module within a block, what its weight consists of."""
    parts = {"ffn.up_proj": Parts(("gate", "up"), (1, 1))}
    if config.mlstm_block == "post_up":
        sizes = config.qk_size, config.qk_size, config.inner_size, config.inner_size
        parts["mixer.qkvo_proj"] = Parts(("q", "k", "v", "o"), sizes)
        parts["mixer.gate_proj"] = Parts(("i", "f"), (1, 1))
    else:
        parts["mixer.up_proj"] = Parts(("x", "z"), (1, 1))
        parts["mixer.gate_proj"] = Parts(("q", "k", "v"), (1, 1, 1), dim=1)
    return parts


def tp_plan(config: "XLSTMConfig") -> dict[str, str]:
    """The style of each module of an `XLSTMModel(config)` that is split over processes."""
    mlstm, slstm = "mlstm" in config.block_types, "slstm" in config.block_types
    post_up, pre_up = mlstm and config.mlstm_block == "post_up", mlstm and config.mlstm_block == "pre_up"
    styles = {"mixer": "xlstm_mixer", "mixer.head_norm": "xlstm_rows"}
    if post_up:
        styles["mixer.out_proj"] = "xlstm_sum"
    if pre_up:
        styles |= dict.fromkeys(("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), "xlstm_rows")
        styles |= {"mixer.gate_proj": "xlstm_gates", "mixer.down_proj": "xlstm_sum"}
    if (pre_up and config.conv_kernel_size) or (slstm and config.slstm_conv_kernel_size):
        styles["mixer.conv"] = "xlstm_rows"
    has_ffn = post_up or (slstm and config.slstm_ffn_size > 0)
    if has_ffn:
        styles |= {"ffn": "xlstm_ffn", "ffn.down_proj": "xlstm_sum"}
    for module, parts in parts_of(config).items():
        if has_ffn if module.startswith("ffn.") else mlstm:
            style = "xlstm_rows" if parts.dim == 0 else "xlstm_columns"
            styles |= {f"{module}.{name}": style for name in parts.names}
    return {"embed_tokens": "embedding_rowwise", **{f"layers.*.{name}": style for name, style in styles.items()}}


def check_divisible(config: "XLSTMConfig", ranks: int) -> None:
    """Raises ValueError unless so many processes can share the heads and channels of a model evenly."""
    widths = {}
    if "mlstm" in config.block_types:
        widths["num_heads"] = config.num_heads
        if config.mlstm_block == "post_up":
            widths["the width of feed-forwards"] = config.ffn_size
        else:
            widths["the number of blocks of q, k and v"] = config.inner_size // config.mlstm_qkv_block_size
    if "slstm" in config.block_types:
        widths["slstm_num_heads"] = config.slstm_num_heads
        widths["the width of feed-forwards behind an sLSTM"] = config.slstm_ffn_size
    for what, width in widths.items():
        if width % ranks:
            raise ValueError(
                f"{what} must be a multiple of tp_size = {ranks}, as each process has as many as the others, "
                f"got {width}."
            )
