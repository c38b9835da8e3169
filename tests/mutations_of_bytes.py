"""Damage to the bytes of one file, by kind: to any file, to JSON, to the headers of safetensors."""

import json
import math
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml


# Any file, as bytes.


def _parts(data: bytes) -> list[tuple[int, int]]:
    """Where the parts of a file are: the length, header and body of a safetensors file, or all of it."""
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= len(data) - 8:
        return [(0, len(data))]
    return [(start, end) for start, end in ((0, 8), (8, 8 + size), (8 + size, len(data))) if start < end]


def _place(random: Random, data: bytes) -> int:
    start, end = random.choice(_parts(data))
    return random.randrange(start, max(end, start + 1))


def flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[_place(random, data)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(random: Random, data: bytes) -> bytes:
    at, size = _place(random, data), random.choice((1, 4, 64))
    return (data[:at] + random.randbytes(size) + data[at + size :])[: len(data)]


def zero(random: Random, data: bytes) -> bytes:
    at, size = _place(random, data), random.choice((1, 8, 512, len(data)))
    return (data[:at] + bytes(size) + data[at + size :])[: len(data)]


def truncate(random: Random, data: bytes) -> bytes:
    edges = [edge + by for part in _parts(data) for edge in part for by in (-1, 0, 1)]
    return data[: max(0, random.choice([*edges, _place(random, data), _place(random, data)]))]


def lengthen(random: Random, data: bytes) -> bytes:
    return data + random.choice((b"\0", b"\n", b" " * 9, b"}", bytes(4096), random.randbytes(100), data))


def insert(random: Random, data: bytes) -> bytes:
    at = _place(random, data)
    return data[:at] + random.choice((random.randbytes(random.choice((1, 4, 100))), data[:at][-50:])) + data[at:]


def cut_out(random: Random, data: bytes) -> bytes:
    at = _place(random, data)
    return data[:at] + data[at + random.choice((1, 4, 100, 1000)) :]


ODD_TEXT = ("\ufeff", "\0", "\u202e", "é", "😀", "\ud800", "\x1b[31m", "\r", "\u2028", "٣", "A\u030a")


def other_text(random: Random, data: bytes) -> bytes:
    how = random.randrange(4)
    if how == 0:
        return data.decode("latin-1").encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
    at = 0 if how == 1 else _place(random, data)
    odd = random.choice(ODD_TEXT).encode("utf-8", "surrogatepass")
    return data[:at] + random.choice((odd, b"\xff", b"\xc3", b"\xed\xa0\x80")) + data[at + (how == 2) :]


IN_BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "bits flipped": flip,
    "bytes overwritten": overwrite,
    "bytes set to zero": zero,
    "files cut off": truncate,
    "files made longer": lengthen,
    "bytes inserted": insert,
    "bytes cut out": cut_out,
    "characters that are none": other_text,
}


# JSON, and YAML, which JSON is too.

# What a text has in place of a value that Python's writer of JSON would not write.
RAW = {
    "raw nesting": "[" * 100_000 + "]" * 100_000,
    "raw objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "raw digits": "9" * 5000,
    "raw float": "1e400",
    "raw minus": "-",
    "raw surrogate": '"\\ud800"',
}
NUMBERS = (
    -1, 0, 1, 2, 3, 4, 7, 64, 0.5, 2.0, -0.0, 1e-300, 1e300, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    10**400, math.nan, math.inf, -math.inf,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, "", "2", "٢", "two", "\0", "../..", "/etc/hostname", "x" * 100_000, [], [1], [[], {}], {},
    {"a": 1}, {"__float__": "NaN"}, *RAW,
)  # fmt: skip
WORDS = (
    "pre_up", "post_up", "exp", "sigmoid", "rms_norm", "layer_norm", "zeros", "standard", "small_init", "torch",
    "mlstm", "slstm", "float16", "bfloat16", "float64", "xlstm", "xlstm_lm", "vanilla", "cuda", "gelu", "BPE",
)  # fmt: skip
KEYS: dict[str, Any] = {
    "auto_map": {
        "AutoConfig": "hostile.Code",
        "AutoModelForCausalLM": "hostile.Code",
        "AutoTokenizer": ["hostile.Code", "hostile.Code"],
    },
    "quantization_config": {"bits": 4},
    "model_type": "no_such_model",
    "torch_dtype": "float16",
    "dtype": "load",
    "architectures": ["Hostile"],
    "embedding_dim": 64,
    "num_blocks": 1,
    "use_bias": True,
    "tie_word_embeddings": True,
    "add_out_norm": False,
    "transformers_weights": "../outside/model.safetensors",
    "_name_or_path": "../outside",
    "name_or_path": "../outside",
    "distributed_config": {"tp_size": 2},
    "configuration_files": ["config.4.0.0.json", "../outside/config.json"],
    "generation_config": {"max_length": 3},
    "base_model_tp_plan": {},
    "id2label": 5,
    "problem_type": "nothing",
    "is_encoder_decoder": True,
    "tokenizer_class": "../hostile.Code",
    "tokenizer_file": "../outside/tokenizer.json",
    "chat_template": "{% for x in range(10 ** 9) %}{% endfor %}",
    # names of what a configuration has besides its fields
    "ratio": "1:0",
    "ranks": 2,
    "inner_size": 3,
    "layer_types": ["x"],
    "check_mlstm": 5,
    "check_slstm": 5,
    "to_dict": 5,
    "to_diff_dict": 5,
    "_require_multiple": 5,
    "_round_up": 5,
    "from_dict": 5,
    "__class__": "x",
    "__dict__": {},
    "__init__": 5,
    "": 0,
    "\0": 0,
    "é" * 1000: 0,
}


def text_of(value: Any) -> bytes:
    """The text of a value, `RAW` included."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


def parsed(data: bytes) -> Any:
    return json.loads(data) if data[:1] == b"{" else yaml.safe_load(data)


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with the keys or positions in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _entries(value[key])


def _entry(random: Random, value: Any, within: type = object) -> tuple[Any, Any]:
    """Half of the time one at the top."""
    found = [x for x in _entries(value) if isinstance(x[0], within)]
    top = [x for x in found if x[0] is value]
    return random.choice(top if top and random.random() < 0.5 else found)


def replace(random: Random, value: Any) -> bytes:
    container, key = _entry(random, value)
    old = container[key]
    legal: list[Any] = [*WORDS] if isinstance(old, str) else []
    if isinstance(old, int | float) and not isinstance(old, bool):
        legal = [old + 1, old * 2, old / 2, float(old), str(old), old - 1, *NUMBERS]
    container[key] = random.choice(random.choice((legal or OTHERS, OTHERS, NUMBERS)))
    return text_of(value)


def remove_key(random: Random, value: Any) -> bytes:
    container, key = _entry(random, value)
    del container[key]
    return text_of(value)


def rename_key(random: Random, value: Any) -> bytes:
    container, key = _entry(random, value, dict)
    at = random.randrange(len(key) + 1)
    new = random.choice((key.upper(), key[:at], key[:at] + random.choice(ODD_TEXT) + key[at:], key + " ", f"_{key}"))
    container[new.encode("utf-8", "replace").decode()] = container.pop(key)
    return text_of(value)


def double_key(random: Random, value: Any) -> bytes:
    container, key = _entry(random, value, dict)
    container["the doubled key"] = random.choice((container[key], *NUMBERS, *OTHERS))
    if random.random() < 0.5:  # first the other one
        container[key] = container.pop(key)
    return text_of(value).replace(b'"the doubled key"', json.dumps(key).encode())


def add_key(random: Random, value: Any) -> bytes:
    key = random.choice(list(KEYS))
    container = value if random.random() < 0.9 else _entry(random, value, dict)[0]
    container[key] = KEYS[key] if random.random() < 0.7 else random.choice(OTHERS)
    return text_of(value)


def swap_values(random: Random, value: Any) -> bytes:
    (a, i), (b, j) = _entry(random, value), _entry(random, value)
    x, y = json.loads(json.dumps((a[i], b[j])))  # copies: one may hold the other
    a[i], b[j] = y, x
    return text_of(value)


def nest(random: Random, value: Any) -> bytes:
    container, key = _entry(random, value)
    for _ in range(random.choice((1, 100, 900))):
        container[key] = random.choice(([container[key]], {"a": container[key]}))
    return text_of(value)


def other_document(random: Random, value: Any) -> bytes:
    return random.choice((text_of(random.choice((*NUMBERS, *OTHERS))), b"", b" ", b"{}", text_of([value]), b"{}" * 2))


def alias(random: Random, value: Any) -> bytes:
    """As in YAML, values that stand for ten times as many each."""
    container, key = _entry(random, value)
    depth = random.choice((1, 3, 12))
    container[key] = "the alias"
    names = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]\n" for i in range(depth)]
    block = yaml.safe_dump(value, sort_keys=False).replace("the alias", f"*a{depth - 1}")
    return ("".join(names) + block).encode()


IN_JSON: dict[str, Callable[[Random, Any], bytes]] = {
    "values replaced": replace,
    "keys removed": remove_key,
    "keys renamed": rename_key,
    "keys doubled": double_key,
    "keys added": add_key,
    "values swapped": swap_values,
    "values nested": nest,
    "documents replaced": other_document,
    "values repeated by aliases": alias,
}


# Headers and bodies of safetensors files.

Header = dict[str, Any]
DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64",
    "f32", "X", "", None, 5, 1.5,
)  # fmt: skip
SIZES = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def unpacked(data: bytes) -> tuple[Header, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else text_of(header)
    return struct.pack("<Q", len(text)) + text + body


def in_order(data: bytes) -> bytes:
    """The same with metadata in the order of their names: safetensors writes them in any."""
    header, body = unpacked(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return packed(header, body)


def names_in(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _alike(random: Random, header: Header) -> tuple[str, str]:
    """Two tensors of one shape, if there are such, else any two."""
    names = names_in(header)
    pairs = [(a, b) for a in names for b in names if a < b and header[a]["shape"] == header[b]["shape"]]
    return random.choice(pairs) if pairs else (names[0], names[-1])


def change_dtype(random: Random, header: Header, body: bytes) -> bytes:
    entry = header[random.choice(names_in(header))]
    old, new = entry["dtype"], random.choice(DTYPES)
    entry["dtype"] = new
    if random.random() < 0.5 and entry["shape"] and new in SIZES:  # of as many bytes
        entry["shape"][-1] = entry["shape"][-1] * SIZES[old] // SIZES[new]
    return packed(header, body)


def change_shape(random: Random, header: Header, body: bytes) -> bytes:
    entry = header[random.choice(names_in(header))]
    shape = entry["shape"]
    odd: list[Any] = [[], [0], [-1], [1.5], ["2"], None, 5, [None], [2**63], [2**32, 2**32], [[2]]]
    odd += [[*shape, 0], [True, *shape]]
    same: list[Any] = [shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)]]
    entry["shape"] = random.choice(random.choice((odd, same)))
    return packed(header, body)


def change_offsets(random: Random, header: Header, body: bytes) -> bytes:
    a, b = _alike(random, header)
    start, end = header[a]["data_offsets"]
    if random.random() < 0.3:
        header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], [start, end]
    else:
        odd: list[Any] = [[end, start], [start + 4, end + 4], [start, start], [start, end + 1], [-4, end], []]
        odd += [[0, len(body)], [start], [start, end, end], [1.5, 2.5], ["0", "4"], None]
        huge = [[2**63, 2**63 + 4], [start, 2**64 - 1]]
        header[a]["data_offsets"] = random.choice(random.choice((odd, huge)))
    return packed(header, body)


def declare_huge(random: Random, header: Header, body: bytes) -> bytes:
    """Ten terabytes, of which there are a few bytes or none."""
    name, size = random.choice([*names_in(header), "extra"]), 10**13
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    if random.random() < 0.5:
        entry["data_offsets"] = header.get(name, {"data_offsets": [len(body), len(body)]})["data_offsets"]
    return packed(random.choice(({**header, name: entry}, {name: entry})), body)


def rename_tensor(random: Random, header: Header, body: bytes) -> bytes:
    names = names_in(header)
    name = random.choice(names)
    at = random.randrange(len(name))
    odd = ("../x", "/etc/hostname", "", "\0", "é\x1b[31m\nerror: ", "x" * 100_000, "__metadata__")
    near = (
        name[:at] + chr(ord(name[at]) ^ 1) + name[at + 1 :],
        name.removesuffix(".weight"),
        f"model.{name}",
        name[1:],
    )
    header[random.choice(random.choice((odd, near)))] = header.pop(name)
    return packed(header, body)


def swap_tensors(random: Random, header: Header, body: bytes) -> bytes:
    a, b = _alike(random, header)
    header[a], header[b] = header[b], header[a]
    return packed(header, body)


def remove_tensor(random: Random, header: Header, body: bytes) -> bytes:
    """From the header alone, or with its bytes."""
    start, end = header.pop(random.choice(names_in(header)))["data_offsets"]
    if random.random() < 0.3:
        return packed(header, body)
    for name in names_in(header):
        header[name]["data_offsets"] = [x - (end - start) * (x >= end) for x in header[name]["data_offsets"]]
    return packed(header, body[:start] + body[end:])


def add_tensor(random: Random, header: Header, body: bytes) -> bytes:
    size = random.choice((0, 4, 128))
    name = random.choice(
        ("extra", "lm_head.bias", "model.layers.9.ffn_norm.weight", "layers.0.conv", "layers.2.C", "é")
    )
    header[name] = {"dtype": random.choice(("F32", "I32")), "shape": [size // 4]}
    header[name]["data_offsets"] = [len(body), len(body) + size]
    return packed(header, body + random.randbytes(size))


def double_tensor(random: Random, header: Header, body: bytes) -> bytes:
    a, b = _alike(random, header)
    if random.random() < 0.5:
        header["the doubled key"] = header[b]
        return packed(text_of(header).replace(b'"the doubled key"', json.dumps(a).encode()), body)
    header[a]["the doubled key"] = random.choice((header[b]["data_offsets"], header[a]["data_offsets"]))
    return packed(text_of(header).replace(b'"the doubled key"', b'"data_offsets"'), body)


def change_metadata(random: Random, header: Header, body: bytes) -> bytes:
    metadata = header.get("__metadata__", {})
    key = random.choice([*metadata, "extra"])
    values = ("", "tf", "0", "1", "-1", "1.5", "٣", "9" * 18, "9" * 19, "9" * 5000, "float16", "0" * 64, "x" * 100_000)
    how = random.randrange(4)
    if how == 0:
        metadata.pop(key, None)
    elif how == 1:
        header["__metadata__"] = random.choice((None, 5, [], "x", {"a": 5}, {"a": {"b": "c"}}, {}, *RAW))
        return packed(header, body)
    else:
        metadata[key] = random.choice((*values, *OTHERS) if how == 2 else values)
    return packed({**header, "__metadata__": metadata}, body)


def change_length(random: Random, header: Header, body: bytes) -> bytes:
    size = int.from_bytes(packed(header, b"")[:8], "little")
    wrong = (0, 1, 7, size - 1, size + 1, size + len(body), size + 2**32, 10**8, 10**8 + 1, 2**63, 2**64 - 1)
    return struct.pack("<Q", random.choice(wrong)) + packed(header, body)[8:]


def pad_header(random: Random, header: Header, body: bytes) -> bytes:
    text = text_of(header)
    texts = (b" " + text, text + b" " * 5, text + b"\0" * 8, text + b"x", text + text, b"[" + text + b"]", b"{", b"{}")
    return packed(random.choice(texts), body)


def other_header(random: Random, header: Header, body: bytes) -> bytes:
    return packed(random.choice([change(random, header) for change in (replace, add_key, nest, other_document)]), body)


def change_value(random: Random, header: Header, body: bytes) -> bytes:
    """One number of four bytes, which may be none."""
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1e-45, -3e38, 3.4028234663852886e38)
    at = 4 * random.randrange(max(len(body) // 4, 1))
    return packed(header, body[:at] + struct.pack("<f", random.choice(values)) + body[at + 4 :])


IN_HEADERS: dict[str, Callable[[Random, Header, bytes], bytes]] = {
    "other dtypes": change_dtype,
    "other shapes": change_shape,
    "other offsets": change_offsets,
    "huge declared sizes": declare_huge,
    "tensors renamed": rename_tensor,
    "tensors swapped": swap_tensors,
    "tensors removed": remove_tensor,
    "tensors added": add_tensor,
    "tensors doubled": double_tensor,
    "other metadata": change_metadata,
    "wrong lengths of a header": change_length,
    "headers padded": pad_header,
    "headers replaced": other_header,
    "numbers replaced": change_value,
}
